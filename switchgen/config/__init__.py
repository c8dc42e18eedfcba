"""The recipe: its sections as pydantic models that refuse unknown keys, and how it is read.

The sections lie in `pool`, `decoding`, `tasks`, `learning` and `evaluation`; `recipe` puts them together and says what
they must agree on; `reading` reads the YAML and reports what is wrong with it.
"""

from switchgen.config.decoding import DecodingConfig, SegmentConfig, segment_end, unsure_over_the_wire
from switchgen.config.evaluation import (
    BaselinesConfig,
    EvaluateConfig,
    InferConfig,
    JudgeConfig,
    ServeConfig,
    SweepConfig,
    SweepMethod,
)
from switchgen.config.learning import DistillConfig, LoraSection, RacingConfig, RolloutConfig, TrainConfig
from switchgen.config.pool import (
    CandidateConfig,
    EngineConfig,
    GuardConfig,
    PolicyConfig,
    RemoteConfig,
    RouterConfig,
    SwitcherConfig,
)
from switchgen.config.reading import check_recipe, dump_recipe, find_recipe, load_recipe, shipped_recipes
from switchgen.config.recipe import LabConfig, Recipe, TrackingConfig
from switchgen.config.section import CONFIGS_DIR, DATA_DIR, Dtype, Section, nearest
from switchgen.config.tasks import TaskConfig

__all__ = [
    "BaselinesConfig", "CONFIGS_DIR", "CandidateConfig", "DATA_DIR", "DecodingConfig", "DistillConfig", "Dtype",
    "EngineConfig", "EvaluateConfig", "GuardConfig", "InferConfig", "JudgeConfig", "LabConfig", "LoraSection",
    "PolicyConfig", "RacingConfig", "Recipe", "RemoteConfig", "RolloutConfig", "RouterConfig", "Section",
    "SegmentConfig", "ServeConfig", "SweepConfig", "SweepMethod", "SwitcherConfig", "TaskConfig", "TrackingConfig",
    "TrainConfig", "check_recipe", "dump_recipe", "find_recipe", "load_recipe", "nearest", "segment_end",
    "shipped_recipes", "unsure_over_the_wire",
]  # fmt: skip
