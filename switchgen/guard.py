"""A guard: which candidates may write the response to which prompts (`policy.guard`).

A prompt's class comes from patterns, or from a function of yours; a class has the candidates that may write. Prompts
without a class are everybody's.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from switchgen.config import GuardConfig
from switchgen.errors import ConfigError
from switchgen.policies.masked import Mask
from switchgen.rows import Row

Messages = Sequence[Mapping[str, str]]
Classify = Callable[[Messages], str | None]

_REMEMBERED = 4096
"""Conversations whose class is kept: more than are ever in flight."""


def guard_mask(config: GuardConfig, names: Sequence[str]) -> Mask:
    """The mask of a recipe's guard.

    Args:
        names: the pool's candidates.

    Raises:
        ConfigError: the function cannot be imported; when a prompt is classified, that it returned no known class.
    """
    classify = _patterns(config.patterns) if config.classify is None else _imported(config.classify)
    allowed = {kind: frozenset(map(names.index, members)) for kind, members in config.allow.items()}

    # A row asks again before every segment. The conversation as a whole is what is remembered, not its text, which
    # another conversation may have, too; a server must not remember all of them.
    @lru_cache(maxsize=_REMEMBERED)
    def kind_of(conversation: tuple[tuple[tuple[str, str], ...], ...]) -> str | None:
        return classify([dict(message) for message in conversation])

    def mask(row: Row) -> frozenset[int] | None:
        query = row.trace.query
        kind = kind_of(tuple(tuple(message.items()) for message in query.messages))
        if kind is not None and kind not in allowed:
            raise ConfigError(
                f"policy.guard.classify: {config.classify} returned {kind!r} for query {query.id!r}; allowed: "
                f"None, {', '.join(allowed)}"
            )
        return None if kind is None else allowed[kind]

    return mask


def _patterns(patterns: Mapping[str, Sequence[str]]) -> Classify:
    """The first class one of whose patterns is found in the last message."""
    compiled = {kind: [re.compile(text, re.IGNORECASE) for text in texts] for kind, texts in patterns.items()}

    def classify(messages: Messages) -> str | None:
        text = messages[-1]["content"]
        return next((kind for kind, found in compiled.items() if any(one.search(text) for one in found)), None)

    return classify


def _imported(place: str) -> Classify:
    module, _, name = place.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"policy.guard.classify: {place!r} cannot be imported: {error}") from None
    if not callable(function):
        raise ConfigError(f"policy.guard.classify: {place!r} is no function")
    return function  # type: ignore[no-any-return]
