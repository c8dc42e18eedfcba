"""From a run's recipe to things that write: pool, switcher, policies by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from switchgen.api import AnyLoop, AnyPolicy, check_policy, make_loop, make_policy
from switchgen.candidates import Pool, Switcher, check_trained_for
from switchgen.config import CandidateConfig, DecodingConfig, Recipe, nearest
from switchgen.errors import ConfigError
from switchgen.guard import guard_mask
from switchgen.ids import content_hash
from switchgen.loading import check_adapter, check_model
from switchgen.merges import check_merge, is_merge, is_merged, merged_candidate, merged_folder
from switchgen.models import ModelStore
from switchgen.policies.fixed import decoding_under
from switchgen.policies.judge import load_judge
from switchgen.policies.masked import MaskedPolicy, leave_out, split_name
from switchgen.policies.probe import Probe, ProbePolicy, check_probe
from switchgen.policies.responses import ResponsePolicy, is_response_policy
from switchgen.policies.routers import JUDGE, RULES, RouterPolicy, function_words, is_router, parse_router
from switchgen.policies.routing import PROMPTED, ROUTING, ROUTING_POLICIES
from switchgen.rows import Row
from switchgen.rundir import Run

logger = logging.getLogger("switchgen")

DISTILLED = "distilled"


@dataclass
class Writer:
    """A policy and the pool it works on."""

    name: str
    pool: Pool
    policy: AnyPolicy

    def loop(self, run: Run) -> AnyLoop:
        """A loop with the recipe's decoding settings."""
        return make_loop(self.pool, self.policy, run.recipe.decoding, max_rows=run.recipe.engine.max_rows)

    def decoding(self, settings: DecodingConfig) -> DecodingConfig:
        """The recipe's decoding settings, as far as they are about this policy."""
        return decoding_under(self.policy, settings)


def check_writers(run: Run, names: Sequence[str]) -> None:
    """See that policies can work, before any model is loaded.

    Raises:
        ConfigError, ModelError: an unknown policy, a pool too small or too large, a missing model or switcher.
    """
    for name in names:
        if name == DISTILLED:
            if not (run.dir / DISTILLED).is_dir():
                raise ConfigError(
                    f"policy 'distilled': no student in {run.dir / DISTILLED}; run `switchgen distill` first"
                )
            continue
        if is_merge(name) and name not in run.recipe.names:
            check_merge(name, run.recipe.names)
            if not is_merged(run, name):
                raise ConfigError(
                    f"policy {name!r}: no such model in {merged_folder(run, name)}, or one of other candidates; run "
                    f"`switchgen merge` with {name} first"
                )
            continue
        if name not in run.recipe.names:
            check_policy(name, run.recipe.names, run.recipe.router)
        if run.recipe.switcher.kind == "probe" and split_name(name)[0] in ("untuned", *ROUTING_POLICIES):
            own = "is the switcher's model without its adapter" if name == "untuned" else "asks the switcher's model"
            raise ConfigError(
                f"policy {name!r} {own}; a probe (switcher.kind) has no model of its own; allowed beside it: "
                "switcher, random, the candidates"
            )
        if split_name(name)[0] in ("switcher", ROUTING):
            check = check_probe if run.recipe.switcher.kind == "probe" else check_adapter
            check(switcher_adapter(run))
    if any(not is_own_model(name) for name in names):
        for config in needed_candidates(run, names):
            check_model(config)


def needed_candidates(run: Run, names: Sequence[str]) -> list[CandidateConfig]:
    """The whole pool, whoever writes: candidates share their vocabularies and places on the ladder."""
    return list(run.recipe.pool)


def switcher_adapter(run: Run) -> str:
    """The recipe's switcher adapter, or the one that `train` left in the run folder.

    Raises:
        ConfigError: neither is there.
    """
    adapter = run.recipe.switcher.adapter
    if adapter is not None:
        return adapter
    if not run.switcher_adapter.is_dir():
        raise ConfigError(
            f"policies switcher and routing: no switcher in {run.switcher_adapter}; run `switchgen train` first, or "
            "set switcher.adapter"
        )
    return str(run.switcher_adapter)


def load_writers(run: Run, names: Sequence[str]) -> dict[str, Writer]:
    """Load the pool once and make each policy.

    Raises:
        ConfigError, ModelError: see `check_writers`.
    """
    check_writers(run, names)
    set_threads(run)
    writers: dict[str, Writer] = {}
    pool: Pool | None = None
    for name in names:
        if is_own_model(name) and name not in run.recipe.names:
            config = own_candidate(run, name)
            models = ModelStore(compiled=run.recipe.engine.compile)
            student = Pool.load([config], max_slots=_slots(run), models=models)
            writers[name] = Writer(name, student, make_policy(config.name, student))
            continue
        if pool is None:
            pool = Pool.from_recipe(run.recipe)
        writers[name] = Writer(name, pool, make_run_policy(run, name, pool))
    return writers


def is_own_model(name: str) -> bool:
    """Whether a policy is one model that the run itself has made: the student, or a merged model."""
    return name == DISTILLED or is_merge(name)


def own_candidate(run: Run, name: str) -> CandidateConfig:
    """The run's own model of that name as a candidate."""
    return distilled_candidate(run) if name == DISTILLED else merged_candidate(run, name)


