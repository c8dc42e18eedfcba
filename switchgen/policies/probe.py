"""The probe: a linear head on the hidden state that a pool member has of the trace anyway.

It costs no model of its own. Its host reads what others wrote at once instead of when its own turn comes; what it reads
is counted with the host's tokens. The host sees the trace as a candidate does, unsigned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from switchgen.candidates import Pool
from switchgen.errors import ModelError
from switchgen.policies.base import Choice
from switchgen.policies.fixed import writer_numbers
from switchgen.rows import Row
from switchgen.sampling import choose_nucleus

PROBE_FILE = "probe.safetensors"


@dataclass(frozen=True)
class Probe:
    """A linear head: logits = weight @ state + bias."""

    weight_CH: torch.Tensor
    """[candidates, hidden], float64."""
    bias_C: torch.Tensor

    def logits(self, states_NH: torch.Tensor) -> torch.Tensor:
        """[rows, candidates]."""
        return states_NH @ self.weight_CH.T + self.bias_C

    def save(self, folder: Path) -> None:
        """Write `probe.safetensors`."""
        from safetensors.torch import save_file  # noqa: PLC0415

        save_file({"weight": self.weight_CH, "bias": self.bias_C}, folder / PROBE_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> Probe:
        """Read `probe.safetensors`.

        Raises:
            ModelError: the folder holds no probe.
        """
        from safetensors.torch import load_file  # noqa: PLC0415

        check_probe(folder)
        tensors = load_file(Path(folder) / PROBE_FILE)
        return cls(tensors["weight"].double(), tensors["bias"].double())


def check_probe(folder: str | Path) -> None:
    """See that a folder holds a probe.

    Raises:
        ModelError: it does not.
    """
    if not (Path(folder) / PROBE_FILE).is_file():
        raise ModelError(
            f"switcher {str(folder)!r}: the folder holds no {PROBE_FILE}; allowed with switcher.kind: probe is what "
            "`switchgen train` leaves under the same setting"
        )


class ProbePolicy:
    """p = softmax of the probe's logits; the writer is drawn from p's nucleus, as the switcher's is.

    Args:
        host: index of the candidate whose states the probe reads.
        temperature: divides the logits before the softmax.
        top_p: mass of the nucleus.

    Raises:
        ModelError: the probe was fitted to another host or another number of candidates.
    """

    engine = None
    """The host's engine is the pool's."""

    def __init__(
        self, pool: Pool, host: int, probe: Probe, *, temperature: float = 1.0, top_p: float = 0.9,
        name: str = "switcher",
    ) -> None:  # fmt: skip
        self.host = host
        self.probe = probe
        self.temperature = temperature
        self.top_p = top_p
        self.name = name
        self._engine = pool.candidates[host].engine
        wanted, found = (len(pool), self._engine.hidden_size), tuple(probe.weight_CH.shape)
        if found != wanted:
            raise ModelError(
                f"the probe chooses between {found[0]} candidates by states of {found[1]} numbers; the pool has "
                f"{wanted[0]} candidates and {pool.names[host]!r} states of {wanted[1]}"
            )

    def writers(self, num_candidates: int) -> Sequence[int]:
        """All."""
        return range(num_candidates)

    def scores(self, rows: Sequence[Row]) -> torch.Tensor:
        """p of each candidate, shape [rows, candidates], float64."""
        states_NH = self._engine.hidden([row.context(self.host) for row in rows])
        return torch.softmax(self.probe.logits(states_NH) / self.temperature, dim=-1)

    def choose(self, rows: Sequence[Row]) -> Choice:
        """A candidate drawn from each row's nucleus."""
        scores_NC = self.scores(rows)
        return Choice(choose_nucleus(scores_NC, writer_numbers(rows), self.top_p).tolist(), scores_NC)

    def fits(self, row: Row) -> bool:
        """Whether the host's context has room for the trace."""
        return len(row.context(self.host).ids) <= self._engine.max_positions
