"""Who writes next."""

from switchgen.policies.base import Choice, Policy
from switchgen.policies.fixed import FixedPolicy, RandomPolicy
from switchgen.policies.probe import ProbePolicy
from switchgen.policies.switcher import SwitcherPolicy

__all__ = ["Choice", "FixedPolicy", "Policy", "ProbePolicy", "RandomPolicy", "SwitcherPolicy"]
