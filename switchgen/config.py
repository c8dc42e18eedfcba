"""The recipe: one YAML file, checked as a whole before anything is loaded.

Every section is a pydantic model that refuses unknown keys. `load_recipe` reports all problems at once, each with file,
line, key path, what was got and the nearest allowed spelling.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)  # fmt: skip

from switchgen.errors import ConfigError

logger = logging.getLogger("switchgen")

CONFIGS_DIR = Path(__file__).resolve().parents[1] / "configs"
DATA_DIR = Path(__file__).resolve().parents[1] / "data"

Dtype = Literal["auto", "float32", "float64", "bfloat16", "float16"]
_ENDS = ("length", "sentence", "line")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SHORTHANDS = {"segment": "tokens", "tasks": "shipped"}
_RESERVED_NAMES = frozenset(
    {"switcher", "untuned", "random", "cue", "mean", "distilled", "routing", "prompted-routing", "refine", "soup",
     "greedy-soup"}
)  # fmt: skip


class Section(BaseModel):
    """A part of the recipe; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class RemoteConfig(Section):
    """Servers that hold a candidate (`engine: openai`)."""

    base_urls: list[str] = Field(min_length=1, description="replicas, e.g. [http://gpu1:8000/v1, http://gpu2:8000/v1]")
    model: str | None = Field(None, description="what the servers call the model; default: the candidate's `model`")
    prompts: Literal["auto", "tokens", "text"] = Field(
        "auto", description="prompts as token ids or as text; auto tries token ids first"
    )
    max_positions: int | None = Field(None, ge=1, description="context in tokens; default: what config.json says")
    in_flight: int = Field(64, ge=1, description="requests at a time")
    timeout: float = Field(300, gt=0, description="seconds for one request")
    retries: int = Field(8, ge=0, description="how often a request is sent again, to another replica if there is one")
    api_key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the API key, if any")


