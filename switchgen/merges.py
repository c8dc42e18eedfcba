"""Candidates merged into one model: soups, DARE-TIES, extrapolation. Made once, tensor by tensor, in safetensors.

    soup           the mean of all candidates' weights
    greedy-soup    candidates join a mean, best one first, as long as the dev score does not fall (Wortsman et al. 2022,
                   arXiv 2203.05482; chosen by `infer.merging`)
    dare-ties@D    the first candidate + the DARE-TIES merge of the others' task vectors at density D (Yu et al. 2024,
                   arXiv 2311.03099; Yadav et al. 2023, arXiv 2306.01708; `peft.utils.merge_utils`)
    expo@A         aligned + A (aligned - the candidate before it on the ladder) (Zheng et al. 2024, arXiv 2404.16792)

A task vector is a candidate's weights minus the first candidate's. The merged model is `RUN/merged/<name>`; it reads
prompts as the last candidate does.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from switchgen.config import CandidateConfig
from switchgen.errors import ConfigError, ModelError
from switchgen.files import finished_folder, write_json
from switchgen.ids import derive_seed
from switchgen.loading import hub_folder
from switchgen.rundir import Run
from switchgen.weights import weights_hash

logger = logging.getLogger("switchgen")

Method = Literal["soup", "greedy-soup", "dare-ties", "expo"]
MERGES: dict[str, str | None] = {"soup": None, "greedy-soup": None, "dare-ties": "0.5", "expo": "0.3"}
"""Methods and an example of what stands after their @."""

_SHARD_BYTES = 4 * 2**30
# What a model folder holds beside its weights.
_KEPT = (".json", ".jinja", ".model", ".txt")

Combine = Callable[[str, list[torch.Tensor]], torch.Tensor]
"""(tensor's name, that tensor of each candidate in float32) → the merged tensor."""


@dataclass(frozen=True)
class MergeName:
    """A merged model's name taken apart: `expo@0.3`."""

    method: Method
    value: float


def is_merge(name: str) -> bool:
    """Whether a policy's name means a merged model, well formed or not."""
    return name.partition("@")[0] in MERGES


def parse_merge(name: str) -> MergeName:
    """Take a merged model's name apart.

    Raises:
        ConfigError: a number is missing, out of range, or stands where there is none.
    """
    method, at, text = name.partition("@")
    example = MERGES[method]
    if example is None:
        if at:
            raise ConfigError(f"policy {name!r}: {method} has no number; write {method}")
        return MergeName(method, 0.0)  # type: ignore[arg-type]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    high = 1.0 if method == "dare-ties" else 10.0
    if not 0 < value <= high:
        raise ConfigError(
            f"policy {name!r}: after @ stands a number above 0, at most {high:g}, e.g. {method}@{example}"
        )
    return MergeName(method, value)  # type: ignore[arg-type]


def check_merge(name: str, names: Sequence[str]) -> None:
    """See that a merged model's name can work with candidates of these names.

    Raises:
        ConfigError: it cannot.
    """
    parse_merge(name)
    if len(names) < 2:
        raise ConfigError(f"policy {name!r} merges candidates; the pool has only {names[0]!r}")


def merged_folder(run: Run, name: str) -> Path:
    """Where a merged model is kept."""
    return run.dir / "merged" / name


def merged_candidate(run: Run, name: str) -> CandidateConfig:
    """A merged model as a candidate: the last one's settings with the merged weights."""
    update = {"model": str(merged_folder(run, name)), "adapter": None, "name": "merged", "revision": None}
    return run.recipe.pool[-1].model_copy(update=update)


def merge_claim(run: Run) -> dict[str, Any]:
    """What a merged model depends on."""
    return {
        "weights": [weights_hash(config.model, config.revision) for config in run.recipe.pool],
        "seed": run.recipe.baselines.seed,
    }


def is_merged(run: Run, name: str) -> bool:
    """Whether the merged model is there, made of the candidates as they are now."""
    facts = merged_folder(run, name) / "switchgen.json"
    return facts.is_file() and json.loads(facts.read_text(encoding="utf-8"))["made_of"] == merge_claim(run)


def combination(name: str, num_candidates: int, seed: int) -> Combine:
    """How a method that needs no evaluation combines a tensor."""
    parsed = parse_merge(name)
    if parsed.method == "expo":
        return lambda _, tensors: tensors[-1] + parsed.value * (tensors[-1] - tensors[-2])
    if parsed.method == "dare-ties":
        return lambda key, tensors: _dare_ties(tensors, parsed.value, derive_seed(seed, "dare", key))
    assert parsed.method == "soup"
    return mean_of(range(num_candidates))


def mean_of(members: Sequence[int]) -> Combine:
    """The mean of some candidates' tensors."""
    return lambda _, tensors: torch.stack([tensors[index] for index in members]).mean(dim=0)


def _dare_ties(tensors: list[torch.Tensor], density: float, seed: int) -> torch.Tensor:
    from peft.utils.merge_utils import dare_ties  # noqa: PLC0415

    base, *others = tensors
    vectors = [tensor - base for tensor in others]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        merged: torch.Tensor = dare_ties(vectors, torch.ones(len(vectors)), density)
    return base + merged


def write_merged(run: Run, name: str, combine: Combine, facts: dict[str, Any]) -> Path:
    """Merge the run's candidates into `RUN/merged/<name>`; one tensor of each is in memory at a time, and one shard.

    Args:
        facts: kept in its `switchgen.json`.

    Raises:
        ModelError: a candidate is an adapter, or the candidates' tensors differ in name or shape.
    """
    sources = [_local_folder(config) for config in run.recipe.pool]
    target = merged_folder(run, name)
    with finished_folder(target) as folder, ExitStack() as stack:
        places = [_open_tensors(source, stack) for source in sources]
        keys = sorted(places[-1])
        for config, place in zip(run.recipe.pool, places, strict=True):
            if wrong := sorted(set(place) ^ set(keys)):
                raise ModelError(
                    f"policy {name!r}: {config.name} and {run.recipe.names[-1]} are not of one shape: only one of "
                    f"them has the tensor {wrong[0]!r}"
                )
        _write_shards(folder, keys, lambda key: _merge_tensor(run, name, key, places, combine))
        for path in sources[-1].iterdir():
            if path.is_file() and path.suffix in _KEPT and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
        write_json(folder / "switchgen.json", {"schema": 1, "merge": name, "made_of": merge_claim(run), **facts})
    return target


def _merge_tensor(run: Run, name: str, key: str, places: Sequence[dict[str, Any]], combine: Combine) -> torch.Tensor:
    tensors = [place[key].get_tensor(key) for place in places]
    shapes = {tensor.shape for tensor in tensors}
    if len(shapes) > 1:
        shown = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(run.recipe.names, tensors, strict=True))
        raise ModelError(f"policy {name!r}: the candidates' weights differ in shape: {key} is {shown}")
    if not tensors[-1].is_floating_point():
        last: torch.Tensor = tensors[-1]
        return last
    # In float32 at least: half precision would round the differences away.
    wide = torch.promote_types(tensors[-1].dtype, torch.float32)
    return combine(key, [tensor.to(wide) for tensor in tensors]).to(tensors[-1].dtype).contiguous()


