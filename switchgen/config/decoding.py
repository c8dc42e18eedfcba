"""How a response is written: sampling, segments, first and last writer."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from switchgen.config.section import Section, nearest

logger = logging.getLogger("switchgen")

_ENDS = ("length", "sentence", "line")


class SegmentConfig(Section):
    """Where a segment ends (`segmentation.SegmentRule`, docs/inference.md)."""

    tokens: int = Field(50, ge=1, description="tokens; the longest a segment gets")
    end: str = Field(
        "length",
        description="end earlier: sentence, line; p@γ: before a word of which the writer's likeliest token has a "
        "probability below γ; h@γ: where the entropy of its distribution is above γ, in nats",
    )
    min_tokens: int = Field(5, ge=1, description="p@γ and h@γ: tokens that a segment has before it may end there")

    @field_validator("end")
    @classmethod
    def _end(cls, value: str) -> str:
        return segment_end(value)

    @model_validator(mode="after")
    def _minimum_fits(self) -> SegmentConfig:
        if self.unsure is not None and self.min_tokens > self.tokens:
            raise ValueError(f"min_tokens ({self.min_tokens}) is above tokens ({self.tokens})")
        if self.unsure is None and "min_tokens" in self.model_fields_set:
            logger.warning("decoding.segment.min_tokens has no effect: decoding.segment.end is %s", self.end)
        return self

    @model_serializer(mode="wrap")
    def _without_idle_minimum(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Other segments look as they did before there was a minimum: what is hashed stays the same."""
        data: dict[str, Any] = dump(self)
        if self.unsure is None:
            data.pop("min_tokens", None)
        return data

    @property
    def unsure(self) -> tuple[Literal["p", "h"], float] | None:
        """(measure, γ) where a segment ends where its writer is unsure."""
        return _unsure(self.end)


def segment_end(value: str) -> str:
    """An end of segments as it is.

    Raises:
        ValueError: there is none of that name.
    """
    if value not in _ENDS and _unsure(value) is None:
        raise ValueError(
            f"allowed: {', '.join(_ENDS)}, p@γ with 0 < γ <= 1, h@γ with γ >= 0 (nats){nearest(value, _ENDS)}"
        )
    return value


def _unsure(end: str) -> tuple[Literal["p", "h"], float] | None:
    measure, _, text = end.partition("@")
    try:
        gamma = float(text)
    except ValueError:
        return None
    if measure == "p" and 0 < gamma <= 1:
        return "p", gamma
    return ("h", gamma) if measure == "h" and 0 <= gamma < math.inf else None


def unsure_over_the_wire(end: str, candidate: str) -> str:
    """Why segments cannot end where a writer behind a server is unsure."""
    return (
        f"decoding.segment.end: {end!r} reads the writer's distribution, and candidate {candidate!r} is behind a "
        f"server (engine: openai), which sends text; allowed with it: {', '.join(_ENDS)}"
    )


class DecodingConfig(Section):
    """How a response is written."""

    max_new_tokens: int = Field(512, ge=1, description="tokens of one response, all writers together")
    segment: SegmentConfig = Field(SegmentConfig(), description="a number of tokens will do")
    temperature: float = Field(0.7, ge=0, allow_inf_nan=False, description="0 is greedy")
    top_p: float = Field(0.9, gt=0, le=1, description="tokens are drawn from this nucleus")
    first: str | None = Field(
        None, description="candidate that writes the first segment, whatever the policy; a candidate alone stays alone"
    )
    last: str | None = Field(
        None, description="candidate that writes the last segment, whatever the policy; a candidate alone stays alone"
    )
    cue: str | None = Field(None, min_length=1, description="text before the last segment, e.g. ' The final answer is'")
    eos: Literal["response", "segment"] = Field("response", description="what end-of-text by a candidate ends")
    stop: list[str] = Field([], description="strings that end the response; not part of the output")

    @field_validator("segment", mode="before")
    @classmethod
    def _segment(cls, value: Any) -> Any:
        return {"tokens": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("an empty stop string would end every response at once")
        return value

    @model_validator(mode="after")
    def _cue_needs_last(self) -> DecodingConfig:
        if self.cue is not None and self.last is None:
            raise ValueError("cue is set but last is not: name the candidate that writes after the cue")
        return self

    def alone(self) -> DecodingConfig:
        """The settings for one candidate that writes everything: it has no first and last writer, and no cue."""
        return self.model_copy(update={"first": None, "last": None, "cue": None})