class CandidateConfig(Section):
    """One member of the pool."""

    name: str = Field(description="how recipes, policies and records call it")
    model: str = Field(min_length=1, description="a folder, or a hub name; {lab} stands for the lab's folder")
    adapter: str | None = Field(None, description="PEFT adapter over `model`: a folder or a hub name")
    prompt: str = Field("auto", description="auto | chat | plain | a template with {query} and, at its end, {trace}")
    engine: Literal["transformers", "openai"] = Field(
        "transformers", description="in this process; or behind servers, then `model` is the tokenizer"
    )
    server: RemoteConfig | None = Field(None, description="for engine: openai")
    dtype: Dtype = "auto"
    device: str = Field("auto", description="auto | cpu | cuda | cuda:N")
    device_map: str | dict[str, int | str] | None = Field(None, description="accelerate's device map, for big models")
    quantization: Literal["4bit", "8bit"] | None = Field(None, description="bitsandbytes; CUDA only")
    revision: str | None = Field(None, description="hub revision")
    trust_remote_code: bool = Field(False, description="run the model repository's own code; off unless you ask")

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not _NAME.fullmatch(value):
            raise ValueError("a name is letters, digits, '.', '_' and '-', and begins with a letter or digit")
        if value in _RESERVED_NAMES:
            raise ValueError(f"is reserved; names not allowed here: {', '.join(sorted(_RESERVED_NAMES))}")
        return value

    @model_serializer(mode="wrap")
    def _without_server(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Candidates in this process look as they did before there were servers: what is hashed stays the same."""
        data: dict[str, Any] = dump(self)
        if data.get("server", ...) is None:
            del data["server"]
        return data

    @model_validator(mode="after")
    def _server_is_openais(self) -> CandidateConfig:
        if (self.engine == "openai") != (self.server is not None):
            raise ValueError("engine: openai and server belong together: give both, or neither")
        if self.engine == "openai":
            idle = [key for key in ("adapter", "device_map", "quantization") if getattr(self, key) is not None]
            if idle:
                raise ValueError(f"{', '.join(idle)}: the server's own affair; not allowed with engine: openai")
        return self

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: str) -> str:
        if value in ("auto", "chat", "plain"):
            return value
        if value.count("{query}") != 1 or not value.endswith("{trace}") or value.count("{trace}") != 1:
            raise ValueError(
                "allowed: auto, chat, plain, or a template that holds {query} once and ends with {trace}, "
                "e.g. 'Question: {query}\\nAnswer:\\n{trace}'"
            )
        return value


class SwitcherConfig(Section):
    """What decides who writes next."""

    kind: Literal["lm", "probe"] = Field(
        "lm", description="an LM that reads the signed trace (paper), or a linear head on a candidate's hidden state"
    )
    base: str | None = Field(
        None, description="a candidate's name, for an LM also a folder or a hub name; default: the last candidate"
    )
    adapter: str | None = Field(
        None, description="PEFT adapter, or the probe's folder; default: RUN/switcher, where `train` leaves it"
    )
    format: Literal["released", "compact"] = Field(
        "released", description="how an LM sees a signed trace: as the published switchers do, or in a few tokens"
    )
    temperature: float = Field(1.0, gt=0, description="flattens (> 1) or sharpens (< 1) the probabilities")
    top_p: float = Field(0.9, gt=0, le=1, description="the writer is drawn from this nucleus; near 0 means argmax")
    dtype: Dtype = "auto"
    device: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False


class RouterConfig(Section):
    """Token routers (BACo)."""

    predictor: Literal["aligned", "base"] = Field(
        "aligned", description="whose most likely token the content rules look at; a name may say it: baco-punc+base"
    )
    judge: str | None = Field(
        None, description="baco-judge: a candidate's name, a folder or a hub name; default: the last candidate"
    )


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
            f"allowed: {', '.join(_ENDS)}, p@γ with 0 < γ <= 1, h@γ with γ >= 0 (nats){_nearest(value, _ENDS)}"
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
    segment: SegmentConfig = SegmentConfig()
    temperature: float = Field(0.7, ge=0, description="0 is greedy")
    top_p: float = Field(0.9, gt=0, le=1)
    first: str | None = Field(None, description="candidate that always writes the first segment")
    last: str | None = Field(None, description="candidate that always writes the last segment")
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


class EngineConfig(Section):
    """How many rows are written at once, in how much memory, and where."""

    max_rows: int = Field(64, ge=1, description="responses in flight")
    kv_budget: int | None = Field(None, ge=1, description="rows whose caches a model may hold; default 2 x max_rows")
    threads: int | None = Field(None, ge=1, description="torch threads on CPU; default: torch's own")
    executor: Literal["local", "ray"] = Field(
        "local", description="where a stage's workers run: processes here, or actors of a Ray cluster (extra `ray`)"
    )


class LoraSection(Section):
    """PEFT LoRA."""

    r: int = Field(64, ge=1)
    alpha: int = Field(16, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    target_modules: list[str] | str = Field(["q_proj", "k_proj", "v_proj", "o_proj"])


class RacingConfig(Section):
    """How completions are spent where that can change the label; for scores in [0, 1].

    The guarantee: a candidate that is better than the label by `margin` or more is missed with probability at most
    1 - `confidence`, for each pair and however often the scores are looked at; smaller differences are not looked for
    (tests by betting, Waudby-Smith & Ramdas 2023; `rollout/racing.py`).
    """

    start: int = Field(4, ge=1, description="completions that every branch gets")
    step: int = Field(2, ge=1, description="completions that are added at a time")
    max: int = Field(32, ge=1, description="completions that no branch gets more of")
    margin: float = Field(0.2, gt=0, lt=1, description="smaller differences are not looked for, in units of the score")
    confidence: float = Field(
        0.9, gt=0, lt=1, description="1 - the probability that a candidate is missed that is better by `margin`"
    )

    @model_validator(mode="after")
    def _start_fits(self) -> RacingConfig:
        if self.start > self.max:
            raise ValueError(f"start ({self.start}) is above max ({self.max})")
        return self


class RolloutConfig(Section):
    """States, branches, completions, labels (METHOD: labels from rollouts)."""

    split: str = Field("train", description="which split of the tasks the questions come from")
    queries: int = Field(300, ge=1, description="questions, spread evenly over the tasks")
    states: int = Field(2, ge=1, description="states a question")
    completions: int = Field(8, ge=1, description="completions of each branch (k), with the uniform budget")
    budget: Literal["uniform", "racing"] = Field(
        "uniform", description="the same number for every branch (paper), or where it can change the label"
    )
    racing: RacingConfig = RacingConfig()
    branch: Literal["shared", "fresh"] = Field(
        "shared", description="each candidate's segment: one for all its completions (paper), or a new one for each"
    )
    prefix: tuple[float, float] = Field((0.0, 0.9), description="range of the cut, as shares of the response")
    policy: str = Field(
        "random", description="who writes prefixes and completions: random, or switcher in a later round"
    )
    seed: int = 0
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


class TrainConfig(Section):
    """The switcher's fit."""

    lora: LoraSection | None = LoraSection()
    labels: Literal["argmax", "soft"] = Field("argmax", description="hard labels (paper), or softmax(mean / tau)")
    tau: float = Field(0.1, gt=0, description="temperature of soft labels, in units of the score")
    min_margin: float = Field(0.0, ge=0, description="states whose best and second best differ by less are left out")
    keep_ties: bool = Field(
        False, description="exact ties: false drops and counts them, true lets the lowest index win"
    )
    held_out: float = Field(0.15, ge=0, lt=1, description="share of the questions kept for measuring label accuracy")
    max_length: int = Field(4096, ge=16, description="tokens; longer traces lose their middle")
    seed: int = 0
    args: dict[str, Any] = Field({}, description="passed to trl.SFTConfig as they are")


class TaskConfig(Section):
    """One task: a shipped task's name (a plain string will do), a file, or a hub data set."""

    shipped: str | None = None
    file: str | None = None
    hub: str | None = None
    config: str | None = None
    name: str | None = None
    split: str = "test"
    limit: int | None = Field(None, ge=1)
    metric: str | None = None
    prompt: str | None = None
    marker: str | None = None
    strict: bool | None = None
    fields: dict[str, str] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> TaskConfig:
        if sum(source is not None for source in (self.shipped, self.file, self.hub)) != 1:
            raise ValueError("a task has exactly one source: a shipped task's name, file (a path) or hub (a data set)")
        return self

    @model_validator(mode="before")
    @classmethod
    def _plain_name(cls, value: Any) -> Any:
        return {"shipped": value} if isinstance(value, str) else value


class InferConfig(Section):
    """Defaults of `switchgen infer`."""

    policy: str = "switcher"
    seed: int = 0
    format: Literal["switchgen", "released"] = "switchgen"
    workers: int = Field(1, ge=1, description="processes")


class ServeConfig(Section):
    """Defaults of `switchgen serve`. The API key comes from the environment: SWITCHGEN_API_KEY."""

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="0 picks a free one")
    max_new_tokens: int = Field(4096, ge=1, description="the most tokens that one answer may ask for")
    max_waiting: int = Field(256, ge=0, description="answers that may wait for a place; more are refused (429)")
    max_body_mb: float = Field(8.0, gt=0, description="the largest request, in MiB; larger ones are refused (413)")


