"""Where questions come from."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from switchgen.config.section import Section


class TaskConfig(Section):
    """One task: a shipped task's name (a plain string will do), a file, or a hub data set."""

    shipped: str | None = Field(None, description="a shipped task's name (docs/scoring.md)")
    file: str | None = Field(None, description="a .json, .jsonl or .parquet file")
    hub: str | None = Field(None, description="a data set: a hub name or a local folder")
    config: str | None = Field(None, description="which configuration of the data set")
    name: str | None = Field(None, description="how results call it; default: the file's or the data set's name")
    split: str = Field("test", description="without effect: the stages name theirs (rollout.split, evaluate.split, …)")
    limit: int | None = Field(None, ge=1, description="the first rows that have an answer")
    metric: str | None = Field(None, description="what a response is worth; default: what the file says or holds")
    prompt: str | None = Field(
        None, description="the query's text, with the row's fields in braces: {input}, {choices}"
    )
    marker: str | None = Field(None, description="what announces the final answer, e.g. 'Answer:'")
    strict: bool | None = Field(None, description="whether a response without the marker is wrong")
    confidence: bool | None = Field(
        None, description="whether responses state their confidence, which `evaluate` compares with their being right"
    )
    fields: dict[str, str] | None = Field(
        None, description="for rows under other names: {input: column, output: column}"
    )

    @model_validator(mode="after")
    def _one_source(self) -> TaskConfig:
        if sum(source is not None for source in (self.shipped, self.file, self.hub)) != 1:
            raise ValueError("a task has exactly one source: a shipped task's name, file (a path) or hub (a data set)")
        return self

    @model_validator(mode="before")
    @classmethod
    def _plain_name(cls, value: Any) -> Any:
        return {"shipped": value} if isinstance(value, str) else value
