"""Memory and work of a run, from configs and file headers: before any weights are loaded.

Peak = this process as it is + weights + caches of the rows in flight + activations of the largest forward (or, while
loading, the file that is being read). It is what a run reaches when its responses are as long as they may be.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from switchgen.config import CandidateConfig, Recipe
from switchgen.engines.transformers import MAX_PACKED
from switchgen.loading import pick_device

PROMPT_TOKENS = 96
"""A prompt's length where it is not known: tokens."""
SIGNATURE_TOKENS = 16
"""Roughly what signs one segment in the switcher's prompt."""
QUESTION_TOKENS = 28
ADAPTER_RANK = 16
"""Rank of the adapters in the arrangement that shares one base."""
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}
_QUANTIZED_BYTES = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
"""Of a weight of a linear layer under bitsandbytes; four bits come with a float32 for every 64 of them."""
_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelSize:
    """What a model needs in memory, as it will be loaded."""

    parameters: int
    weight_bytes: int
    cache_bytes_per_token: int
    activation_bytes_per_token: int = 0
    """Of one token in a packed read, at the widest point of a layer."""
    adapter_bytes: int = 0
    """A LoRA of rank 16 on the attention's projections."""
    own_adapter_bytes: int = 0
    """The candidate's own adapter over these weights."""


@dataclass(frozen=True)
class Arrangement:
    """One way to put a pool on devices."""

    name: str
    devices: int
    weights: int
    """Bytes of weights on the fullest device."""
    caches: int
    activations: int
    loading: int
    """Bytes of the largest file while it is read."""
    work: float = 0.0
    """Floating-point operations of one response of full length, on the busiest device."""

    @property
    def peak(self) -> int:
        """Bytes on the fullest device, the process itself not counted."""
        return self.weights + max(self.caches + self.activations, self.loading)


