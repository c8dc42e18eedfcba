"""Batches that do not fit in memory: halved, and tried again."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import torch

from switchgen.engines.base import Context
from switchgen.errors import ModelError

logger = logging.getLogger("switchgen")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Fitted(Protocol):
    """An engine whose rows can be made fewer."""

    name: str
    max_slots: int
    halved: bool
    """Whether they have been."""

    def clear(self) -> None:
        """Forget all contexts and give the caches' memory back."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on a GPU, in torch on CPU, or in numpy."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def in_batches(
    engine: Fitted, items: Sequence[Item], contexts: Sequence[Context], work: Callable[[Sequence[Item]], list[Result]]
) -> list[Result]:
    """Work through items, at most `engine.max_slots` at a time, and half as many when they do not fit.

    What a failed batch had written is taken back: it is written again, and comes out the same. Caches are dropped and
    read again. Warns once an engine.

    Raises:
        ModelError: not even a single item fits.
    """
    results: list[Result] = []
    while len(results) < len(items):
        part = slice(len(results), len(results) + engine.max_slots)
        lengths = [len(context.ids) for context in contexts[part]]
        try:
            results += work(items[part])
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if engine.max_slots == 1:
                raise does_not_fit(engine.name, lengths[0]) from error
        else:
            continue
        for context, length in zip(contexts[part], lengths, strict=True):
            del context.ids[length:]
        make_fewer(engine)
    return results


def does_not_fit(name: str, tokens: int) -> ModelError:
    """A row that does not fit by itself."""
    return ModelError(
        f"{name}: not even one row ({tokens} tokens) fits in the memory that is left beside the models and other "
        "models' caches; what helps: a smaller engine.max_rows or engine.kv_budget, a smaller decoding.max_new_tokens, "
        "a narrower dtype, another device (`switchgen doctor RECIPE` says what a pool needs)"
    )


def make_fewer(engine: Fitted) -> None:
    """Drop the engine's caches and let it keep half as many; warns once an engine."""
    fits = engine.max_slots // 2
    # One warning; that the first halving was not enough is only worth a line in the log.
    level = logging.INFO if engine.halved else logging.WARNING
    logger.log(level, "%s: the caches of %d rows do not fit in memory; trying with %d (engine.max_rows and "
               "engine.kv_budget set how many)", engine.name, engine.max_slots, fits)  # fmt: skip
    engine.clear()
    engine.max_slots, engine.halved = fits, True
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
