"""Policies with some candidates barred: everywhere (leave one out), or for some prompts (a guard).

    switcher~pretrained   the policy `switcher` without the candidate `pretrained`

What is left of the policy's probabilities is scaled to 1 again; where nothing is left, every allowed candidate is as
likely. The switcher reads and signs the pool as it is, so its labels keep their meaning.

Shapes: N rows, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from switchgen.engines.base import Engine
from switchgen.errors import ConfigError
from switchgen.policies.base import Choice, Policy
from switchgen.policies.fixed import FixedPolicy, RandomPolicy, ShareRandomPolicy, writer_numbers
from switchgen.policies.probe import ProbePolicy
from switchgen.policies.routing import RoutingPolicy, decided
from switchgen.policies.switcher import SwitcherPolicy
from switchgen.rows import Row
from switchgen.sampling import choose_nucleus

Mask = Callable[[Row], frozenset[int] | None]
"""The candidates that may write a row; None: all."""


class MaskedPolicy:
    """A segment policy in which some candidates may not write.

    Raises:
        ConfigError: the policy chooses tokens or whole responses.
    """

    def __init__(self, inner: Policy, mask: Mask, *, name: str | None = None, barred: frozenset[int] = frozenset()):
        if not isinstance(inner, FixedPolicy | RandomPolicy | ShareRandomPolicy | SwitcherPolicy | ProbePolicy):
            raise ConfigError(f"policy {inner.name!r} chooses no segments' writers, so none can be barred; allowed: "
                              "a candidate's name, random, switcher, untuned, routing")  # fmt: skip
        self.inner = inner
        self.mask = mask
        self.name = name or inner.name
        self.barred = barred
        """Candidates that never write."""

    @property
    def engine(self) -> Engine | None:
        """The model that the inner policy asks."""
        return self.inner.engine

    def writers(self, num_candidates: int) -> Sequence[int]:
        """All that are not barred everywhere."""
        return [index for index in range(num_candidates) if index not in self.barred]

    def choose(self, rows: Sequence[Row]) -> Choice:
        """A candidate drawn from what is left of each row's probabilities."""
        probs_NC = masked(probabilities(self.inner, rows), [self.mask(row) for row in rows])
        once = isinstance(self.inner, ShareRandomPolicy) and self.inner.grain == "response"
        asks = isinstance(self.inner, SwitcherPolicy | ProbePolicy)
        top_p = self.inner.top_p if isinstance(self.inner, SwitcherPolicy | ProbePolicy) else 1.0
        writers = choose_nucleus(probs_NC, writer_numbers(rows, first_only=once), top_p).tolist()
        return Choice(writers, probs_NC if asks else None)

    def fits(self, row: Row) -> bool:
        """Whether the inner policy's model has room for the row."""
        return fits(self.inner, row)


def fits(policy: Policy, row: Row) -> bool:
    """Whether the model that the policy asks, if it asks one, can read the row."""
    return not isinstance(policy, SwitcherPolicy | ProbePolicy | MaskedPolicy) or policy.fits(row)


def masked(probs_NC: torch.Tensor, masks: Sequence[frozenset[int] | None]) -> torch.Tensor:
    """Probabilities with barred candidates at 0, scaled to 1 again; even over the allowed where nothing is left."""
    allowed_NC = torch.ones_like(probs_NC, dtype=torch.bool)
    for row, mask in enumerate(masks):
        if mask is not None:
            assert mask, "a row that nobody may write"
            allowed_NC[row] = torch.tensor([index in mask for index in range(probs_NC.shape[1])])
    left_NC = torch.where(allowed_NC, probs_NC, 0.0)
    left_NC = torch.where(left_NC.sum(-1, keepdim=True) > 0, left_NC, allowed_NC.to(left_NC.dtype))
    return left_NC / left_NC.sum(-1, keepdim=True)


def probabilities(policy: Policy, rows: Sequence[Row]) -> torch.Tensor:
    """p of each candidate at each row's next segment, before top-p; [N, C], float64."""
    if isinstance(policy, MaskedPolicy):
        return masked(probabilities(policy.inner, rows), [policy.mask(row) for row in rows])
    count = len(rows[0].pool)
    if isinstance(policy, FixedPolicy):
        return one_hot([policy.writer] * len(rows), count)
    if isinstance(policy, RandomPolicy):
        return torch.full((len(rows), count), 1 / count, dtype=torch.float64)
    if isinstance(policy, ShareRandomPolicy):
        probs_C = torch.zeros(count, dtype=torch.float64)
        probs_C[policy.base] += policy.gamma
        probs_C[policy.aligned] += 1 - policy.gamma
        return probs_C.repeat(len(rows), 1)
    assert isinstance(policy, SwitcherPolicy | ProbePolicy), "checked where the policy was taken"
    if not isinstance(policy, RoutingPolicy):
        return policy.scores(rows)
    earlier = [decided(row) for row in rows]
    probs_NC = one_hot([0 if found is None else found[0] for found in earlier], count)
    if new := [index for index, found in enumerate(earlier) if found is None]:
        probs_NC[new] = policy.scores([rows[index] for index in new])
    return probs_NC


def one_hot(writers: Sequence[int], count: int) -> torch.Tensor:
    """Probability 1 of each row's writer; [N, C], float64."""
    return torch.nn.functional.one_hot(torch.tensor(writers), count).to(torch.float64)


def leave_out(inner: Policy, name: str, barred: frozenset[int], num_candidates: int) -> MaskedPolicy:
    """The policy without some candidates."""
    left = frozenset(range(num_candidates)) - barred
    return MaskedPolicy(inner, lambda row: left, name=name, barred=barred)


def split_name(name: str) -> tuple[str, list[str]]:
    """(policy, candidates left out) of `switcher~pretrained`."""
    inner, *barred = name.split("~")
    return inner, barred
