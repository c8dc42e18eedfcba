"""The ways to combine candidates that a table of baselines holds, by family (docs/baselines.md)."""

from __future__ import annotations

from collections.abc import Sequence

TURNS = "Taking turns"
FAMILIES: dict[str, tuple[str, ...]] = {
    TURNS: ("random", "untuned", "switcher"),
    "Taking turns token by token": ("baco-p@0.5", "baco-h@1", "baco-punc", "nudging@0.3"),
    "Routing": ("prompted-routing", "routing", "cascade@0.8"),
    "Several responses": ("best-of@3", "majority@3", "refine"),
    "Mixed logits": ("average@0.5", "contrast@0.5"),
    "Merged weights": ("soup", "greedy-soup", "dare-ties@0.5", "expo@0.3"),
}
"""Family → policies that `evaluate.baselines` adds."""

_RULES = {
    TURNS: ("random", "untuned", "switcher", "segment-rand"),
    "Taking turns token by token": ("baco", "nudging"),
    "Routing": ("prompted-routing", "routing", "cascade", "response-rand"),
    "Several responses": ("best-of", "majority", "refine"),
    "Mixed logits": ("average", "contrast"),
    "Merged weights": ("soup", "greedy-soup", "dare-ties", "expo"),
    "One model again": ("distilled",),
}
ALONE = "One candidate alone"
OTHER = "Other ways to combine"


def family_of(policy: str, candidates: Sequence[str]) -> str:
    """The family of a policy, for tables."""
    if policy in candidates:
        return ALONE
    rule = policy.partition("@")[0].partition("+")[0].partition("~")[0]
    for family, rules in _RULES.items():
        if rule in rules or (rule.startswith("baco-") and "baco" in rules):
            return family
    return OTHER


def all_policies(candidates: Sequence[str], listed: Sequence[str]) -> list[str]:
    """Every candidate alone, what the recipe lists, and every baseline; family by family, none twice."""
    policies = dict.fromkeys([*candidates, *listed, *(policy for own in FAMILIES.values() for policy in own)])
    families = [ALONE, *_RULES, OTHER]
    return sorted(policies, key=lambda policy: families.index(family_of(policy, candidates)))
