"""Where questions come from."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from switchgen.config.section import Section


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
