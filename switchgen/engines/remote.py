"""A candidate behind OpenAI-compatible servers (vLLM, SGLang, anything with /v1/completions).

The servers keep their own caches (prefix caching makes a row's next segment cheap); what goes over the wire is the
row's whole context and comes back as text, which is tokenized here. Segments end by the same rules as in process: a few
tokens more are asked for, and what lies behind the segment's end is dropped. Requests of all rows, and of all remote
candidates whose turn it is, are in flight together.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import cached_property
from itertools import chain
from threading import Event
from typing import Any, NoReturn

import torch

from switchgen.engines.base import Context, EngineStats, WriteItem, Written
from switchgen.engines.replicas import Refused, Replicas
from switchgen.engines.scoring import TokenScore
from switchgen.engines.writing import Pen, advance
from switchgen.errors import ConfigError, ServerError
from switchgen.ids import derive_seed
from switchgen.sampling import SamplingParams
from switchgen.segmentation import SegmentRule
from switchgen.vocabulary import Vocabulary

logger = logging.getLogger("switchgen")

_FINISHED = ("stop", "length")
"""How an answer ends that is whole: at its end of text, or at its length. Others were broken off (abort, …)."""


class RemoteEngine:
    """Engine over servers; same contract as `SlotEngine`, as far as segments go.

    Args:
        vocabulary: the served model's tokenizer.
        model: what the servers call the model.
        in_flight: requests at a time.
        takes_tokens: whether prompts are sent as token ids; None tries it once and goes on with text if it is refused.
    """

    def __init__(
        self,
        name: str,
        vocabulary: Vocabulary,
        replicas: Replicas,
        *,
        model: str,
        stop_ids: frozenset[int],
        max_positions: int,
        hidden_size: int,
        in_flight: int,
        takes_tokens: bool | None = None,
    ) -> None:
        self.name = name
        self.vocabulary = vocabulary
        self.stop_ids = stop_ids
        self.max_positions = max_positions
        self.hidden_size = hidden_size
        self.max_slots = in_flight
        self.stats = EngineStats()
        self.banned_ids = torch.empty(0, dtype=torch.long)
        self.takes_tokens = takes_tokens
        self._model = model
        self._replicas = replicas
        self._threads = ThreadPoolExecutor(in_flight, thread_name_prefix=f"switchgen-{name}")

    # -- the engine's contract ------------------------------------------------------------------------------------

    def write(
        self, items: Sequence[WriteItem], params: SamplingParams, rule: SegmentRule, stop: Sequence[bytes] = ()
    ) -> list[Written]:
        """Write one segment per item, all requests in flight together.

        Raises:
            ServerError: no server answers a request, or one refuses it.
        """
        return write_remotely([(self, items)], params, rule, stop)[0]

    def send(
        self, items: Sequence[WriteItem], params: SamplingParams, rule: SegmentRule, given_up: Event
    ) -> list[Future[Any]]:
        """Ask for the items' segments; the answers are to be collected.

        Args:
            given_up: set once nobody waits for them any more.
        """
        if items and self.takes_tokens is None:
            # The first request shows what the servers take; the others follow it.
            first: Future[Any] = Future()
            first.set_result(self._ask(items[0], params, rule, given_up))
            return [first, *self.send(items[1:], params, rule, given_up)]
        return [self._threads.submit(self._ask, item, params, rule, given_up) for item in items]

    def collect(
        self, items: Sequence[WriteItem], answers: Sequence[Future[Any]], rule: SegmentRule, stop: Sequence[bytes]
    ) -> list[Written]:
        """The segments, cut where they end, appended to their contexts."""
        choices = [answer.result() for answer in answers]
        self.stats.steps += 1
        return [self._take(item, choice, rule, stop) for item, choice in zip(items, choices, strict=True)]

    def begin(self, contexts: Sequence[Context]) -> NoReturn:
        """Not over the wire.

        Raises:
            ConfigError: always.
        """
        raise self._lacks("token by token (token routers)")

    def label_logits(self, contexts: Sequence[Context], suffix: Sequence[int], labels: Sequence[int]) -> NoReturn:
        """Not over the wire.

        Raises:
            ConfigError: always.
        """
        raise self._lacks("as a switcher or judge")

    def hidden(self, contexts: Sequence[Context]) -> NoReturn:
        """Not over the wire.

        Raises:
            ConfigError: always.
        """
        raise self._lacks("under a probe")

    def token_scores(self, ids: Sequence[int], first: int, num_top: int) -> list[TokenScore]:
        """Not over the wire.

        Raises:
            ConfigError: always.
        """
        raise self._lacks("for log-probabilities")

    def _lacks(self, what: str) -> ConfigError:
        return ConfigError(f"{self.name}: engine openai writes segments; it cannot be used {what}: that needs the "
                           "model in this process (engine: transformers)")  # fmt: skip

    def release(self, context: Context) -> None:
        """Servers see for themselves what they keep."""

    def clear(self) -> None:
        """Servers see for themselves what they keep."""

    # -- one request ----------------------------------------------------------------------------------------------

    def _ask(self, item: WriteItem, params: SamplingParams, rule: SegmentRule, given_up: Event) -> dict[str, Any]:
        """The server's choice for one item; asked for again where the server broke it off."""
        body: dict[str, Any] = {
            "model": self._model,
            "max_tokens": item.max_tokens + rule.max_extra,
            "temperature": params.temperature,
            "top_p": params.top_p,
            # The same row draws the same text again, as far as the server's sampling allows it.
            "seed": derive_seed(item.seed, item.token_index) & 0x7FFFFFFF,
        }
        for _ in range(self._replicas.retries + 1):
            answer = self._post(body, item.context.ids, given_up)
            try:
                choice: dict[str, Any] = answer["choices"][0]
                assert isinstance(choice["text"], str)
            except (KeyError, IndexError, TypeError, AssertionError):
                raise ServerError(f"{self.name}: an answer without choices[0].text: {str(answer)[:200]}") from None
            if choice.get("finish_reason") in _FINISHED:
                return choice
        raise ServerError(
            f"{self.name}: a server ended an answer with finish_reason {choice.get('finish_reason')!r}, "
            f"{self._replicas.retries + 1} times; allowed: {', '.join(_FINISHED)}"
        )

    def _post(self, body: dict[str, Any], ids: Sequence[int], given_up: Event) -> dict[str, Any]:
        """A server's answer; the prompt as tokens or as text."""
        if self.takes_tokens is not False:
            try:
                answer = self._replicas.post("completions", {**body, "prompt": list(ids)}, given_up)
            except Refused as error:
                if self.takes_tokens:
                    raise
                logger.info("%s: the servers take no token ids (%s); prompts are sent as text", self.name, error)
                self.takes_tokens = False
            else:
                self.takes_tokens = True
                return answer
        return self._replicas.post("completions", {**body, "prompt": self.as_text(ids)}, given_up)

    def _take(self, item: WriteItem, choice: dict[str, Any], rule: SegmentRule, stop: Sequence[bytes]) -> Written:
        # JSON may hold half a surrogate pair, which is no text.
        text = str(choice["text"]).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ended = choice["finish_reason"] == "stop"
        if not ended:
            # The server's tokens may end inside a character.
            text = text.rstrip("\ufffd")
        pen = Pen(item)
        ids = self.vocabulary.encode_text(text)
        self.stats.decoded_tokens += len(ids)
        for token in ids:
            written = advance(pen, token, rule, stop, self.vocabulary, self.stop_ids)
            if written is not None:
                return written
        # An answer without text does not move the row on, and would be the same again.
        return Written(pen.ids, "eos" if ended or not pen.ids else "length")

    # -- prompts as text ------------------------------------------------------------------------------------------

    def as_text(self, ids: Sequence[int]) -> str:
        """A context as the text that the server's tokenizer turns into it again.

        Control tokens are written as such. Where other text reads like one, a space is put into it: as text there is no
        other way to tell them apart. A start token that the tokenizer itself puts first is left to it.
        """
        parts: list[str] = []
        run: list[int] = []
        start = len(self._start_ids) if list(ids[: len(self._start_ids)]) == self._start_ids else 0
        for token in [*ids[start:], -1]:
            if token >= 0 and token not in self.vocabulary.control_ids:
                run.append(token)
                continue
            parts.append(self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", self.vocabulary.decode(run)))
            run = []
            if token >= 0:
                parts.append(str(self.vocabulary.tokenizer.convert_ids_to_tokens(token)))
        return "".join(parts)

    @cached_property
    def _start_ids(self) -> list[int]:
        from switchgen.prompts import start_ids  # noqa: PLC0415

        return start_ids(self.vocabulary)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        names = [str(self.vocabulary.tokenizer.convert_ids_to_tokens(token)) for token in self.vocabulary.control_ids]
        return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")


def write_remotely(
    parts: Sequence[tuple[RemoteEngine, Sequence[WriteItem]]],
    params: SamplingParams,
    rule: SegmentRule,
    stop: Sequence[bytes] = (),
) -> list[list[Written]]:
    """Segments of several remote candidates, all their requests in flight together; in the parts' order."""
    sent: list[list[Future[Any]]] = []
    given_up = Event()
    try:
        for engine, items in parts:
            sent.append(engine.send(items, params, rule, given_up))
        for answer in wait(chain.from_iterable(sent), return_when=FIRST_EXCEPTION).done:
            answer.result()
        return [
            engine.collect(items, answers, rule, stop) for (engine, items), answers in zip(parts, sent, strict=True)
        ]
    finally:
        # Where one was given up, the others need not be asked for any more. The process waits for its threads: they
        # must not send the same requests again and again.
        given_up.set()
        for answer in chain.from_iterable(sent):
            answer.cancel()