@dataclass(frozen=True)
class Load:
    """How much is in flight."""

    rows: int
    new_tokens: int
    segment: int
    prompt_tokens: int = PROMPT_TOKENS

    @classmethod
    def of(cls, recipe: Recipe) -> Load:
        """A recipe's."""
        rows = min(recipe.engine.max_rows, recipe.engine.kv_budget or recipe.engine.max_rows)
        return cls(rows, recipe.decoding.max_new_tokens, recipe.decoding.segment.tokens)

    @property
    def segments(self) -> int:
        """Segments of a response."""
        return -(-self.new_tokens // self.segment)

    def cache_bytes(self, size: ModelSize, *, switcher: bool = False) -> int:
        """All rows in flight, at their full length; the switcher reads signatures, too."""
        tokens = self.prompt_tokens + self.new_tokens + (self.segments * SIGNATURE_TOKENS if switcher else 0)
        return self.rows * tokens * size.cache_bytes_per_token

    def activation_bytes(self, size: ModelSize) -> int:
        """The largest read: every row's prompt at once, as far as one forward takes them."""
        return min(MAX_PACKED, self.rows * self.prompt_tokens) * size.activation_bytes_per_token


def arrangements(candidates: Sequence[tuple[str, ModelSize]], switcher: ModelSize, load: Load) -> list[Arrangement]:
    """Ways to place a pool whose switcher is an adapter over a candidate, fullest device first.

    Args:
        candidates: (model, its size); the same model twice is loaded once.
        switcher: the size of the switcher's base, which one of the candidates is.
    """
    sizes = [size for _, size in candidates]
    distinct = {model: size for model, size in candidates}
    caches = [load.cache_bytes(size) for size in sizes]
    of_switcher = load.cache_bytes(switcher, switcher=True)
    activations = max(load.activation_bytes(size) for size in [*sizes, switcher])
    files = max(size.weight_bytes for size in sizes)
    works = [_flops(size, load.prompt_tokens + load.new_tokens) for size in sizes]
    of_switcher_work = _flops(switcher, work_tokens(load, len(sizes))["read by the switcher"])
    own = sum(size.own_adapter_bytes for size in sizes)
    one = Arrangement(
        "all on one device", 1, sum(size.weight_bytes for size in distinct.values()) + own + switcher.adapter_bytes,
        sum(caches) + of_switcher, activations, files, sum(works) + of_switcher_work,
    )  # fmt: skip
    found = [one]
    if len(distinct) == len(candidates) > 1:
        alone = [
            Arrangement("a device per candidate", len(sizes),
                        size.weight_bytes + size.own_adapter_bytes + size.adapter_bytes,
                        cache + (of_switcher if size == switcher else 0), activations, size.weight_bytes)
            for size, cache in zip(sizes, caches, strict=True)
        ]  # fmt: skip
        # The switcher sits beside one of the candidates that have its shape.
        busiest = max([*works, works[sizes.index(switcher)] + of_switcher_work])
        found.append(replace(max(alone, key=lambda arrangement: arrangement.peak), work=busiest))
        if len(set(sizes)) == 1:
            shared = sizes[0].weight_bytes + (len(sizes) + 1) * sizes[0].adapter_bytes
            found.append(replace(one, name=f"adapters (r={ADAPTER_RANK}) over one base", weights=shared))
    return found


def _flops(size: ModelSize, tokens: float) -> float:
    """Of feeding so many tokens: two a weight, attention not counted."""
    return 2.0 * size.parameters * tokens


def work_tokens(load: Load, num_candidates: int) -> dict[str, float]:
    """What one response of full length costs, in tokens over all models, the writers drawn evenly.

    Each token is decoded once; every candidate reads its prompt and what the others wrote, the switcher everything,
    signed, and its question before each segment.
    """
    n = num_candidates
    switcher = load.prompt_tokens + load.new_tokens + load.segments * (SIGNATURE_TOKENS + QUESTION_TOKENS)
    return {
        "decoded": float(load.new_tokens),
        "read by candidates": n * load.prompt_tokens + (n - 1) * load.new_tokens,
        "read by the switcher": float(switcher) if n > 1 else 0.0,
    }


def model_size(config: CandidateConfig) -> ModelSize | None:
    """Sizes of a model that is on this machine, or whose configuration is; None where neither is so.

    Hub names are looked for in the hub's cache; nothing is asked of the network.
    """
    folder = _local_folder(config.model, "config.json", config.revision)
    if folder is None:
        return None
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = settings.get("text_config", settings)
    tensors = _tensors(folder) or _tensors_of_config(folder)
    parameters = sum(tensor.values for tensor in tensors)
    stored = sum(tensor.values * tensor.value_bytes for tensor in tensors)
    per_value = _DTYPE_BYTES.get(config.dtype)
    if per_value is None:
        # `auto` keeps the stored type on an accelerator, where quantized models are, and computes in float32 on CPU.
        on_cpu = config.quantization is None and pick_device(config.name, config.device).type == "cpu"
        per_value = 4 if on_cpu else max(1, stored // max(parameters, 1))
    quantized = _QUANTIZED_BYTES.get(config.quantization or "", float(per_value))
    weights = sum(tensor.values * (quantized if tensor.quantizable else per_value) for tensor in tensors)
    shape = _Shape(settings)
    return ModelSize(
        parameters, int(weights), shape.cache_values * per_value,
        shape.activation_values * per_value, shape.adapter_values(ADAPTER_RANK) * per_value, _own_adapter_bytes(config),
    )  # fmt: skip


def _own_adapter_bytes(config: CandidateConfig) -> int:
    """Of the candidate's adapter, which PEFT keeps in float32 at least; 0 without one, or where it is not here."""
    if config.adapter is None:
        return 0
    name, _, revision = config.adapter.partition("@")
    folder = _local_folder(name, "adapter_model.safetensors", revision or None)
    return 0 if folder is None else sum(tensor.values * max(4, tensor.value_bytes) for tensor in _tensors(folder))


def _local_folder(name: str, file: str, revision: str | None) -> Path | None:
    """The folder with a model's file: the path that was given, or a hub name's in the hub's cache."""
    if (Path(name) / file).is_file():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None  # a path
    return Path(found).parent if isinstance(found, str) else None


@dataclass(frozen=True)
class _Tensor:
    """One of a model's weights."""

    values: int
    value_bytes: int
    """As it is stored."""
    quantizable: bool
    """A linear layer's, other than the one that makes the logits."""


def _tensors(folder: Path) -> list[_Tensor]:
    """By the headers of the files; none where a file that the index names is missing."""
    for index in folder.glob("*.safetensors.index.json"):
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not all((folder / name).is_file() for name in names):
            return []
    return [
        _tensor(name, entry["shape"], _BYTES.get(entry["dtype"], 4))
        for path in folder.glob("*.safetensors")
        for name, entry in _header(path).items()
    ]


def _tensors_of_config(folder: Path) -> list[_Tensor]:
    """By the architecture, on torch's device without memory; none where transformers does not know it."""
    import torch  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, KeyError):
        return []
    stored = torch.empty(0, dtype=config.dtype or torch.float32).element_size()
    return [_tensor(name, weight.shape, stored) for name, weight in model.named_parameters()]


def _tensor(name: str, shape: Sequence[int], value_bytes: int) -> _Tensor:
    linear = len(shape) == 2 and not any(part in name for part in ("embed", "lm_head", "wte", "wpe"))
    return _Tensor(math.prod(shape), value_bytes, linear)


class _Shape:
    """A config's widths, whatever the architecture calls them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        def first(*names: str, default: int = 0) -> int:
            return next((int(settings[name]) for name in names if settings.get(name)), default)

        self.layers = first("num_hidden_layers", "n_layer")
        self.width = first("hidden_size", "n_embd")
        self.inner = first("intermediate_size", "n_inner", default=4 * self.width)
        self.heads = first("num_attention_heads", "n_head", default=1)
        self.kv_heads = first("num_key_value_heads", default=self.heads)
        self.head_size = first("head_dim", default=self.width // self.heads)

    @property
    def cache_values(self) -> int:
        """Keys and values that one token leaves in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_size

    @property
    def activation_values(self) -> int:
        """Values of a token alive at once in a feed-forward block: residual, its norm, gate, up, their product."""
        return 3 * self.inner + 3 * self.width

    def adapter_values(self, rank: int) -> int:
        """Values of a LoRA on the four projections of attention."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        return self.layers * rank * (2 * (self.width + q) + 2 * (self.width + kv))


def _header(path: Path) -> dict[str, Any]:
    with open(path, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header


def resident_bytes(read: Callable[[], str] = lambda: Path("/proc/self/status").read_text()) -> int:
    """What this process holds with its libraries loaded, as a run's will; 0 where the system does not say."""
    try:
        lines = read().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS:")), 0)
