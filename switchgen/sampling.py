"""The next token from logits, with random numbers that are looked up, not consumed.

A random number is a hash of (row seed, purpose, token index, attempt). Two rows never share a stream, a row's numbers
do not depend on its batch mates, and a token that is drawn again after a rewind comes out the same.

Shapes: N rows, V vocabulary, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import torch

# Colder than this, quotients of logits overflow; the most likely token it is.
_COLDEST = 1e-6
# Redraws before the sampler sorts. Each try is accepted with a probability of at least top_p, so sorting is rare.
_MAX_TRIES = 8

NO_NUMBER = -1
"""Stands for a token where there was nothing to draw from."""


class Purpose(IntEnum):
    """What a random number is for; numbers of different purposes are independent."""

    TOKEN = 1
    WRITER = 2
    PREFIX_LENGTH = 3
    ROUTER = 4


def _signed(value: int) -> int:
    """Wrap an unsigned 64-bit constant into the range of int64."""
    return value - (1 << 64) if value >= 1 << 63 else value


_MASK = (1 << 64) - 1
_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift; torch's own is arithmetic on int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014) on int64 tensors that wrap around."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def uniform(seeds_N: torch.Tensor, purpose: Purpose, index_N: torch.Tensor, attempt: int = 0) -> torch.Tensor:
    """Numbers in [0, 1), one per row, float64.

    Args:
        seeds_N: int64, one seed per row (`ids.derive_seed`).
        purpose: what the numbers are for.
        index_N: int64, index of the token (or decision) within its response.
        attempt: which redraw this is, from 0.
    """
    state = _mix(seeds_N + _GAMMA)
    state = _mix(state ^ (index_N * _GAMMA + int(purpose)))
    state = _mix(state + _signed(attempt * 0x94D049BB133111EB & _MASK))
    return _shift_right(state, 11).to(torch.float64) * 2.0**-53


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn. `temperature` 0 means the most likely token; `top_p` 1 means the whole distribution."""

    temperature: float = 0.7
    top_p: float = 0.9