class JudgeConfig(Section):
    """A judge behind an OpenAI-compatible endpoint, for tasks of the metric `judge`."""

    url: str = Field(description="base URL, e.g. http://localhost:8000/v1")
    model: str
    key_env: str = Field("OPENAI_API_KEY", description="environment variable that holds the key, if one is needed")
    prompt: str = Field(
        "Rate how well the response answers the query, from 0 (not at all) to 10 (perfectly): is it right, helpful, "
        "and does it do what was asked?\n\nQuery:\n{query}\n\nReference answer:\n{reference}\n\n"
        "Response:\n{response}\n\nThink briefly, then write the rating in double brackets, for example [[7]].",
        description="holds {query} and {response}, perhaps {reference}; asks for a number in [[ ]]",
    )
    max_rating: float = Field(10.0, gt=0, description="the best rating; scores are ratings divided by it")
    max_tokens: int = Field(512, ge=1, description="tokens of the judge's answer")
    parallel: int = Field(8, ge=1, description="requests at a time")
    timeout: float = Field(120.0, gt=0, description="seconds a request")
    retries: int = Field(4, ge=0)

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: str) -> str:
        if "{query}" not in value or "{response}" not in value:
            raise ValueError("allowed: a text that holds {query} and {response}")
        return value


class EvaluateConfig(Section):
    """Tasks x policies x run seeds."""

    policies: list[str] = Field(["random", "switcher"], min_length=1)
    baselines: bool = Field(False, description="all baselines, too (docs/baselines.md)")
    leave_one_out: list[str] = Field(
        [], description="policies that are evaluated without each candidate, too: switcher~pretrained and so on"
    )
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="run seeds: sampling only")
    split: str = "test"
    limit: int | None = Field(None, ge=1, description="questions a task")
    against: str | None = Field(None, description="policy that comparisons are made against; default: the best single")
    reward_model: str | None = Field(None, description="for tasks scored by a reward model: folder or hub name")
    judge: JudgeConfig | None = None
    workers: int = Field(1, ge=1, description="processes")

    @field_validator("policies", "seeds")
    @classmethod
    def _unique(cls, value: list[Any]) -> list[Any]:
        repeated = sorted({str(item) for item in value if value.count(item) > 1})
        if repeated:
            raise ValueError(f"listed twice: {', '.join(repeated)}")
        return value


