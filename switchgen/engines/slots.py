"""KV caches as preallocated slots.

One rule makes ragged batches simple: row i owns positions 0 … len_i - 1 of its slot. New keys and values are written
at len_i, attention (`engines.attention`) sees positions up to the token's own, and whatever lies beyond the length is
garbage that the same rule hides until it is overwritten. Rewinding is a smaller length; a fork is a copied row. Nothing
is left-padded, no model code is touched: the slots are layers of an ordinary transformers `Cache`.

A model's layers may lie on several devices (`device_map`): each layer's slots lie where its keys are computed, and what
a plan says of a forward is copied there once.

Shapes: S slots, H KV heads, P positions (K of them attended to), D head size, n rows of a decode step, T tokens of a
packed read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH = 128
"""Positions come in multiples of this."""
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
    masks: dict[tuple[torch.device, int | None, int], list[torch.Tensor]] = field(default_factory=dict)
    """`attention.masks_of` by device, sliding window and query heads per KV head: built by the first layer that needs
    them."""
    indices: dict[tuple[torch.device, int, int], torch.Tensor] = field(default_factory=dict)
    """`index` by device, KV heads and positions, likewise."""
    parts: list[Part] = field(default_factory=list)
    """Rows of several caches in one decode step; each has a plan of its own."""

    def index(self, heads: int, positions: int, device: torch.device) -> torch.Tensor:
        """Place of each fed (token, head) in a pool flattened to [S * H * P, D]; the same for every layer."""
        key = (device, heads, positions)
        if key not in self.indices:
            rows_TH = self.slots_T[:, None] * heads + torch.arange(heads, device=self.slots_T.device)
            self.indices[key] = (rows_TH * positions + self.positions_T[:, None]).flatten().to(device)
        return self.indices[key]


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
        slots, positions = self.cache.num_slots + self.cache.spare, self.cache.num_positions
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
            index = plan.index(heads, positions, pool.device)
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
        self.spare = 0
        """Slots behind the others that are no row's."""
        self.plan: Plan | None = None
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])

    def fit(self, expected: int, longest: int) -> None:
        """Take note of the rows that are there; where they need less than half of the positions, the rest goes back.

        Args:
            expected: positions that they are expected to reach.
            longest: positions that they have reached.
        """
        self.expected = expected
        needed = -(-max(expected, longest, 1) // GROWTH) * GROWTH
        if self.num_positions > 2 * needed:
            self._longest = longest
            self._resize(self.num_slots, needed)

    def set_plan(self, plan: Plan) -> None:
        """Prepare a forward: room for its positions, and where its tokens go."""
        self.make_room(plan.max_length)
        self._longest = max(self._longest, plan.max_length)
        self.plan = plan

    def make_room(self, num_positions: int) -> None:
        """Have that many positions, or more: in steps, for each of them copies the caches."""
        if num_positions > self.num_positions:
            grown = max(num_positions, self.expected, int(self.num_positions * 1.25))
            self._resize(self.num_slots, -(-grown // GROWTH) * GROWTH)

    def clear(self) -> None:
        """Give all memory back."""
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False
        self.num_slots = self.num_positions = self.expected = self._longest = 0
        self.plan = None

    def add_slots(self, num_slots: int) -> None:
        """Grow to that many slots, empty ones behind those that are there."""
        self._resize(num_slots, self.num_positions)

    def _resize(self, num_slots: int, num_positions: int) -> None:
        used, length = self.num_slots, self._longest
        for layer in self.layers:
            if layer.is_initialized:
                for name in ("keys", "values"):
                    old = getattr(layer, name)
                    new = _zeros(old, (num_slots + self.spare, old.shape[1], num_positions, old.shape[3]))
                    new[:used, :, :length] = old[:used, :, :length]
                    setattr(layer, name, new)
        self.num_slots, self.num_positions = num_slots, num_positions

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy rows `sources` to `targets` (up to `length` positions); overlapping lists act as a permutation."""
        places: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        for pool in self._pools():
            # To a device once, not for every layer: each copy makes the host wait.
            if pool.device not in places:
                places[pool.device] = (
                    torch.tensor(sources, device=pool.device), torch.tensor(targets, device=pool.device)
                )  # fmt: skip
            source, target = places[pool.device]
            pool[target, :, :length] = pool[source, :, :length]

    def _pools(self) -> Iterator[torch.Tensor]:
        """Keys and values of every layer that has any."""
        for layer in self.layers:
            if layer.is_initialized:
                yield from (layer.keys, layer.values)

    @property
    def num_bytes(self) -> int:
        """Memory of all slots."""
        return sum(pool.numel() * pool.element_size() for pool in self._pools())
