"""What the user got wrong, as exceptions, and work that failed. Our own mistakes are `assert`s."""

from __future__ import annotations


class SwitchgenError(ValueError):
    """The user's input cannot be used. The message says what was got, where, and what is allowed."""


class ConfigError(SwitchgenError):
    """A recipe, an override or an option is wrong."""


class DataError(SwitchgenError):
    """An input file or one of its lines is wrong."""


class ServerError(SwitchgenError):
    """A server that a recipe names does not answer, or refuses what it is asked."""


class ModelError(SwitchgenError):
    """A model, adapter or tokenizer is missing, broken, or does not fit its pool."""


class WorkerError(RuntimeError):
    """A process of the work failed or was killed: nobody's wrong input. What is finished is kept."""


def no_number(model: str) -> ModelError:
    """A model's logits are NaN: what is drawn from them would be some token, and the same one again and again."""
    return ModelError(
        f"{model}: its logits are no numbers (NaN); half precision may be too narrow for it: try dtype: bfloat16 or "
        "float32"
    )


def one_line(error: Exception) -> str:
    """A library's message on one line, at most 300 characters of it."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " …"
