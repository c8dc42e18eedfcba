"""The methods of a sweep and their operating points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from switchgen.api import is_share
from switchgen.baselines import TURNS, family_of
from switchgen.config import SweepMethod
from switchgen.errors import ConfigError
from switchgen.policies.routers import RULES, is_router
from switchgen.rundir import Run

Kind = Literal["token", "segment", "response"]

# Every knob has about as many values; those of P and H are close together where the base's next word is open.
_SHARES = [0.05, 0.1, 0.3, 0.5, 0.7, 0.9]
_PROBABILITIES = [0.3, 0.4, 0.5, 0.6, 0.7, 0.9]
_ENTROPIES = [0.3, 0.6, 0.8, 1.0, 1.2, 1.6]
_TEMPERATURES = [0.4, 0.7, 1.0, 1.3, 1.6]


@dataclass(frozen=True)
class Point:
    """One operating point: a policy with its γ, at a temperature."""

    method: str
    policy: str
    """As `evaluate` takes it, e.g. `baco-p@0.3`."""
    gamma: float | None
    temperature: float

    @property
    def key(self) -> str:
        """Unique among the points; also the name of its files."""
        return f"{self.policy}-t{self.temperature:g}"


def kind_of(policy: str, names: Sequence[str]) -> Kind:
    """How often a policy chooses: for every token, every segment, or once for the whole response."""
    if is_router(policy):
        return "token"
    return "segment" if family_of(policy, names) == TURNS else "response"


def default_methods(names: Sequence[str]) -> list[SweepMethod]:
    """Both models over temperatures, the baselines, and all routers but the judge.

    That is what needs neither training nor another model; `sweep.also` has room for the rest.
    """
    methods = [SweepMethod(policy=name, temperatures=_TEMPERATURES) for name in dict.fromkeys((names[0], names[-1]))]
    methods += [SweepMethod(policy=policy, gammas=_SHARES) for policy in ("average", "segment-rand", "response-rand")]
    methods.append(SweepMethod(policy="nudging", gammas=_PROBABILITIES))
    methods.append(SweepMethod(policy="random"))
    for rule, (logit_rule, _) in RULES.items():
        if logit_rule == "rand":
            methods.append(SweepMethod(policy=rule, gammas=_SHARES))
        elif rule.startswith("baco-") and logit_rule != "judge":
            gammas = {"p": _PROBABILITIES, "h": _ENTROPIES}.get(logit_rule or "", [])
            methods.append(SweepMethod(policy=rule, gammas=gammas))
    return methods


def points_of(run: Run) -> list[Point]:
    """Every operating point of the recipe's sweep, method by method.

    Raises:
        ConfigError: a method's policy does not exist, γ is missing or has no meaning, or two methods share a name or a
            point.
    """
    recipe = run.recipe
    points: list[Point] = []
    methods = [*(recipe.sweep.methods or default_methods(recipe.names)), *recipe.sweep.also]
    names = [method.name or method.policy for method in methods]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"sweep.methods: two methods are called {', '.join(repeated)}; give one another `name`")
    for name, method in zip(names, methods, strict=True):
        policies: list[tuple[str, float | None]]
        if method.gammas:
            if not (is_router(method.policy) or is_share(method.policy)) or "@" in method.policy:
                raise ConfigError(f"sweep.methods: policy {method.policy!r} takes no `gammas`")
            policies = [(f"{method.policy}@{gamma:g}", gamma) for gamma in method.gammas]
        else:
            policies = [(method.policy, None)]
        for temperature in method.temperatures or [recipe.decoding.temperature]:
            points += [Point(name, policy, gamma, temperature) for policy, gamma in policies]
    keys = [point.key for point in points]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise ConfigError(f"sweep.methods: two methods hold the same point: {', '.join(repeated)}")
    return points
