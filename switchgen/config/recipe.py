"""The whole recipe: its sections, and what they must agree on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from switchgen.config.decoding import DecodingConfig, unsure_over_the_wire
from switchgen.config.evaluation import BaselinesConfig, EvaluateConfig, InferConfig, ServeConfig, SweepConfig
from switchgen.config.learning import DistillConfig, RolloutConfig, TrainConfig
from switchgen.config.pool import CandidateConfig, EngineConfig, PolicyConfig, RouterConfig, SwitcherConfig
from switchgen.config.section import Section
from switchgen.config.tasks import TaskConfig


class TrackingConfig(Section):
    """wandb; off by default."""

    wandb: bool = Field(False, description="log fits to wandb (extra `wandb`)")
    project: str = Field("switchgen", description="wandb project")
    name: str | None = Field(None, description="wandb run; default: the recipe's name")


class LabConfig(Section):
    """The small ladder that is trained from scratch."""

    seed: int = Field(0, ge=0, description="world seed: a new world, ladder and all stages")
    size: Literal["small", "tiny"] = Field("small", description="tiny: for tests; it learns little")
    workers: int = Field(1, ge=1, description="processes that train each rung together (torchrun); 1, 2, 4 or 8")
    rebuild: bool = Field(False, description="train even where a ready ladder is shipped (seed 0, small)")


class Recipe(Section):
    """The whole recipe. `pool` is in ladder order: pretrained first, aligned last."""

    pool: Annotated[list[CandidateConfig], Field(min_length=1)]
    switcher: SwitcherConfig = SwitcherConfig()
    router: RouterConfig = RouterConfig()
    policy: PolicyConfig = PolicyConfig()
    decoding: DecodingConfig = DecodingConfig()
    engine: EngineConfig = EngineConfig()
    tasks: list[TaskConfig] = []
    rollout: RolloutConfig = RolloutConfig()
    train: TrainConfig = TrainConfig()
    infer: InferConfig = InferConfig()
    serve: ServeConfig = ServeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    baselines: BaselinesConfig = BaselinesConfig()
    sweep: SweepConfig = SweepConfig()
    distill: DistillConfig = DistillConfig()
    tracking: TrackingConfig = TrackingConfig()
    lab: LabConfig | None = None

    @property
    def names(self) -> list[str]:
        """The candidates' names, in ladder order."""
        return [candidate.name for candidate in self.pool]

    @model_validator(mode="after")
    def _names_are_candidates(self) -> Recipe:
        names = self.names
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"pool: two candidates have the same name: {', '.join(repeated)}")
        allowed = {} if self.policy.guard is None else self.policy.guard.allow
        named: dict[str, list[str | None]] = {
            "decoding.first": [self.decoding.first],
            "decoding.last": [self.decoding.last],
            "policy.guard.allow": [name for group in allowed.values() for name in group],
            "baselines.scorer": [self.baselines.scorer],
            "baselines.descriptions": [*self.baselines.descriptions],
            "distill.base": [self.distill.base],
        }
        for key, values in named.items():
            for value in values:
                if value is not None and value not in names:
                    raise ValueError(f"{key}: no candidate is called {value!r}; allowed: {', '.join(names)}")
        if self.switcher.kind == "probe" and self.switcher.base not in (None, *names):
            raise ValueError(
                f"switcher.base: a probe reads a candidate's hidden state, and no candidate is called "
                f"{self.switcher.base!r}; allowed: {', '.join(names)}"
            )
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        remote = [candidate.name for candidate in self.pool if candidate.engine == "openai"]
        if remote and self.decoding.segment.unsure is not None:
            raise ValueError(unsure_over_the_wire(self.decoding.segment.end, remote[0]))
        if self.rollout.rounds > 1 and self.rollout.rounds_split == self.evaluate.split:
            raise ValueError(
                f"rollout.rounds_split: {self.rollout.rounds_split!r} is also evaluate.split; the best round is chosen "
                "on other questions than the figures are measured on"
            )
        if self.decoding.last is not None and self.decoding.max_new_tokens <= self.decoding.segment.tokens:
            raise ValueError(
                "decoding.last reserves one segment for the last writer: max_new_tokens "
                f"({self.decoding.max_new_tokens}) must be above segment.tokens ({self.decoding.segment.tokens})"
            )
        return self
