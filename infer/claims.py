"""What saved responses depend on, so that they are never gone on with, or overwritten, by another recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from switchgen.api import is_share
from switchgen.assembly import JUDGE, fingerprint, is_own_model, own_candidate, switcher_adapter
from switchgen.config import CandidateConfig
from switchgen.policies.masked import split_name
from switchgen.policies.responses import is_response_policy, parse_response_policy
from switchgen.policies.routers import is_router
from switchgen.policies.routing import ROUTING, ROUTING_POLICIES
from switchgen.rundir import Run
from switchgen.weights import candidate_weights, weights_hash


def response_claim(run: Run, policy: str) -> dict[str, Any]:
    """The settings and the weights behind a policy's responses.

    Weights count by what the files hold: a switcher that was trained anew in the same folder is another switcher.
    """
    weights: dict[str, Any] = {config.name: candidate_weights(config) for config in _writers(run, policy)}
    if split_name(policy)[0] in ("switcher", "untuned", *ROUTING_POLICIES):
        settings = run.recipe.switcher
        base = settings.base or run.recipe.names[-1]
        known = {config.name: config for config in run.recipe.pool}
        weights["switcher base"] = (
            candidate_weights(known[base]) if base in known else weights_hash(base, settings.revision)
        )
    if split_name(policy)[0] in ("switcher", ROUTING):
        weights["switcher"] = weights_hash(switcher_adapter(run))
    judge = run.recipe.router.judge
    if policy == JUDGE and judge is not None and judge not in run.recipe.names:
        weights["judge"] = weights_hash(judge)
    return {"policy": policy, **fingerprint(run, policy), "weights": weights}


def _writers(run: Run, policy: str) -> list[CandidateConfig]:
    if is_own_model(policy) and policy not in run.recipe.names:
        return [own_candidate(run, policy)]
    return [config for config in run.recipe.pool if policy not in run.recipe.names or config.name == policy]


def weights_bytes(run: Run, policy: str) -> int | None:
    """Bytes of the weights that a policy needs, each model once, in its files' dtype; None where they are not here.

    Models of the hub are looked up in the hub's cache; those behind servers are not here.
    """
    recipe = run.recipe
    configs = _needed(run, policy)
    if any(config.engine == "openai" for config in configs):
        return None
    models = [(config.model, config.revision) for config in configs]
    adapters = [config.adapter for config in configs if config.adapter is not None]
    if split_name(policy)[0] in ("switcher", "untuned", *ROUTING_POLICIES):
        base = recipe.switcher.base or recipe.names[-1]
        known = {config.name: (config.model, config.revision) for config in recipe.pool}
        models.append(known.get(base, (base, recipe.switcher.revision)))
    if split_name(policy)[0] in ("switcher", ROUTING):
        adapters.append(recipe.switcher.adapter or str(run.switcher_adapter))
    if policy == JUDGE and recipe.router.judge not in (None, *recipe.names):
        models.append((str(recipe.router.judge), None))
    models += [_name_and_revision(adapter) for adapter in adapters]
    sizes = [_bytes_here(*model) for model in dict.fromkeys(models)]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _name_and_revision(adapter: str) -> tuple[str, str | None]:
    if Path(adapter).is_dir():
        return adapter, None
    name, _, revision = adapter.partition("@")
    return name, revision or None


def _bytes_here(model: str, revision: str | None) -> int | None:
    """Bytes of a model's weights, in a folder or in the hub's cache; None where there are none."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download  # noqa: PLC0415

        try:
            folder = Path(snapshot_download(model, revision=revision, local_files_only=True))
        except (OSError, ValueError):  # not in the cache; no name of the hub
            return None
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) or None


def _needed(run: Run, policy: str) -> list[CandidateConfig]:
    """The candidates that write or are read under a policy."""
    pool = run.recipe.pool
    configs = _writers(run, policy)
    if is_response_policy(policy) and policy not in run.recipe.names:
        named = parse_response_policy(policy, run.recipe.names)
        own = {"best-of": pool[-1:], "refine": [pool[0], pool[-1]]}.get(named.rule, configs)
        chosen = [config for config in pool if config.name in named.names] or own
        scorer = run.recipe.baselines.scorer or run.recipe.names[-1]
        reads = named.rule == "best-of" and run.recipe.baselines.select == "likelihood"
        return [*chosen, *(config for config in pool if reads and config.name == scorer)]
    if is_router(policy) or is_share(policy):
        return [pool[0], pool[-1]]
    return configs
