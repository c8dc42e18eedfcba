"""KV caches as preallocated slots, and attention that reads them.

One rule makes ragged batches simple: row i owns positions 0 … len_i - 1 of its slot. New keys and values are written
at len_i, attention sees positions up to the token's own, and whatever lies beyond the length is garbage that the same
rule hides until it is overwritten. Rewinding is a smaller length; a fork is a copied row. Nothing is left-padded, no
model code is touched: the slots are layers of an ordinary transformers `Cache`, and the attention function is
registered under its own name.

Shapes: S slots, H KV heads, P positions (K of them attended to), D head size, n rows of a decode step, T tokens of a
packed read, G query heads per KV head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ATTENTION = "switchgen_slots"
_GROWTH = 128
# What one more attention call costs, in positions read.
_CALL_COST = 256


@dataclass(slots=True)
class Plan:
    """What one forward feeds, shared by all layers."""

    slots_T: torch.Tensor
    """Slot of each fed token."""
    positions_T: torch.Tensor
    """Position of each fed token in its row."""
    chunks: list[tuple[int, int, int]]
    """Packed reads only: (slot, first position, number of tokens) of each row, in the order they are fed."""
    groups: list[tuple[int, int, int]]
    """Decode steps only: the rows in slots 0 … n-1 feed one token each; (first slot, slot after the last, longest row
    after this forward) of each group of them that is attended to together."""
    max_length: int
    """Longest row after this forward."""
    masks: dict[tuple[int | None, int, torch.device], list[torch.Tensor]] = field(default_factory=dict)
    """Float masks by sliding window, query heads per KV head and device, built by the first layer that needs them."""
    parts: list[Part] = field(default_factory=list)
    """Rows of several caches in one decode step; each has a plan of its own."""

    def mask(self, window: int | None, heads: int, like: torch.Tensor) -> list[torch.Tensor]:
        """Additive masks: one [n_i, 1, 1, K_i] per group of a decode step, one [1, 1, G * t_i, K_i] per chunk read.

        Args:
            heads: query heads per KV head (G).
            like: the queries, whose dtype and device the masks take: layers of one model may lie on several devices.
        """
        device, dtype = like.device, like.dtype
        key = (window, heads, device)
        if key not in self.masks:
            if self.groups:
                positions = self.positions_T.to(device)
                found = [
                    _additive(positions[first:last, None, None, None], length, window, dtype)
                    for first, last, length in self.groups
                ]
            else:
                found = []
                for _, first, count in self.chunks:
                    query = torch.arange(first, first + count, device=device)[None, None, :, None]
                    mask = _additive(query, first + count, window, dtype)
                    found.append(mask.repeat(1, 1, heads, 1) if heads > 1 and count > 1 else mask)
            self.masks[key] = found
        return self.masks[key]


@dataclass(slots=True)
class Part:
    """Rows `first` … `last` - 1 of a batch, which live in a cache of their own."""

    cache: SlotCache
    plan: Plan
    first: int
    last: int
    pools: tuple[torch.Tensor, torch.Tensor] = field(default=None)  # type: ignore[assignment]
    """Keys and values of the layer that is being computed."""


def length_groups(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Cut rows into runs of about equal length: attention over a run reads as far as its longest row.

    A cut is made where it saves more reading than one more call costs.

    Returns:
        (first row, row after the last) of each run.
    """
    groups: list[tuple[int, int]] = []
    open_runs = [(0, len(lengths))] if lengths else []
    while open_runs:
        first, last = open_runs.pop()
        run = lengths[first:last]
        before = list(accumulate(run, max))
        after = list(accumulate(reversed(run), max))[::-1]
        costs = [before[cut - 1] * cut + after[cut] * (len(run) - cut) for cut in range(1, len(run))]
        best = min(range(len(costs)), key=costs.__getitem__, default=None)
        if best is None or before[-1] * len(run) - costs[best] <= _CALL_COST:
            groups.append((first, last))
        else:
            cut = first + best + 1
            open_runs += [(cut, last), (first, cut)]
    return groups


