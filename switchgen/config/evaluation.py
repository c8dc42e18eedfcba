"""What is answered and measured: inference, the server, evaluation, baselines, sweeps."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from switchgen.config.section import Section, base_url


class InferConfig(Section):
    """Defaults of `switchgen infer`."""

    policy: str = Field("switcher", description="who writes")
    seed: int = Field(0, description="run seed")
    format: Literal["switchgen", "released"] = Field("switchgen", description="released: generation_log, too")
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
    model: str = Field(description="what the endpoint calls the model")
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
    retries: int = Field(4, ge=0, description="how often a request is sent again")

    @field_validator("url")
    @classmethod
    def _url(cls, value: str) -> str:
        return base_url(value)

    @field_validator("prompt")
    @classmethod
    def _prompt(cls, value: str) -> str:
        if "{query}" not in value or "{response}" not in value:
            raise ValueError("allowed: a text that holds {query} and {response}")
        return value


class EvaluateConfig(Section):
    """Tasks x policies x run seeds."""

    policies: list[str] = Field(["random", "switcher"], min_length=1, description="policies by name")
    baselines: bool = Field(False, description="all baselines, too (docs/baselines.md)")
    leave_one_out: list[str] = Field(
        [], description="policies that are evaluated without each candidate, too: switcher~pretrained and so on"
    )
    seeds: list[int] = Field([0, 1, 2], min_length=1, description="run seeds: sampling only")
    split: str = Field("test", description="which split of the tasks the questions come from")
    limit: int | None = Field(None, ge=1, description="questions a task")
    against: str | None = Field(None, description="policy that comparisons are made against; default: the best single")
    reward_model: str | None = Field(None, description="for tasks scored by a reward model: folder or hub name")
    judge: JudgeConfig | None = Field(None, description="for tasks of the metric judge")
    workers: int = Field(1, ge=1, description="processes")

    @field_validator("policies", "seeds")
    @classmethod
    def _unique(cls, value: list[Any]) -> list[Any]:
        repeated = sorted({str(item) for item in value if value.count(item) > 1})
        if repeated:
            raise ValueError(f"listed twice: {', '.join(repeated)}")
        return value


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
    also: list[SweepMethod] = Field(
        [], description="methods beside those: the trained switcher, the judge, routers with the base's predictions, …"
    )
    tasks: list[str] | None = Field(None, description="names of the recipe's tasks to take prompts from; default: all")
    splits: list[str] = Field(["dev", "test"], min_length=1, description="choices are made on dev, figures are test's")
    prompts: int = Field(30, ge=2, description="prompts a task and split")
    samples: int = Field(20, ge=2, description="responses a prompt")
    seed: int = Field(0, description="run seed of the responses")
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
