"""What clients may ask: the bodies of /v1/chat/completions and /v1/completions, checked.

A field that would be ignored is refused, unless it changes nothing about the answer (`user`, `metadata`, `store`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

PREFIX = "switchgen/"
"""Models are called by their policy: `switchgen/switcher`, `switchgen/baco-p@0.3`, `switchgen/aligned`."""

MAX_CHOICES = 128
MAX_LOGPROBS = 20


class ApiError(Exception):
    """What went wrong, as clients of the API expect it.

    Args:
        status: the HTTP status code.
        param: the body's field that is wrong.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """How a stream ends."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of request have in common."""

    model_config = ConfigDict(extra="forbid")

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    # Without effect on the answer, and sent by some clients with every request.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    # Sent by some clients with the value that means nothing; any other is refused.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @property
    def num_choices(self) -> int:
        """Answers wanted."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """Strings that end the answer."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @field_validator("stop")
    @classmethod
    def _stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value == "" or (isinstance(value, list) and "" in value):
            raise ValueError("an empty stop string would end every answer at once")
        return value

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Body:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true only")
        return self


class TextPart(BaseModel):
    """A part of a message's content; texts only."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of the conversation."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As the project's queries hold it."""
        parts = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": parts}


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @property
    def limit(self) -> int | None:
        """Tokens wanted at most."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top(self) -> int | None:
        """Likeliest tokens wanted with each token; None if no log-probabilities are wanted."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _conversation(self) -> ChatBody:
        roles = [message.plain()["role"] for message in self.messages]
        if roles[-1] != "user" or not self.messages[-1].plain()["content"].strip():
            raise ValueError(f"messages: the last one must be the user's and not empty; got {roles[-1]}")
        if "system" in roles[1:]:
            raise ValueError("messages: a system message comes first")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream and self.logprobs:
            raise ValueError("logprobs of a stream are not given; ask without stream")
        return self


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @property
    def limit(self) -> int | None:
        """Tokens wanted at most."""
        return self.max_tokens

    @property
    def num_top(self) -> int | None:
        """Likeliest tokens wanted with each token; None if no log-probabilities are wanted."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """One prompt or several, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if all(isinstance(item, int) for item in self.prompt):
            return [[item for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]

    @model_validator(mode="after")
    def _fits(self) -> CompletionBody:
        if not self.prompt or [] in self.prompts:
            raise ValueError("prompt: is empty")
        if self.best_of not in (None, self.num_choices):
            raise ValueError("best_of: allowed is the value of n")
        if self.max_tokens == 0 and not (self.echo and not self.stream and self.num_choices == 1):
            raise ValueError("max_tokens 0 only makes sense with echo, without stream, and for one choice")
        if self.stream and (self.logprobs is not None or self.echo):
            raise ValueError("logprobs and echo are not given in streams; ask without stream")
        return self


Kind = TypeVar("Kind", ChatBody, CompletionBody)


def parse(kind: type[Kind], value: Any) -> Kind:
    """A body, checked.

    Raises:
        ApiError: 400, names the first wrong field.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problems = error.errors()
        where = ".".join(str(part) for part in problems[0]["loc"])
        kind_of_problem = problems[0]["type"]
        if kind_of_problem == "model_type":
            message = "the request's body must be a JSON object"
        elif problems[0]["loc"][:1] == ("prompt",) and kind_of_problem != "missing":
            where, message = "prompt", "prompt: allowed: a text, token ids, or a list of either"
        elif kind_of_problem == "extra_forbidden":
            message = f"{where}: not supported here; allowed: {', '.join(kind.model_fields)}"
        else:
            message = f"{where}: {problems[0]['msg'].removeprefix('Value error, ')}".removeprefix(": ")
        raise ApiError(400, message, param=where or None, code="invalid_value") from None