def _additive(query: torch.Tensor, length: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    keys = torch.arange(length, device=query.device)
    hidden = keys > query
    if window is not None:
        hidden = hidden | (keys <= query - window)
    return torch.zeros(hidden.shape, dtype=dtype, device=query.device).masked_fill_(hidden, float("-inf"))


def _zeros(like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros of a tensor's type. On CPU they are pages that the system hands out when they are first written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    raw = np.zeros(math.prod(shape) * like.element_size(), dtype=np.uint8)
    return torch.from_numpy(raw).view(like.dtype).view(shape)


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, shape [S, H, P, D]; built at the first update, whose shapes and dtype it takes."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate zeros: never read as values, but 0 x NaN behind a mask of -inf would still be NaN."""
        slots, positions = self.cache.num_slots, self.cache.num_positions
        self.keys = _zeros(key_states, (slots, key_states.shape[1], positions, key_states.shape[3]))
        self.values = _zeros(value_states, (slots, value_states.shape[1], positions, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the fed tokens' keys and values to their places; returns the whole pools."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        plan = self.cache.plan
        assert plan is not None
        for pool, states in ((self.keys, key_states), (self.values, value_states)):
            heads, positions, size = pool.shape[1:]
            index = self.cache.flat_index(plan, heads, positions, states.device)
            # [n, H, 1, D] and [1, H, T, D] both become [T * H, D], token by token.
            flat = states.transpose(1, 2).reshape(-1, size)
            pool.view(-1, size).index_copy_(0, index, flat)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.num_positions, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.cache.num_positions


class SlotCache(Cache):
    """Slots for rows of any length; slots and positions grow in steps as they are needed.

    On CPU, memory that no row has used yet is only set aside: the system hands its pages out as they are written.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_slots = 0
        self.num_positions = 0
        self.expected = 0
        """Positions that rows are expected to reach."""
        self._longest = 0
        """Positions that any row has reached."""
        self.plan: Plan | None = None
        self._indices: dict[tuple[int, torch.device], torch.Tensor] = {}
        """Of the present plan, by KV heads and device."""
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])

    def set_plan(self, plan: Plan) -> None:
        """Prepare a forward: room for its positions, and where its tokens go."""
        if plan.max_length > self.num_positions:
            grown = max(plan.max_length, self.expected, int(self.num_positions * 1.25))
            self._resize(self.num_slots, -(-grown // _GROWTH) * _GROWTH)
        self._longest = max(self._longest, plan.max_length)
        self.plan = plan
        self._indices = {}

    def flat_index(self, plan: Plan, heads: int, positions: int, device: torch.device) -> torch.Tensor:
        """Index of each (token, head) in a pool flattened to [S * H * P, D]; the same for every layer on a device."""
        if (heads, device) not in self._indices:
            head_H = torch.arange(heads, device=plan.slots_T.device)
            rows_TH = plan.slots_T[:, None] * heads + head_H
            index = (rows_TH * positions + plan.positions_T[:, None]).flatten()
            self._indices[heads, device] = index.to(device)
        return self._indices[heads, device]

    def clear(self) -> None:
        """Give all memory back."""
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.num_slots = self.num_positions = self.expected = self._longest = 0
        self.plan = None
        self._indices = {}

    def add_slots(self, num_slots: int) -> None:
        """Grow to that many slots, empty ones behind those that are there."""
        self._resize(num_slots, self.num_positions)

    def _resize(self, num_slots: int, num_positions: int) -> None:
        used, length = self.num_slots, self._longest
        for layer in self.layers:
            if layer.is_initialized:
                for name in ("keys", "values"):
                    old = getattr(layer, name)
                    new = _zeros(old, (num_slots, old.shape[1], num_positions, old.shape[3]))
                    new[:used, :, :length] = old[:used, :, :length]
                    setattr(layer, name, new)
        self.num_slots, self.num_positions = num_slots, num_positions

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy rows `sources` to `targets` (up to `length` positions); overlapping lists act as a permutation."""
        for layer in self.layers:
            if layer.is_initialized:
                for pool in (layer.keys, layer.values):
                    pool[targets, :, :length] = pool[sources, :, :length]

    @property
    def num_bytes(self) -> int:
        """Memory of all slots."""
        return sum(
            pool.numel() * pool.element_size()
            for layer in self.layers
            if layer.is_initialized
            for pool in (layer.keys, layer.values)
        )


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
    masks = slot_plan.mask(sliding_window, query.shape[1] // key.shape[1], query)
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


def register() -> None:
    """Make the attention known to transformers under `ATTENTION`; calling it again changes nothing."""
    functions: tuple[tuple[Any, Callable[..., Any]], ...] = (
        (AttentionInterface, slot_attention),
        (AttentionMaskInterface, sdpa_mask),
    )
    for interface, function in functions:
        interface.register(ATTENTION, function)