def make_run_policy(run: Run, name: str, pool: Pool) -> AnyPolicy:
    """A policy by name for a loaded pool, its switcher model loaded if it needs one."""
    settings = run.recipe.switcher
    switcher: Switcher | None = None
    rule, barred = split_name(name)
    if rule in ("switcher", "untuned", *ROUTING_POLICIES):
        adapter = switcher_adapter(run) if rule in ("switcher", ROUTING) else None
        if adapter is not None and settings.kind == "probe":
            check_trained_for(adapter, pool.names, settings)
            host = pool.index(settings.base or pool.names[-1])
            probe = Probe.load(adapter)
            probed = ProbePolicy(pool, host, probe, temperature=settings.temperature, top_p=settings.top_p)
            left = leave_out(probed, name, frozenset(map(pool.index, barred)), len(pool)) if barred else probed
            return guarded(left, run.recipe, pool)
        # Who was not trained has to be told in words what to do, which the compact format does not.
        shown = settings.format if adapter is not None else "released"
        asked = settings.model_copy(update={"adapter": adapter, "format": shown})
        switcher = pool.load_switcher(asked, max_slots=_slots(run))
    router = run.recipe.router
    judge = load_judge(pool, router, max_slots=_slots(run)) if name == JUDGE else None
    policy = make_policy(
        name, pool, switcher=switcher, temperature=settings.temperature, top_p=settings.top_p,
        router=router, judge=judge, baselines=run.recipe.baselines,
    )  # fmt: skip
    return guarded(policy, run.recipe, pool)


def guarded(policy: AnyPolicy, recipe: Recipe, pool: Pool) -> AnyPolicy:
    """The policy under the recipe's guard; a single candidate is what it is.

    Raises:
        ConfigError: the policy chooses no segments' writers.
    """
    guard = recipe.policy.guard
    if guard is None or policy.name in pool.names:
        return policy
    if isinstance(policy, RouterPolicy | ResponsePolicy):
        raise ConfigError(
            f"policy {policy.name!r}: policy.guard bars writers of segments, and this policy chooses none; allowed "
            "with it: random, switcher, untuned, routing, and candidates' names"
        )
    mask = guard_mask(guard, pool.names)
    if not isinstance(policy, MaskedPolicy):
        return MaskedPolicy(policy, mask)
    own, left = policy.mask, frozenset(range(len(pool))) - policy.barred

    def both(row: Row) -> frozenset[int] | None:
        allowed = mask(row)
        # Where the guard allows nobody who is left, it is the guard that counts.
        return own(row) if allowed is None else (allowed & left or allowed)

    return MaskedPolicy(policy.inner, both, name=policy.name)


def distilled_candidate(run: Run) -> CandidateConfig:
    """The student as a candidate: the distill base's settings with the student's weights or adapter."""
    folder = run.dir / DISTILLED
    base_name = run.recipe.distill.base or run.recipe.names[-1]
    base = next(config for config in run.recipe.pool if config.name == base_name)
    if (folder / "adapter_config.json").is_file():
        return base.model_copy(update={"adapter": str(folder), "name": "student"})
    return base.model_copy(update={"model": str(folder), "adapter": None, "name": "student"})


def fingerprint(run: Run, policy: str) -> dict[str, str]:
    """What the responses of a policy depend on: pool, decoding, switcher or router settings."""
    recipe = run.recipe
    alone = policy in recipe.names or is_own_model(policy)
    decoding = recipe.decoding.alone() if alone else recipe.decoding
    parts = {
        "pool": content_hash(recipe.model_dump(mode="json")["pool"]),
        "decoding": content_hash(decoding.model_dump(mode="json")),
    }
    rule = split_name(policy)[0]
    if recipe.policy.guard is not None and not alone:
        parts["guard"] = content_hash(recipe.policy.guard.model_dump(mode="json"))
    if rule in ("switcher", "untuned", *ROUTING_POLICIES):
        parts["switcher"] = content_hash(recipe.switcher.model_dump(mode="json"))
    if rule == PROMPTED:
        parts["descriptions"] = content_hash(recipe.baselines.descriptions)
    if is_response_policy(policy):
        settings = recipe.baselines.model_dump(mode="json", include={"select", "scorer", "reward_model", "refine"})
        parts["baselines"] = content_hash(settings)
    if is_router(policy):
        router = parse_router(policy, recipe.router.gamma)
        content_rule = RULES[router.rule][1]
        # Only what the name leaves open and the defaults do not settle, so that older responses keep their claims.
        if router.gamma is not None and "@" not in policy:
            parts["gamma"] = str(router.gamma)
        if content_rule is not None and router.predictor is None and recipe.router.predictor != "aligned":
            parts["predictor"] = recipe.router.predictor
        if content_rule == "fc" and recipe.router.function_words is not None:
            parts["function_words"] = content_hash(sorted(function_words(recipe.router.function_words)))
        if policy == JUDGE:
            parts["judge"] = recipe.router.judge or recipe.names[-1]
    return parts


def _slots(run: Run) -> int:
    return run.recipe.engine.kv_budget or 2 * run.recipe.engine.max_rows


def set_threads(run: Run) -> None:
    """Torch threads as the recipe says."""
    if run.recipe.engine.threads is not None:
        import torch  # noqa: PLC0415

        torch.set_num_threads(run.recipe.engine.threads)


def policy_hint(name: str, names: Sequence[str]) -> str:
    """Nearest spelling among policies and candidates."""
    return nearest(name, [*names, "switcher", "untuned", "random", DISTILLED])


def spread(counts: int, tasks: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Share a number of questions evenly over tasks, earlier ones first where it does not divide."""
    base, extra = divmod(counts, len(tasks))
    for index, task in enumerate(tasks):
        yield task, base + (index < extra)
