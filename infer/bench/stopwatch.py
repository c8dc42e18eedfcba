"""What one run of a case took: seconds, processor seconds, seconds inside forwards, memory, and the engines' counts."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from switchgen.engines.slots import Plan
from switchgen.engines.transformers import SlotEngine


@dataclass
class Taken:
    """One timed run."""

    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Processor seconds of this process: below `wall_s` by what others took of the core."""
    forward_s: float = 0.0
    """Seconds inside model forwards."""
    step_s: float | None = None
    """Those of them that the engines' decode steps took; the rest read. None where no engine wrote."""
    switcher_s: float = 0.0
    """Seconds in which writers were chosen."""
    decode_s: float = 0.0
    """Seconds after the prompts were read, where that is known (`generate`)."""
    decode_cpu_s: float = 0.0
    new_tokens: int = 0
    """Tokens of all responses."""
    read_tokens: int = 0
    """Tokens fed that no token was drawn after: prompts, what others wrote, signatures, questions."""
    decoded_tokens: int = 0
    mean_batch: float = 0.0
    """Rows per decode step."""
    refilled_batch: float | None = None
    """The same while other queries waited for the places of finished ones."""
    peak_mb: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


class ForwardClock:
    """Seconds inside the forwards of some models, nested calls counted once."""

    def __init__(self, models: Sequence[PreTrainedModel]) -> None:
        self.seconds = 0.0
        self.step_seconds = 0.0
        """Of decode steps of the engines that are watched."""
        self._depth = 0
        self._started = 0.0
        self._wait: Callable[[], None] = wait_for(models[0].device)
        for model in models:
            for module in {model, model.base_model}:
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def watch(self, engine: SlotEngine) -> None:
        """Count an engine's decode steps as a whole: compiled ones tell nobody of their forwards."""
        decode = engine.decode

        def clocked(plan: Plan, ids_N: torch.Tensor) -> torch.Tensor:
            before = self.seconds
            self._enter()
            try:
                return decode(plan, ids_N)
            finally:
                self._leave()
                self.step_seconds += self.seconds - before

        engine.decode = clocked  # type: ignore[method-assign]

    def _enter(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if self._depth == 0:
            self._wait()
            self._started = time.perf_counter()
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth -= 1
        if self._depth == 0:
            self._wait()
            self.seconds += time.perf_counter() - self._started


def wait_for(device: torch.device) -> Callable[[], None]:
    """What waits until a device has done what it was given."""
    if device.type == "cuda":
        return lambda: torch.cuda.synchronize(device)
    return lambda: None


@contextmanager
def timed(clock: ForwardClock, device: torch.device) -> Iterator[Taken]:
    """Time a block; the memory peak is the block's own."""
    gc.collect()
    wait = wait_for(device)
    reset_peak(device)
    taken = Taken()
    forward, step, wall, cpu = clock.seconds, clock.step_seconds, time.perf_counter(), time.process_time()
    yield taken
    wait()
    taken.wall_s = time.perf_counter() - wall
    taken.cpu_s = time.process_time() - cpu
    taken.forward_s = clock.seconds - forward
    taken.step_s = (clock.step_seconds - step) or None
    taken.peak_mb = peak_mb(device)


def peak_mb(device: torch.device) -> float:
    """Highest memory since the last reset: of the device, or resident in this process on CPU. In MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def reset_peak(device: torch.device) -> None:
    """Begin a new peak, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # Linux: the high-water mark of resident memory starts again at what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # Elsewhere the peak is the process's so far, an upper bound.
        return