class GuardConfig(Section):
    """Which candidates may write the response to which prompts."""

    allow: dict[str, list[str]] = Field(description="by class of prompts: the candidates that may write")
    patterns: dict[str, list[str]] = Field(
        {}, description="by class: regular expressions, one of which is found in the user's last message"
    )
    classify: str | None = Field(
        None, description="instead of patterns: your package.module:function, from messages to a class, or None"
    )

    @model_validator(mode="after")
    def _classes_are_known(self) -> GuardConfig:
        if (self.classify is None) == (not self.patterns):
            raise ValueError("a guard has patterns or classify, and not both")
        if self.classify is not None and ":" not in self.classify:
            raise ValueError(f"classify is package.module:function; got {self.classify!r}")
        if unknown := sorted(set(self.patterns) - set(self.allow)):
            raise ValueError(f"patterns: class {unknown[0]!r} is not in allow ({', '.join(self.allow)})")
        if empty := [kind for kind, names in self.allow.items() if not names]:
            raise ValueError(f"allow: class {empty[0]!r} has no candidates, so nobody could write")
        for texts in self.patterns.values():
            for text in texts:
                try:
                    re.compile(text)
                except re.error as error:
                    raise ValueError(f"patterns: {text!r} is no regular expression: {error}") from None
        return self


class PolicyConfig(Section):
    """Constraints on policies that choose."""

    guard: GuardConfig | None = None


class BaselinesConfig(Section):
    """Other ways to combine the candidates (docs/baselines.md)."""

    select: Literal["likelihood", "reward_model"] = Field("likelihood", description="what best-of@N chooses by")
    scorer: str | None = Field(
        None, description="candidate under which best-of@N takes the likelihood; default: the last candidate"
    )
    reward_model: str | None = Field(None, description="for select: reward_model: folder or hub name")
    refine: str = Field(
        "{query}\n\nHere is a draft of the answer:\n{draft}\n\nWrite the answer, and mend the draft where it is wrong.",
        description="what the rewriter of `refine` reads: {query} and {draft}, once each",
    )
    descriptions: dict[str, str] = Field({}, description="for prompted-routing: a line about each candidate, by name")
    dev_questions: int = Field(40, ge=1, description="dev questions a task that greedy-soup is chosen on")
    seed: int = Field(0, description="of the weights that DARE drops")

    @field_validator("refine")
    @classmethod
    def _refine(cls, value: str) -> str:
        if (
            value.count("{query}") != 1
            or value.count("{draft}") != 1
            or value.index("{query}") > value.index("{draft}")
        ):
            raise ValueError("allowed: a text that holds {query} once and after it {draft} once")
        return value

    @model_validator(mode="after")
    def _reward_model_is_named(self) -> BaselinesConfig:
        if self.select == "reward_model" and self.reward_model is None:
            raise ValueError("select is reward_model, and reward_model names none")
        return self


class SweepMethod(Section):
    """One method of a sweep: a policy at several γ, or at several temperatures."""

    policy: str = Field(description="a policy's name without its γ: aligned, nudging, average, baco-p, segment-rand, …")
    gammas: list[float] = Field([], description="values of γ; a policy without γ has none")
    temperatures: list[float] = Field([], description="sampling temperatures; default: decoding.temperature")
    name: str | None = Field(None, description="how results call it; default: the policy")

    @field_validator("gammas", "temperatures")
    @classmethod
    def _no_repeats(cls, value: list[float]) -> list[float]:
        if len(set(value)) < len(value):
            raise ValueError("a value is listed twice")
        return value


