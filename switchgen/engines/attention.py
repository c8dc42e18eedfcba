"""Attention over slots (`engines.slots`), registered with transformers under its own name.

Shapes: S slots, H KV heads, P positions (K of them attended to), D head size, n rows of a decode step, T tokens of a
packed read, G query heads per KV head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from switchgen.engines.slots import Plan

ATTENTION = "switchgen_slots"


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    slot_plan: Plan | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention over slots when a plan is given; transformers' own sdpa otherwise.

    Args:
        query: [n, H * G, 1, D] for a decode step, [1, H * G, T, D] for a packed read.
        key, value: the pools [S, H, P, D].

    Returns:
        [n, 1, H * G, D] or [1, T, H * G, D].
    """
    if slot_plan is None:
        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, softcap=softcap, **kwargs,
        )  # fmt: skip
        return result
    if slot_plan.parts:
        outs = [
            slot_attention(
                module, query[part.first : part.last], *part.pools, None, scaling=scaling, slot_plan=part.plan,
                sliding_window=sliding_window, softcap=softcap,
            )[0]
            for part in slot_plan.parts
        ]  # fmt: skip
        return torch.cat(outs), None
    masks = masks_of(slot_plan, sliding_window, query.shape[1] // key.shape[1], query)
    parts = []
    if slot_plan.groups:
        for (start, end, length), mask in zip(slot_plan.groups, masks, strict=True):
            rows = slice(start, end)
            parts.append(_grouped(query[rows], key[rows, :, :length], value[rows, :, :length], mask, scaling, softcap))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.transpose(1, 2).contiguous(), None
    start = 0
    for (slot, first, count), mask in zip(slot_plan.chunks, masks, strict=True):
        length = first + count
        part = query[:, :, start : start + count]
        parts.append(
            _grouped(part, key[slot : slot + 1, :, :length], value[slot : slot + 1, :, :length], mask, scaling, softcap)
        )
        start += count
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _grouped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention with each KV head's query heads folded into the query length, so that keys are never expanded.

    The mask is folded already.
    """
    batch, query_heads, count, size = query.shape
    heads = key.shape[1]
    groups = query_heads // heads
    folded = query.reshape(batch, heads, groups * count, size)
    if softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    else:
        scale = scaling if scaling is not None else size**-0.5
        scores = torch.tanh(folded @ key.transpose(-1, -2) * scale / softcap) * softcap + mask
        out = torch.softmax(scores, dim=-1) @ value
    return out.reshape(batch, query_heads, count, value.shape[-1])


def masks_of(plan: Plan, window: int | None, groups: int, like: torch.Tensor) -> list[torch.Tensor]:
    """Additive masks: one [n_i, 1, 1, K_i] per group of a decode step, one [1, 1, G * t_i, K_i] per chunk of a read.

    Args:
        window: how far back a layer sees; None: to the beginning.
        groups: query heads per KV head (G).
        like: a tensor of the masks' dtype and device.
    """
    key = (like.device, window, groups)
    if key in plan.masks:
        return plan.masks[key]
    masks = []
    if plan.groups:
        positions_T = plan.positions_T.to(like.device)
        for first, last, length in plan.groups:
            masks.append(_additive(positions_T[first:last, None, None, None], length, window, like.dtype))
    else:
        for _, first, count in plan.chunks:
            query = torch.arange(first, first + count, device=like.device)[None, None, :, None]
            mask = _additive(query, first + count, window, like.dtype)
            masks.append(mask.repeat(1, 1, groups, 1) if groups > 1 and count > 1 else mask)
    plan.masks[key] = masks
    return masks


def _additive(query: torch.Tensor, length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    keys = torch.arange(length, device=query.device)
    hidden = keys > query
    if window is not None:
        hidden = hidden | (keys <= query - window)
    return torch.zeros(hidden.shape, dtype=dtype, device=query.device).masked_fill_(hidden, float("-inf"))


def register() -> None:
    """Make the attention known to transformers under `ATTENTION`; calling it again changes nothing."""
    functions: tuple[tuple[Any, Callable[..., Any]], ...] = (
        (AttentionInterface, slot_attention),
        (AttentionMaskInterface, sdpa_mask),
    )
    for interface, function in functions:
        interface.register(ATTENTION, function)