def token_probs(logits_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Softmax of `logits / temperature` in float32 or better, shape NV."""
    logits_NV = logits_NV.float() if logits_NV.dtype in (torch.float16, torch.bfloat16) else logits_NV
    return torch.softmax(logits_NV / temperature, dim=-1)


def is_unsure(logits_NV: torch.Tensor, measure: Literal["p", "h"], gamma: float) -> torch.Tensor:
    """Whether a model is unsure of its next token, by its distribution at temperature 1 (bool, shape N).

    Args:
        measure: `p`: its likeliest token has a probability below `gamma` (BACo's rule P, arXiv 2511.05650, and
            Nudging's, Fei et al. 2025, arXiv 2410.09300, §3); `h`: its entropy is above `gamma` nats (BACo's rule H).
    """
    log_probs_NV = torch.log_softmax(logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)), -1)
    if measure == "p":
        return log_probs_NV.max(dim=-1).values.exp() < gamma
    # 0 * -inf is no number; a token that cannot come adds nothing to the entropy.
    terms_NV = torch.where(log_probs_NV == -torch.inf, 0.0, log_probs_NV.exp() * log_probs_NV)
    return -terms_NV.sum(dim=-1) > gamma


def sample_tokens(
    logits_NV: torch.Tensor, seeds_N: torch.Tensor, index_N: torch.Tensor, params: SamplingParams
) -> torch.Tensor:
    """Draw one token per row by nucleus sampling, without sorting the vocabulary.

    A token is drawn from the full distribution and kept if the mass of all strictly likelier tokens is below `top_p`
    (so it belongs to the nucleus); else the next attempt's number is used. Rows still rejected after a few attempts are
    drawn from the sorted nucleus. Both ways draw from the same distribution.

    Returns:
        int64 ids, shape N; `NO_NUMBER` where the logits are none (NaN: an overflow in half precision, say).
    """
    if params.temperature < _COLDEST:
        best_N = logits_NV.argmax(dim=-1)
        return best_N.masked_fill(logits_NV.gather(1, best_N[:, None])[:, 0].isnan(), NO_NUMBER)
    probs_NV = token_probs(logits_NV, params.temperature)
    cumulative_NV = _running_sums(probs_NV)
    tokens_N = _draw(cumulative_NV, uniform(seeds_N, Purpose.TOKEN, index_N))
    if params.top_p < 1:
        _redraw(tokens_N, probs_NV, cumulative_NV, seeds_N, index_N, params.top_p)
    return tokens_N.masked_fill(cumulative_NV[:, -1].isnan(), NO_NUMBER)


def _redraw(
    tokens_N: torch.Tensor,
    probs_NV: torch.Tensor,
    cumulative_NV: torch.Tensor,
    seeds_N: torch.Tensor,
    index_N: torch.Tensor,
    top_p: float,
) -> None:
    """Replace the tokens that lie outside the nucleus."""
    pending = _outside_nucleus(probs_NV, tokens_N, top_p).nonzero().flatten()
    for attempt in range(1, _MAX_TRIES):
        if pending.numel() == 0:
            return
        redrawn = _draw(cumulative_NV[pending], uniform(seeds_N[pending], Purpose.TOKEN, index_N[pending], attempt))
        tokens_N[pending] = redrawn
        pending = pending[_outside_nucleus(probs_NV[pending], redrawn, top_p)]
    if pending.numel():
        numbers = uniform(seeds_N[pending], Purpose.TOKEN, index_N[pending], _MAX_TRIES)
        tokens_N[pending] = choose_nucleus(probs_NV[pending], numbers, top_p)


def _running_sums(probs_NV: torch.Tensor) -> torch.Tensor:
    """Sums that never fall, as a search in them needs.

    On a GPU they are taken in parallel and may fall by a rounding (pytorch/pytorch#21780); the search could then end on
    a token of probability zero.
    """
    sums_NV = probs_NV.cumsum(dim=-1)
    return sums_NV if sums_NV.device.type == "cpu" else sums_NV.cummax(dim=-1).values


def _draw(cumulative_NV: torch.Tensor, numbers_N: torch.Tensor) -> torch.Tensor:
    # The last cumulative value stands for "1". `right=True` skips flat stretches, so that no token of probability zero
    # is reached; for the flat stretch at the end the target must stay below the total, to which it may be rounded.
    total_N1 = cumulative_NV[:, -1:]
    target_N1 = numbers_N.to(cumulative_NV.dtype).unsqueeze(1) * total_N1
    target_N1 = torch.minimum(target_N1, torch.nextafter(total_N1, torch.zeros_like(total_N1)))
    last = cumulative_NV.shape[1] - 1
    return torch.searchsorted(cumulative_NV, target_N1, right=True).squeeze(1).clamp_(max=last)


def _outside_nucleus(probs_NV: torch.Tensor, tokens_N: torch.Tensor, top_p: float) -> torch.Tensor:
    drawn_N1 = probs_NV.gather(1, tokens_N.unsqueeze(1))
    return torch.where(probs_NV > drawn_N1, probs_NV, 0.0).sum(dim=-1) >= top_p


def choose_nucleus(probs_NC: torch.Tensor, numbers_N: torch.Tensor, top_p: float) -> torch.Tensor:
    """Draw one index per row from the smallest set of likeliest entries whose mass reaches `top_p` (by sorting).

    Entries of equal probability stand or fall together, as in `sample_tokens`; at least one entry is always kept.
    """
    sorted_NC, order_NC = probs_NC.sort(dim=-1, descending=True, stable=True)
    above_NC = sorted_NC.cumsum(dim=-1) - sorted_NC
    # An entry tied with the one before it inherits that one's mass above.
    tied_NC = torch.zeros_like(sorted_NC, dtype=torch.bool)
    tied_NC[:, 1:] = sorted_NC[:, 1:] == sorted_NC[:, :-1]
    above_NC = torch.where(tied_NC, 0.0, above_NC).cummax(dim=-1).values
    kept_NC = torch.where(above_NC < top_p, sorted_NC, 0.0)
    picked_N = _draw(_running_sums(kept_NC), numbers_N)
    return order_NC.gather(1, picked_N.unsqueeze(1)).squeeze(1)
