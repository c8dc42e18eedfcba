"""What is learned from: rollouts, the switcher's fit, distillation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from switchgen.config.section import Section


class RacingConfig(Section):
    """How completions are spent where that can change the label; for scores in [0, 1].

    The guarantee: that a state ends as `winner` or `tie` with a label that another candidate beats by `margin` or more
    has a probability of at most 1 - `confidence`, for each pair and however often the scores are looked at; smaller
    differences are not looked for (tests by betting, Waudby-Smith & Ramdas 2023; `rollout/racing.py`). A state that
    ends undecided at `max` (outcome `budget`) has the best mean so far for its label, and no guarantee.
    """

    start: int = Field(4, ge=1, description="completions that every branch gets")
    step: int = Field(2, ge=1, description="completions that are added at a time")
    max: int = Field(32, ge=1, description="completions that no branch gets more of")
    margin: float = Field(0.2, gt=0, lt=1, description="smaller differences are not looked for, in units of the score")
    confidence: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="1 - the probability that a decided race misses one who is better by `margin`",
    )

    @model_validator(mode="after")
    def _start_fits(self) -> RacingConfig:
        if self.start > self.max:
            raise ValueError(f"start ({self.start}) is above max ({self.max})")
        return self


class RolloutConfig(Section):
    """States, branches, completions, labels (docs/rollout.md)."""

    split: str = Field("train", description="which split of the tasks the questions come from")
    queries: int = Field(300, ge=1, description="questions, spread evenly over the tasks")
    states: int = Field(2, ge=1, description="states a question")
    completions: int = Field(8, ge=1, description="completions of each branch (k), with the uniform budget")
    budget: Literal["uniform", "racing"] = Field(
        "uniform", description="the same number for every branch (paper), or where it can change the label"
    )
    racing: RacingConfig = Field(RacingConfig(), description="with the racing budget")
    branch: Literal["shared", "fresh"] = Field(
        "shared", description="each candidate's segment: one for all its completions (paper), or a new one for each"
    )
    prefix: tuple[float, float] = Field((0.0, 0.9), description="range of the cut, as shares of the response")
    policy: str = Field(
        "random", description="who writes prefixes and completions: random, or switcher in a later round"
    )
    seed: int = Field(0, description="of questions, cuts and sampling")
    reward_model: str | None = Field(None, description="for tasks scored by a reward model: folder or hub name")
    workers: int = Field(1, ge=1, description="processes")
    rounds: int = Field(
        1, ge=1, description="`switchgen run`: after the first, prefixes and completions are the latest switcher's"
    )
    rounds_split: str = Field("dev", description="split on whose questions the best of several rounds is chosen")

    @field_validator("prefix")
    @classmethod
    def _prefix(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not 0 <= low <= high < 1:
            raise ValueError("allowed: two shares with 0 <= low <= high < 1, e.g. [0.0, 0.9]")
        return value


class LoraSection(Section):
    """PEFT LoRA."""

    r: int = Field(64, ge=1, description="rank")
    alpha: int = Field(16, ge=1, description="the update is scaled by alpha / r")
    dropout: float = Field(0.1, ge=0, lt=1, description="on the adapter's input")
    target_modules: list[str] | str = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj"], description="layers that get an adapter, or all-linear"
    )


class TrainConfig(Section):
    """The switcher's fit."""

    lora: LoraSection | None = Field(LoraSection(), description="the adapter; a switcher has one")
    labels: Literal["argmax", "soft"] = Field("argmax", description="hard labels (paper), or softmax(mean / tau)")
    tau: float = Field(0.1, gt=0, description="temperature of soft labels, in units of the score")
    min_margin: float = Field(0.0, ge=0, description="states whose best and second best differ by less are left out")
    keep_ties: bool = Field(
        False, description="exact ties: false drops and counts them, true lets the lowest index win"
    )
    held_out: float = Field(0.15, ge=0, lt=1, description="share of the questions kept for measuring label accuracy")
    max_length: int = Field(4096, ge=16, description="tokens; longer traces lose their middle")
    seed: int = Field(0, description="of the adapter's first weights and the order of examples")
    args: dict[str, Any] = Field({}, description="passed to trl.SFTConfig as they are")


class DistillConfig(Section):
    """Collaboration back into one model."""

    base: str | None = Field(None, description="the student: a candidate's name; default: the last candidate")
    policy: str = Field("switcher", description="whose responses the student learns from")
    split: str = Field("train", description="which split of the tasks the questions come from")
    queries: int = Field(600, ge=1, description="questions, spread evenly over the tasks")
    samples: int = Field(2, ge=1, description="responses a question")
    min_score: float = Field(1.0, description="responses scored below are filtered out")
    workers: int = Field(1, ge=1, description="processes that write the responses")
    lora: LoraSection | None = Field(None, description="LoRA settings; null trains all weights")
    seed: int = Field(0, description="of questions, sampling and the fit")
    max_length: int = Field(2048, ge=16, description="tokens; longer responses are left out")
    args: dict[str, Any] = Field({}, description="passed to trl.SFTConfig as they are")
