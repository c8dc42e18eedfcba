"""What saved responses depend on, so that they are never gone on with, or overwritten, by another recipe."""

from __future__ import annotations

from typing import Any

from switchgen.assembly import DISTILLED, JUDGE, distilled_candidate, fingerprint, switcher_adapter
from switchgen.config import CandidateConfig
from switchgen.rundir import Run
from switchgen.weights import weights_hash


def response_claim(run: Run, policy: str) -> dict[str, Any]:
    """The settings and the weights behind a policy's responses.

    Weights count by what the files hold: a switcher that was trained anew in the same folder is another switcher.
    """
    weights: dict[str, Any] = {config.name: _weights_of(config) for config in _writers(run, policy)}
    if policy in ("switcher", "untuned"):
        settings = run.recipe.switcher
        base = settings.base or run.recipe.names[-1]
        known = {config.name: config for config in run.recipe.pool}
        weights["switcher base"] = _weights_of(known[base]) if base in known else weights_hash(base, settings.revision)
    if policy == "switcher":
        weights["switcher"] = weights_hash(switcher_adapter(run))
    judge = run.recipe.router.judge
    if policy == JUDGE and judge is not None and judge not in run.recipe.names:
        weights["judge"] = weights_hash(judge)
    return {"policy": policy, **fingerprint(run, policy), "weights": weights}


def _writers(run: Run, policy: str) -> list[CandidateConfig]:
    if policy == DISTILLED:
        return [distilled_candidate(run)]
    return [config for config in run.recipe.pool if policy not in run.recipe.names or config.name == policy]


def _weights_of(config: CandidateConfig) -> str | list[str]:
    model = weights_hash(config.model, config.revision)
    return model if config.adapter is None else [model, weights_hash(config.adapter)]
