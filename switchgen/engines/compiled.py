"""Compiled decoding: one step of a batch as a function of tensors that `torch.compile` compiles once.

What changes from step to step is in tensors and their sizes: the number of rows, how far attention reads, the slots and
positions of the caches. These sizes are dynamic, so that one compilation serves them all. On CUDA the compiled step is
captured as CUDA graphs besides, one for each combination of sizes that occurs: there rows and lengths are rounded up to
few sizes. Rows that are padding write into a slot that is no row's; the mask hides what lies beyond each row's length.

Packed reads, and batches of several adapters (`engines.joint`), stay as they are.

Shapes: n rows, N of them with padding, K positions attended to, V logits; pools are [S, H, P, D] (`engines.slots`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin

from switchgen.engines.slots import GROWTH, Plan
from switchgen.errors import ConfigError, one_line

if TYPE_CHECKING:
    from switchgen.engines.transformers import SlotEngine

logger = logging.getLogger("switchgen")

Pools = tuple[torch.Tensor, torch.Tensor]
"""Keys and values of a layer."""


class CompiledDecoder:
    """Decode steps of an engine, compiled at the first of them.

    Args:
        engine: its cache has a slot to spare, which takes what padding writes.

    Raises:
        ConfigError: the model's layers lie on several devices, or there is no C++ compiler.
    """

    def __init__(self, engine: SlotEngine) -> None:
        _check(engine)
        self.engine = engine
        graphs = engine.device.type == "cuda"
        # A graph is captured for sizes, compiled code takes any: there every row and position costs its work.
        self.round_rows: Callable[[int], int] = rounded if graphs else lambda rows: max(2, rows)
        self.round_length = GROWTH if graphs else 64
        self._compiled: Callable[..., torch.Tensor] | None = None

    def __call__(self, plan: Plan, ids_n: torch.Tensor) -> torch.Tensor:
        """Feed one token a row; logits of the next one, [n, V].

        Raises:
            ConfigError: the model cannot be compiled.
        """
        cache, rows = self.engine.cache, len(ids_n)
        padding = min(self.round_rows(rows), cache.num_slots) - rows
        length = -(-plan.max_length // self.round_length) * self.round_length
        # Positions to spare: that attention reads all there are would be a case of its own to the compiler.
        cache.make_room(length + 1)
        cache.set_plan(plan)
        ids_N, positions_N = pad(ids_n, (0, padding)), pad(plan.positions_T, (0, padding))
        slots_N = pad(plan.slots_T, (0, padding), value=cache.num_slots)
        reach_K = torch.empty(length, dtype=torch.bool, device=ids_n.device)
        for tensor in (ids_N, positions_N, slots_N, reach_K):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        pools = [(layer.keys, layer.values) for layer in cache.layers]
        for pool in (pool for pair in pools for pool in pair):
            _mark(pool)
        if self._compiled is None:
            self._compiled = self._compile()
        # The step before is over: its output, which this one's graph may overwrite, was copied.
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            logits_NV = self._compiled(self.engine.model, ids_N, slots_N, positions_N, reach_K, pools)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise ConfigError(
                f"{self.engine.name}: engine.compile: a {type(self.engine.model).__name__} cannot be compiled: "
                f"{one_line(error)}; allowed here: engine.compile: false"
            ) from error
        return logits_NV[:rows].clone()

    def _compile(self) -> Callable[..., torch.Tensor]:
        logger.info("%s: compiling its decode step; that takes a while", self.engine.name)
        # Compilations are kept, and limited, by code object: each engine has one of its own.
        step = FunctionType(decode_step.__code__.replace(), decode_step.__globals__)
        mode = "reduce-overhead" if self.engine.device.type == "cuda" else None
        compiled: Callable[..., torch.Tensor] = torch.compile(step, fullgraph=True, mode=mode)
        return compiled


def decode_step(
    model: Any,
    ids_N: torch.Tensor,
    slots_N: torch.Tensor,
    positions_N: torch.Tensor,
    reach_K: torch.Tensor,
    pools: Sequence[Pools],
) -> torch.Tensor:
    """Feed one token a row; logits of the next one, [N, V].

    Args:
        slots_N: where keys and values are written; row i reads slot i.
        reach_K: its size is how far attention reads.
        pools: each layer's, written in place.
    """
    plan = Plan(slots_N, positions_N, [], [(0, ids_N.shape[0], reach_K.shape[0])], reach_K.shape[0])
    logits_N1V: torch.Tensor = model(
        input_ids=ids_N[:, None],
        position_ids=positions_N[:, None],
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=ids_N.device),
        past_key_values=StepCache(plan, pools),
        use_cache=True,
        slot_plan=plan,
        logits_to_keep=1,
    ).logits
    return logits_N1V[:, -1]


class StepCache(Cache):
    """The pools of all layers during one step."""

    def __init__(self, plan: Plan, pools: Sequence[Pools]) -> None:
        super().__init__(layers=[StepLayer(plan, *pair) for pair in pools])


class StepLayer(CacheLayerMixin):
    """Keys and values of one layer during one step."""

    def __init__(self, plan: Plan, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.plan, self.keys, self.values = plan, keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The pools are there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write each row's key and value [N, H, 1, D] to its place; returns the whole pools."""
        assert self.keys is not None and self.values is not None
        # Not `SlotLayer`'s flat places: those are found by the pool's sizes, which are dynamic here.
        self.keys[self.plan.slots_T, :, self.plan.positions_T] = key_states[:, :, 0]
        self.values[self.plan.slots_T, :, self.plan.positions_T] = value_states[:, :, 0]
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def rounded(rows: int) -> int:
    """The next of 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, …"""
    step = 1 << max(0, (rows - 1).bit_length() - 2)
    return max(2, -(-rows // step) * step)


def _mark(pool: torch.Tensor) -> None:
    """Tell the compiler of a new pool: its slots and positions are dynamic; a graph may read it where it lies.

    Grown pools are other tensors; their address is seen to be another one, and a new graph is captured.
    """
    if not hasattr(pool, "_dynamo_static_input_type"):
        torch._dynamo.maybe_mark_dynamic(pool, [0, 2])
        torch._dynamo.mark_static_address(pool)


def _check(engine: SlotEngine) -> None:
    devices = {str(parameter.device) for parameter in engine.model.parameters()}
    if len(devices) > 1 or any(hasattr(module, "_hf_hook") for module in engine.model.modules()):
        raise ConfigError(
            f"{engine.name}: engine.compile: its layers are spread by device_map ({', '.join(sorted(devices))}); "
            "allowed: a model on one device, or engine.compile: false"
        )
    if engine.device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler  # noqa: PLC0415
        from torch._inductor.exc import InvalidCxxCompiler  # noqa: PLC0415

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ConfigError(
                f"{engine.name}: engine.compile: no C++ compiler is here (g++, or what CXX names); allowed without "
                "one: engine.compile: false"
            ) from None