class SweepConfig(Section):
    """Methods x operating points on diversity x quality planes (BACo's evaluation), for `sweep` and `calibrate`."""

    methods: list[SweepMethod] = Field([], description="default: both models, the baselines and all routers")
    tasks: list[str] | None = Field(None, description="names of the recipe's tasks to take prompts from; default: all")
    splits: list[str] = Field(["dev", "test"], min_length=1, description="choices are made on dev, figures are test's")
    prompts: int = Field(30, ge=2, description="prompts a task and split")
    samples: int = Field(20, ge=2, description="responses a prompt")
    seed: int = 0
    equivalence: str = Field(
        "auto",
        description="which responses are one kind: answer (equal answers, tasks with a marker), embedding, or your own "
        "package.module:function; auto: answer where a task has a marker, else embedding",
    )
    embedding_model: str | None = Field(None, description="encoder for semantic metrics: a folder or a hub name")
    embedding_threshold: float = Field(0.9, description="cosine similarity from which two responses are one kind")
    reward_model: str | None = Field(None, description="a sequence-classification reward model: folder or hub name")
    resamples: int = Field(1000, ge=1, description="bootstrap resamples of the prompts")

    @field_validator("equivalence")
    @classmethod
    def _known_equivalence(cls, value: str) -> str:
        if value not in ("auto", "answer", "embedding") and ":" not in value:
            raise ValueError("allowed: auto, answer, embedding, or package.module:function")
        return value


class DistillConfig(Section):
    """Collaboration back into one model."""

    base: str | None = Field(None, description="the student: a candidate's name; default: the last candidate")
    policy: str = Field("switcher", description="whose responses the student learns from")
    split: str = "train"
    queries: int = Field(600, ge=1, description="questions, spread evenly over the tasks")
    samples: int = Field(2, ge=1, description="responses a question")
    min_score: float = Field(1.0, description="responses scored below are filtered out")
    workers: int = Field(1, ge=1, description="processes that write the responses")
    lora: LoraSection | None = Field(None, description="LoRA settings; null trains all weights")
    seed: int = 0
    max_length: int = Field(2048, ge=16)
    args: dict[str, Any] = Field({}, description="passed to trl.SFTConfig as they are")


class TrackingConfig(Section):
    """wandb; off by default."""

    wandb: bool = False
    project: str = "switchgen"
    name: str | None = None


class LabConfig(Section):
    """The small ladder that is trained from scratch."""

    seed: int = Field(0, ge=0, description="world seed: a new world, ladder and all stages")
    size: Literal["small", "tiny"] = "small"
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
    def _names_fit(self) -> Recipe:
        names = self.names
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"pool: two candidates have the same name: {', '.join(repeated)}")
        for key, value in (("first", self.decoding.first), ("last", self.decoding.last)):
            if value is not None and value not in names:
                raise ValueError(f"decoding.{key}: no candidate is called {value!r}; allowed: {', '.join(names)}")
        guard = self.policy.guard
        for value in [] if guard is None else [name for allowed in guard.allow.values() for name in allowed]:
            if value not in names:
                raise ValueError(f"policy.guard.allow: no candidate is called {value!r}; allowed: {', '.join(names)}")
        for key, named in (("scorer", [self.baselines.scorer]), ("descriptions", list(self.baselines.descriptions))):
            for value in named:
                if value is not None and value not in names:
                    raise ValueError(f"baselines.{key}: no candidate is called {value!r}; allowed: {', '.join(names)}")
        if self.distill.base is not None and self.distill.base not in names:
            raise ValueError(f"distill.base: no candidate is called {self.distill.base!r}; allowed: {', '.join(names)}")
        remote = [candidate.name for candidate in self.pool if candidate.engine == "openai"]
        if remote and self.decoding.segment.unsure is not None:
            raise ValueError(unsure_over_the_wire(self.decoding.segment.end, remote[0]))
        if self.switcher.kind == "probe" and self.switcher.base not in (None, *names):
            raise ValueError(
                f"switcher.base: a probe reads a candidate's hidden state, and no candidate is called "
                f"{self.switcher.base!r}; allowed: {', '.join(names)}"
            )
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


def shipped_recipes() -> dict[str, Path]:
    """Names of the recipes in configs/ and where they are."""
    return {path.stem: path for path in sorted(CONFIGS_DIR.glob("*.yaml"))}


