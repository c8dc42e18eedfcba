"""A pool under a policy as a model of lm-evaluation-harness; needs the extra `lm-eval`.

`switchgen lm-eval` uses it. The harness's own command finds it by name where the release looks for plug-ins
(entry-point group `lm_eval.models`), and in any release through this module, which registers it first:

    python -m infer.harness_model run --model switchgen --model_args recipe=lab,policy=switcher --tasks …

A task's context is the query: candidates read it as their prompts say (a chat template, a plain template). With the
prompt `{query}{trace}` a candidate reads what the harness's own `hf` model reads.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from switchgen.api import make_loop, response_seed
from switchgen.assembly import Writer, load_writers
from switchgen.config import DecodingConfig
from switchgen.errors import ConfigError, DataError
from switchgen.mixture import Mixture, shortened
from switchgen.policies.fixed import FixedPolicy
from switchgen.policies.masked import fits
from switchgen.policies.responses import ResponsePolicy
from switchgen.policies.routers import RouterPolicy
from switchgen.rows import Row
from switchgen.rundir import Run, open_run
from switchgen.segmentation import SegmentRule
from switchgen.trace import Query, Segment

logger = logging.getLogger("switchgen")

_MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_DEFAULT_TOKENS = 256  # the harness's own


@register_model("switchgen")
class SwitchgenLM(LM):  # type: ignore[misc]
    """What a pool and a policy write, and how likely they find given texts.

    Args:
        recipe: a YAML file or a shipped recipe's name.
        policy: default: `infer.policy`.
        run_dir: default: runs/<recipe name>.
        mc: writer sequences from which texts beyond one segment are estimated; default: they are refused.
        seed: run seed; default: `infer.seed`.
        overrides: settings of the recipe; in --model_args separated by `;`.
        run: an opened run, instead of a recipe.
        batch_size, max_batch_size, device: what the harness's command passes on; the recipe's `engine` decides.
    """

    def __init__(
        self,
        recipe: str | None = None,
        policy: str | None = None,
        run_dir: str | None = None,
        mc: int | str | None = None,
        seed: int | str | None = None,
        overrides: Sequence[str] | str = (),
        *,
        run: Run | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        if run is None:
            if recipe is None:
                raise ConfigError("model switchgen: model_args needs a recipe, e.g. recipe=lab,policy=switcher")
            settings = overrides.split(";") if isinstance(overrides, str) else list(overrides)
            run = open_run(recipe, [setting for setting in settings if setting], run_dir)
        self.run = run
        self.policy = policy or run.recipe.infer.policy
        self.samples = None if mc is None else int(mc)
        self.seed = run.recipe.infer.seed if seed is None else int(seed)
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"mc: {self.samples} samples; allowed: at least 1")
        self.writer: Writer = load_writers(run, [self.policy])[self.policy]

    @property
    def tokenizer_name(self) -> str:
        """For the harness's request cache: the pool, the policy, the seed."""
        return "--".join(["switchgen", *self.writer.pool.names, self.policy, str(self.seed)])

    # -- likelihood -----------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(Σ_i p_i P_i of the continuation, in nats; whether it is the greedy one) of each request.

        Spaces at a context's end go to the continuation, and contexts beyond a model's are read from their end, both as
        in the harness's own models.
        """
        pairs = []
        for number, request in enumerate(requests):
            context, continuation = request.args
            bare = context.rstrip()
            pairs.append((Query.from_text(bare, id=str(number)), context[len(bare) :] + continuation))
        mixture = Mixture(
            self.writer.pool, self.writer.policy, self.run.recipe.decoding, samples=self.samples, seed=self.seed,
            truncate=True,
        )  # fmt: skip
        answers = [(found.log_prob, found.is_greedy) for found in mixture.score(pairs)]
        _warn_of_truncated(len(mixture.truncated), len(pairs))
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts without a prompt, in windows of the context; one candidate's only."""
        policy = self.writer.policy
        if not isinstance(policy, FixedPolicy):
            raise ConfigError(
                f"policy {self.policy!r}: the likelihood of whole documents is that of one candidate; allowed: "
                f"{', '.join(self.writer.pool.names)}"
            )
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # noqa: PLC0415

        from switchgen.likelihood import likelihoods  # noqa: PLC0415

        candidate = self.writer.pool.candidates[policy.writer]
        tokenizer = candidate.vocabulary.tokenizer
        prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=candidate.vocabulary.encode_text(text, opens=True), prefix_token=prefix,
                max_seq_len=candidate.engine.max_positions, context_len=1,
            )  # fmt: skip
            found = likelihoods(candidate, [make_disjoint_window(window) for window in windows])
            known = [one.log_prob for one in found if one is not None]
            assert len(known) == len(found), "a window is as long as the context at most"
            totals.append(sum(known))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    # -- writing --------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the policy writes, up to the first stop string, which is not part of it.

        Greedy unless the task samples (`do_sample`, a temperature above 0); writers are drawn by the policy as always.
        A context that with the tokens to be written is beyond a model's is read from its end, as in the harness's own
        models (and then up to 3 tokens fewer are written: room for the end of a character).
        """
        asks = [self._ask(str(index), request.args[0], _settings(request.args[1]))
                for index, request in enumerate(requests)]  # fmt: skip
        _warn_of_truncated(sum(ask.is_truncated for ask in asks), len(asks))
        groups: dict[_Settings, list[_Ask]] = {}
        for ask in asks:
            groups.setdefault(ask.settings, []).append(ask)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="switchgen") as bar:
            for settings, own in groups.items():
                decoding = self._decoding(settings)
                if decoding.last is not None and settings.max_tokens <= decoding.segment.tokens:
                    raise DataError(
                        f"lm-eval: a task asks for {settings.max_tokens} new tokens; decoding.last reserves one "
                        f"segment of {decoding.segment.tokens} of them"
                    )
                loop = make_loop(
                    self.writer.pool, self.writer.policy, decoding, max_rows=self.run.recipe.engine.max_rows
                )
                for row in loop.run(ask.row for ask in own):
                    if row.trace.finish == "too_long":
                        logger.warning("lm-eval: a request is beyond the context of a model that reads it; no answer")
                    texts[int(row.trace.query.id)] = row.trace.text
                    bar.update()
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return [texts[index] for index in range(len(requests))]

    def _decoding(self, settings: _Settings) -> DecodingConfig:
        """The recipe's decoding settings with a request's."""
        changes = {
            "stop": list(settings.until), "max_new_tokens": settings.max_tokens,
            "temperature": settings.temperature, "top_p": settings.top_p,
        }  # fmt: skip
        return self.writer.decoding(self.run.recipe.decoding).model_copy(update=changes)

    def _ask(self, id: str, context: str, settings: _Settings) -> _Ask:
        """A request as a row that everyone who reads it has room for, and the room that is left to write.

        Raises:
            DataError: a candidate's context has no room for the tokens that the request asks for.
        """
        pool, query = self.writer.pool, Query.from_text(context, id=id)
        extra = SegmentRule(whole_words=len(pool.vocabularies) > 1).max_extra
        prompts: dict[int, list[int]] = {}
        cut = tight = False
        for place, candidate in enumerate(pool):
            ids, room = candidate.prompt_ids(query), candidate.engine.max_positions - settings.max_tokens
            if room < 1:
                raise DataError(
                    f"lm-eval: a task asks for {settings.max_tokens} new tokens; {candidate.name!r} has a context of "
                    f"{candidate.engine.max_positions}"
                )
            prompts[place] = ids[-room:]
            cut = cut or len(ids) > room
            tight = tight or len(ids) > room - extra
        if not self._has_room(query, prompts, settings):
            query = shortened(query, lambda shorter: self._has_room(shorter, prompts, settings))
            cut = True
        row = Row(pool, query, response_seed(self.seed, id), prompts=prompts)
        return _Ask(row, replace(settings, max_tokens=max(1, settings.max_tokens - extra)) if tight else settings, cut)

    def _has_room(self, query: Query, prompts: dict[int, list[int]], settings: _Settings) -> bool:
        """Whether who reads the query's text rather than these tokens can read a whole response with it."""
        pool, policy = self.writer.pool, self.writer.policy
        if isinstance(policy, RouterPolicy):
            return True
        if isinstance(policy, ResponsePolicy):
            rooms = [candidate.engine.max_positions - settings.max_tokens for candidate in pool]
            return all(len(one.prompt_ids(query)) <= room for one, room in zip(pool, rooms, strict=True))
        row = Row(pool, query, 0, prompts=prompts)
        segment = self.run.recipe.decoding.segment.tokens
        # As many tokens as a response may have: of the prompt, since nothing is written yet.
        for _ in range(-(-settings.max_tokens // segment)):
            ids = tuple(prompts[0][-segment:])
            row.append(Segment(0, pool.candidates[0].vocabulary.decode(ids), ids, "length"))
        return fits(policy, row)


@dataclass(frozen=True)
class _Settings:
    """A request's generation settings."""

    until: tuple[str, ...]
    """Strings that end the response."""
    max_tokens: int
    temperature: float
    top_p: float


@dataclass(frozen=True)
class _Ask:
    """A request to write."""

    row: Row
    settings: _Settings
    is_truncated: bool
    """Whether somebody reads the context's end only."""


def _settings(given: dict[str, Any]) -> _Settings:
    """A request's settings.

    Raises:
        ConfigError: one that we have not.
    """
    known = {"until", "do_sample", "temperature", "top_p", *_MAX_TOKENS_KEYS}
    beams = int(given.get("num_beams") or 1)
    if beams > 1:
        raise ConfigError(f"lm-eval: generation setting num_beams: {beams}; allowed: 1, there is no beam search")
    if unknown := sorted(set(given) - known - {"num_beams"}):
        raise ConfigError(f"lm-eval: generation settings {', '.join(unknown)}: allowed are {', '.join(sorted(known))}")
    until = given.get("until") or []
    tokens = next((given[key] for key in _MAX_TOKENS_KEYS if given.get(key)), _DEFAULT_TOKENS)
    samples = given.get("do_sample", bool(given.get("temperature")))
    temperature = float(given.get("temperature") or 1.0) if samples else 0.0
    stops = (until,) if isinstance(until, str) else tuple(until)
    return _Settings(tuple(stop for stop in stops if stop), int(tokens), temperature, float(given.get("top_p") or 1.0))


def _warn_of_truncated(truncated: int, requests: int) -> None:
    if truncated:
        logger.warning(
            "lm-eval: %d of %d requests are beyond the context of a model that reads them, which reads their end only, "
            "as the harness's own models do",
            truncated, requests,
        )  # fmt: skip


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
