"""Models, adapters and tokenizers from folders and hub names; what is wrong with them is said first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from switchgen.config import CandidateConfig
from switchgen.errors import ModelError, one_line
from switchgen.vocabulary import Vocabulary

logger = logging.getLogger("switchgen")

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


# What is fetched of a hub repository: weights in safetensors, configuration, tokenizer.
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def load_model(config: CandidateConfig) -> PreTrainedModel:
    """Load a causal LM in eval mode: safetensors only, no code from its repository unless the recipe asks for it.

    Raises:
        ModelError: it is not there, is no causal LM, or its device or quantization cannot be had.
    """
    check_model(config)
    dtype: Any = _DTYPES.get(config.dtype, "auto")
    arguments: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "revision": config.revision,
                                 "trust_remote_code": config.trust_remote_code}  # fmt: skip
    if config.quantization is not None:
        from transformers import BitsAndBytesConfig  # noqa: PLC0415

        if not torch.cuda.is_available():
            raise ModelError(f"{config.name}: quantization {config.quantization} needs a CUDA device")
        four = config.quantization == "4bit"
        arguments["quantization_config"] = BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=not four)
    device = pick_device(config.name, config.device)
    if config.device_map is not None:
        arguments["device_map"] = config.device_map
        if config.device != "auto":
            logger.warning("%s: device has no effect: device_map says where its parts go", config.name)
    elif config.quantization is not None:
        arguments["device_map"] = {"": str(device)}  # quantized weights cannot be moved afterwards
    try:
        model, info = AutoModelForCausalLM.from_pretrained(config.model, output_loading_info=True, **arguments)
        if "device_map" not in arguments:
            model = model.to(device)
    except Exception as error:  # a broken file makes the libraries raise whatever they stumble over
        raise ModelError(f"{config.name}: model {config.model!r} cannot be loaded: {one_line(error)}") from None
    if incomplete := missing_weights(info):
        raise ModelError(f"{config.name}: model {config.model!r} {incomplete}")
    if unused := sorted(info["unexpected_keys"]):
        logger.warning("%s: %s has weights that a %s has no place for: %s", config.name, config.model,
                       type(model).__name__, _first_of(unused))  # fmt: skip
    # On CPU half precision is slow and the small models people run there lose by it; a set dtype is kept.
    if config.dtype == "auto" and device.type == "cpu" and model.dtype in (torch.float16, torch.bfloat16):
        model = model.float()
    return model.eval().requires_grad_(False)


def missing_weights(info: Mapping[str, Any]) -> str | None:
    """What a model's files lack; None where they are whole. transformers makes up at random what is not there.

    Args:
        info: what `from_pretrained` says with `output_loading_info`.
    """
    missing = sorted(info["missing_keys"])
    if not missing:
        return None
    return f"lacks weights: {_first_of(missing)}; allowed: a model whose files hold all that its config.json says"


def _first_of(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def check_model(config: CandidateConfig) -> None:
    """See that a model given as a path is there, before anything is loaded.

    Raises:
        ModelError: the path looks like a folder and is none, or holds no config.json.
    """
    path = Path(config.model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{config.name}: {config.model} is a folder without config.json; allowed: a saved model")
        if config.engine == "transformers" and not list(path.glob("*.safetensors")):
            raise ModelError(f"{config.name}: {config.model} holds no *.safetensors; other weight files are not read")
    elif config.model.startswith((".", "/", "~")) or config.model.count("/") > 1 or path.is_file():
        raise ModelError(f"{config.name}: no model folder at {config.model!r}")
    if config.adapter is not None:
        check_adapter(config.adapter)
    if config.device.startswith("cuda"):
        pick_device(config.name, config.device)


def check_adapter(path: str) -> None:
    """See that an adapter given as a path is a PEFT adapter in safetensors.

    Raises:
        ModelError: it is not.
    """
    folder = Path(path)
    if folder.is_dir():
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / name).is_file():
                raise ModelError(f"adapter {path!r}: the folder holds no {name}; allowed: a saved PEFT adapter")
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"adapter {path!r}: no such folder")


def adapter_folder(path: str) -> Path:
    """The folder of an adapter; the files of a hub name, or of `name@revision`, are fetched (`hub_folder`).

    Raises:
        ModelError: it is not there, or is no PEFT adapter in safetensors.
    """
    check_adapter(path)
    if Path(path).is_dir():
        return Path(path)
    name, _, revision = path.partition("@")
    folder = hub_folder(f"adapter {path!r}", name, revision or None)
    check_adapter(str(folder))
    return folder


def hub_folder(label: str, name: str, revision: str | None = None) -> Path:
    """The files of a hub name: looked for in the hub's cache, and downloaded where that is allowed; no pickles.

    Raises:
        ModelError: they cannot be had.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(f"{label}: {name!r} cannot be fetched: {one_line(error)}") from None


def pick_device(name: str, device: str) -> torch.device:
    """The torch device of a setting such as `auto` or `cuda:1`.

    Raises:
        ModelError: the device is not on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ModelError(f"{name}: unknown device {device!r}; allowed: auto, cpu, cuda, cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"{name}: device {device!r} is not here; this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return chosen


def load_vocabulary(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Vocabulary:
    """The tokenizer of a model.

    Raises:
        ModelError: it is missing or unusable.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # see `load_model`
        raise ModelError(f"the tokenizer of {source!r} cannot be loaded: {one_line(error)}") from None
    return Vocabulary(tokenizer, source)
