"""Who can write, and who decides: candidates, servers, switcher, routers, guards, engines."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from switchgen.config.section import Dtype, Section, base_url

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED_NAMES = frozenset(
    {"switcher", "untuned", "random", "cue", "mean", "distilled", "routing", "prompted-routing", "refine", "soup",
     "greedy-soup"}
)  # fmt: skip


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

    @field_validator("base_urls")
    @classmethod
    def _base_urls(cls, value: list[str]) -> list[str]:
        return [base_url(url) for url in value]


class CandidateConfig(Section):
    """One member of the pool."""

    name: str = Field(description="how recipes, policies and records call it")
    model: str = Field(min_length=1, description="a folder, or a hub name; {lab} stands for the lab's folder")
    adapter: str | None = Field(
        None, description="PEFT adapter over `model`: a folder, or a hub name, perhaps name@revision"
    )
    prompt: str = Field("auto", description="auto | chat | plain | a template with {query} and, at its end, {trace}")
    engine: Literal["transformers", "openai"] = Field(
        "transformers", description="in this process; or behind servers, then `model` is the tokenizer"
    )
    server: RemoteConfig | None = Field(None, description="for engine: openai")
    dtype: Dtype = Field("auto", description="auto: as saved; half precision becomes float32 on a CPU")
    device: str = Field("auto", description="auto | cpu | cuda | cuda:N")
    device_map: str | dict[str, int | str] | None = Field(None, description="accelerate's device map, for big models")
    quantization: Literal["4bit", "8bit"] | None = Field(None, description="bitsandbytes; CUDA only")
    revision: str | None = Field(None, description="hub revision of `model`")
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
        None,
        description="PEFT adapter (a folder, or a hub name, perhaps name@revision), or the probe's folder; default: "
        "RUN/switcher, where `train` leaves it",
    )
    format: Literal["released", "compact"] = Field(
        "released", description="how an LM sees a signed trace: as the published switchers do, or in a few tokens"
    )
    temperature: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="flattens (> 1) or sharpens (< 1) the probabilities"
    )
    top_p: float = Field(0.9, gt=0, le=1, description="the writer is drawn from this nucleus; near 0 means argmax")
    dtype: Dtype = Field("auto", description="as a candidate's; auto: the base candidate's own")
    device: str = Field("auto", description="as a candidate's; auto: the base candidate's own")
    revision: str | None = Field(None, description="hub revision of a base that is no candidate")
    trust_remote_code: bool = Field(False, description="run the repository's own code, for a base that is no candidate")


class RouterConfig(Section):
    """Token routers (BACo)."""

    predictor: Literal["aligned", "base"] = Field(
        "aligned", description="whose most likely token the content rules look at; a name may say it: baco-punc+base"
    )
    gamma: float | None = Field(None, description="γ of routers whose name has none: baco-p is then baco-p@γ")
    function_words: str | None = Field(
        None, description="file with the function words of the rules FC, one a line, UTF-8; default: the English list"
    )
    judge: str | None = Field(
        None, description="baco-judge: a candidate's name, a folder or a hub name; default: the last candidate"
    )


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

    guard: GuardConfig | None = Field(None, description="bars candidates by the prompt (docs/analyses.md)")


class EngineConfig(Section):
    """How many rows are written at once, in how much memory, and where."""

    max_rows: int = Field(64, ge=1, description="responses in flight")
    kv_budget: int | None = Field(None, ge=1, description="rows whose caches a model may hold; default 2 x max_rows")
    threads: int | None = Field(None, ge=1, description="torch threads on CPU; default: torch's own")
    compile: bool = Field(
        False, description="compile decode steps with torch.compile, on CUDA as CUDA graphs (docs/performance.md)"
    )
    executor: Literal["local", "ray"] = Field(
        "local", description="where a stage's workers run: processes here, or actors of a Ray cluster (extra `ray`)"
    )
