"""Which engine a model gets: slots where its attention allows them and the numbers agree, else snapshots."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from switchgen.engines.base import Context
from switchgen.engines.fitting import out_of_memory
from switchgen.engines.local import TOLERANCE, input_device
from switchgen.engines.snapshot import SnapshotEngine
from switchgen.engines.transformers import SlotEngine
from switchgen.errors import no_number, one_line
from switchgen.vocabulary import Vocabulary

logger = logging.getLogger("switchgen")

_ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
_CHECK_LENGTH = 12


def build_engine(
    name: str, model: PreTrainedModel, vocabulary: Vocabulary, **arguments: Any
) -> SlotEngine | SnapshotEngine:
    """A slot engine where the model's attention allows it and the numbers agree, else the slow one, with a warning."""
    reason = _unsupported(model)
    if reason is None:
        reference_attention = model.config._attn_implementation
        reference = _plain_logits(model, arguments.get("activate"))
        if reference.isnan().any():
            raise no_number(name)
        engine = SlotEngine(name, model, vocabulary, **arguments)
        reason = _disagreement(engine, reference)
        if reason is None:
            return engine
        model.set_attn_implementation(reference_attention)
    logger.warning(
        "%s: caches of %s cannot be kept in slots (%s); its rows are decoded one by one, which is slow",
        name, type(model).__name__, reason,
    )  # fmt: skip
    return SnapshotEngine(name, model, vocabulary, **arguments)


def _unsupported(model: PreTrainedModel) -> str | None:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if kinds:
        return f"layers of kind {', '.join(sorted(kinds))}"
    if any(hasattr(module, "sinks") for module in model.modules()):
        return "attention sinks"
    return None


def _check_ids(model: PreTrainedModel) -> list[int]:
    size = model.get_input_embeddings().weight.shape[0]
    return [(7 + 37 * index) % size for index in range(_CHECK_LENGTH)]


@torch.inference_mode()
def _plain_logits(model: PreTrainedModel, activate: Callable[[], None] | None) -> torch.Tensor:
    if activate is not None:
        activate()
    ids = torch.tensor([_check_ids(model)], device=input_device(model))
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0, -1].double()
    return logits


@torch.inference_mode()
def _disagreement(engine: SlotEngine, reference: torch.Tensor) -> str | None:
    """Compare the slot engine with the plain forward on a few tokens, read in two parts and one decode step."""
    ids = _check_ids(engine.model)
    context = Context(ids[: _CHECK_LENGTH // 2])
    try:
        engine.begin([context])
        context.ids.extend(ids[_CHECK_LENGTH // 2 :])
        logits = engine.begin([context]).logits()[0].double()
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        if out_of_memory(error):
            raise
        return f"its forward failed: {one_line(error)}"
    finally:
        engine.release(context)
        engine.stats = type(engine.stats)()
    spread = (reference.max() - reference.min()).item() or 1.0
    difference = (logits - reference).abs().max().item() / spread
    if difference > TOLERANCE.get(engine.model.dtype, 0.15):
        return f"logits differ from a plain forward's by {difference:.2g} of their range"
    # The check's few tokens lie within any window: see that the attention function was told of it at all.
    plan = engine.cache.plan
    assert plan is not None
    if _slides(engine.model) and all(window is None for _, window, _ in plan.masks):
        return "its attention does not say how far its window reaches"
    return None


def _slides(model: PreTrainedModel) -> bool:
    """Whether some layer sees a sliding window only."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return "sliding_attention" in kinds
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True) is not False


def max_positions(model: PreTrainedModel) -> int:
    """Longest context in tokens.

    LongRoPE turns every position by another factor once a context is longer than the original one: a row would depend
    on the longest of its batch, and what its cache holds would be wrong. Such contexts are not written.
    """
    config = model.config.get_text_config()
    limit: int = getattr(config, "max_position_embeddings", None) or 1 << 30
    rope = getattr(config, "rope_parameters", None) or {}
    original = rope.get("original_max_position_embeddings")
    if rope.get("rope_type") == "longrope" and original and original < limit:
        logger.warning("%s: contexts are limited to %d tokens, beyond which its positions change", model.name_or_path,
                       original)  # fmt: skip
        return int(original)
    return limit


def stop_ids(model: PreTrainedModel, vocabulary: Vocabulary) -> frozenset[int]:
    """A candidate's end-of-text tokens: its generation config's and its tokenizer's."""
    found: set[int] = set()
    for value in (model.generation_config.eos_token_id if model.generation_config else None,
                  model.config.get_text_config().eos_token_id, vocabulary.tokenizer.eos_token_id):  # fmt: skip
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return frozenset(found)