def find_recipe(name_or_path: str) -> Path:
    """The file behind a recipe argument: an existing file, or a shipped recipe's name.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    hint = _nearest(name_or_path, list(shipped))
    raise ConfigError(
        f"recipe {name_or_path!r}: no such file, and no shipped recipe of that name{hint}. "
        f"Allowed: a YAML file, or one of {', '.join(shipped) or '(none shipped)'}"
    )


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply overrides such as `decoding.segment.tokens=25`, check everything.

    Raises:
        ConfigError: lists every problem, one a line.
    """
    path = find_recipe(name_or_path)
    data, lines = _read_yaml(path)
    for override in overrides:
        _apply_override(data, override)
    return check_recipe(data, str(path), lines)


def check_recipe(data: Mapping[str, Any], source: str, lines: Mapping[tuple[str, ...], int] | None = None) -> Recipe:
    """The recipe that plain values make.

    Args:
        source: where they are from, for the message.
        lines: where each key path stands.

    Raises:
        ConfigError: lists every problem, one a line.
    """
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = [_describe(problem, lines or {}) for problem in error.errors()]
        head = f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''} in the recipe"
        raise ConfigError("\n".join([head, *(f"  {problem}" for problem in problems)])) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); a recipe is UTF-8 YAML") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}: a recipe is a mapping with the sections {', '.join(Recipe.model_fields)}; "
            f"got {'an empty file' if data is None else type(data).__name__}"
        )
    lines: dict[tuple[str, ...], int] = {}
    try:
        _collect_lines(node, (), lines)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return data, lines


def _collect_lines(node: Any, path: tuple[str, ...], lines: dict[tuple[str, ...], int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in lines:
                raise ConfigError(
                    f"line {key.start_mark.line + 1}, {'.'.join(here)}: stands twice; first in line {lines[here]}"
                )
            lines[here] = key.start_mark.line + 1
            _collect_lines(value, here, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            here = (*path, str(index))
            lines[here] = value.start_mark.line + 1
            _collect_lines(value, here, lines)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r}: allowed is a.b=value, e.g. decoding.max_new_tokens=256")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    parts = key.split(".")
    target: Any = data
    for index, part in enumerate(parts):
        last = index == len(parts) - 1
        if isinstance(target, list):
            if not part.isdigit() or int(part) >= len(target):
                where = ".".join(parts[:index])
                raise ConfigError(f"override {override!r}: {where} is a list; allowed here: 0 to {len(target) - 1}")
            if last:
                target[int(part)] = value
            else:
                target[int(part)] = target = _long_form("tasks", target[int(part)])
        elif isinstance(target, dict):
            if last:
                target[part] = value
            else:
                target[part] = target = _long_form(part, target.get(part))
        else:
            where = ".".join(parts[:index])
            raise ConfigError(f"override {override!r}: {where} is {target!r} in the recipe and has no keys")


def _long_form(key: str, value: Any) -> Any:
    """What an override may go into: a null becomes a section, a shorthand such as `segment: 50` its long form."""
    if value is None:
        return {}
    if key in _SHORTHANDS and not isinstance(value, (dict, list)):
        return {_SHORTHANDS[key]: value}
    return value


def _describe(problem: Mapping[str, Any], lines: Mapping[tuple[str, ...], int]) -> str:
    location = tuple(str(part) for part in problem["loc"])
    key_path = ".".join(location) or "recipe"
    line = next((lines[location[:n]] for n in range(len(location), 0, -1) if location[:n] in lines), None)
    where = f"line {line}, {key_path}" if line else key_path
    if problem["type"] == "extra_forbidden":
        allowed = _allowed_keys(location[:-1])
        return f"{where}: unknown key{_nearest(location[-1], allowed)}; allowed: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"{where}: required and not given"
    message = problem["msg"].removeprefix("Value error, ")
    got = problem.get("input")
    shown = "" if isinstance(got, (dict, BaseModel)) else f"; got {got!r}"
    hint = ""
    if problem["type"] == "literal_error" and isinstance(got, str):
        hint = _nearest(got, re.findall(r"'([^']+)'", problem["ctx"]["expected"]))
    return f"{where}: {message}{shown}{hint}"


def _allowed_keys(location: Sequence[str]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if part.isdigit():
            continue
        annotation = model.model_fields[part].annotation
        model = next((kind for kind in _section_types(annotation)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _section_types(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _section_types(argument)]


def _nearest(word: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def nearest(word: str, allowed: Sequence[str]) -> str:
    """` (did you mean 'x'?)`, or an empty string when nothing is close."""
    return _nearest(word, allowed)