def _local_folder(config: CandidateConfig) -> Path:
    """The candidate's files; a hub name's are looked for in the hub's cache, and downloaded where that is allowed."""
    if config.engine != "transformers":
        raise ModelError(f"{config.name}: is behind a server (engine: {config.engine}); its weights are not here")
    if config.adapter is not None:
        raise ModelError(f"{config.name}: is an adapter over {config.model}; weights are merged of whole models only")
    if Path(config.model).is_dir():
        return Path(config.model)
    return hub_folder(config.name, config.model, config.revision)


def _open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Open file of each tensor, by the tensor's name."""
    from safetensors import safe_open  # noqa: PLC0415

    place: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        opened = stack.enter_context(safe_open(path, framework="pt"))
        place.update(dict.fromkeys(opened.keys(), opened))
    if not place:
        raise ModelError(f"{folder} holds no *.safetensors; other weight files are not read")
    return place


def _write_shards(folder: Path, keys: Sequence[str], make: Callable[[str], torch.Tensor]) -> None:
    """Write tensors as `model.safetensors`, or as shards with an index where they are more than one shard holds."""
    from safetensors.torch import save_file  # noqa: PLC0415

    parts: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal pending, size
        save_file(pending, folder / f"part-{len(parts)}.safetensors", metadata={"format": "pt"})
        parts.append(list(pending))
        pending, size = {}, 0

    for key in keys:
        tensor = make(key)
        pending[key] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= _SHARD_BYTES:
            flush()
    if pending:
        flush()
    names = [f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors" for i in range(len(parts))]
    if len(parts) == 1:
        names = ["model.safetensors"]
    for number, name in enumerate(names):
        (folder / f"part-{number}.safetensors").rename(folder / name)
    if len(parts) > 1:
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
