"""`switchgen doctor`: machine, versions, recipe check, memory and cost, before anything is spent.

Sizes are read from the files' headers and the models' configs; no weights are loaded. Hub models that are not in the
local cache are named as unknown; of those whose config alone is there, the config says it.
"""

from __future__ import annotations

import os

from switchgen.assembly import check_writers, is_own_model
from switchgen.errors import SwitchgenError
from switchgen.estimates import Load, ModelSize, arrangements, model_size, resident_bytes, work_tokens
from switchgen.loading import check_model, pick_device
from switchgen.policies.masked import split_name
from switchgen.rundir import Run, provenance

_GIB = 2**30


def examine(run: Run) -> tuple[list[str], bool]:
    """The report's lines, and whether everything that the recipe names is there."""
    lines = [*_machine(run), ""]
    problems = _problems(run)
    lines += _memory(run)
    lines += ["", *_cost(run), ""]
    lines += [f"problem: {problem}" for problem in problems] or ["no problems found"]
    return lines, not problems


def _machine(run: Run) -> list[str]:
    import torch  # noqa: PLC0415

    found = provenance(run)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    versions = ", ".join(f"{name} {version or 'missing'}" for name, version in found["versions"].items())
    lines = [
        f"recipe    {run.source} (run folder {run.dir})",
        f"machine   {os.cpu_count()} CPUs, {memory:.1f} GiB of memory, {torch.cuda.device_count()} CUDA devices",
    ]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"          cuda:{index} {properties.name}, {properties.total_memory / _GIB:.1f} GiB")
    return [*lines, f"versions  Python {found['python']}, {versions}"]


def _problems(run: Run) -> list[str]:
    """What would end a run with an error, as far as it can be known without loading."""
    problems = []
    for config in run.recipe.pool:
        try:
            check_model(config)
            pick_device(config.name, config.device)
        except SwitchgenError as error:
            problems.append(str(error))
    # The switcher, the student and merged models come out of the run itself; their absence is no problem yet.
    made = ("switcher", "routing")
    policies = run.recipe.evaluate.policies
    known = [name for name in policies if split_name(name)[0] not in made and not is_own_model(name)]
    if not problems:
        try:
            check_writers(run, known)
        except SwitchgenError as error:
            problems.append(str(error))
    if run.recipe.tasks:
        from switchgen.tasks.splits import split_problems  # noqa: PLC0415

        problems += split_problems(run)
    return problems


def _memory(run: Run) -> list[str]:
    """What each model needs, and the peak of each way to place them."""
    load = Load.of(run.recipe)
    lines = [
        f"memory    {load.rows} rows in flight x {load.prompt_tokens} + {load.new_tokens} tokens (prompts of "
        f"{load.prompt_tokens} assumed)"
    ]
    sizes: list[tuple[str, ModelSize]] = []
    for config in run.recipe.pool:
        if config.server is not None:
            lines.append(f"          {config.name}: behind {', '.join(config.server.base_urls)}")
            continue
        size = model_size(config)
        if size is None:
            lines.append(
                f"          {config.name}: {config.model} is neither here nor in the hub's cache; size unknown"
            )
            continue
        shared = " (shared)" if any(model == config.model for model, _ in sizes) else ""
        sizes.append((config.model, size))
        adapter = f"adapter {_size(size.own_adapter_bytes)}, " if size.own_adapter_bytes else ""
        lines.append(
            f"          {config.name}: {size.parameters / 1e6:.2f} M parameters, weights {_size(size.weight_bytes)}"
            f"{shared}, {adapter}caches {_size(load.cache_bytes(size))}"
        )
    if len(sizes) < len(run.recipe.pool):
        return lines
    base = run.recipe.switcher.base
    bases = [index for index, config in enumerate(run.recipe.pool) if base in (config.name, config.model)]
    switcher = sizes[bases[0] if bases else -1][1]
    process = resident_bytes()
    lines.append(f"          this process as it is: {_size(process)}")
    if run.recipe.switcher.kind == "probe":
        lines.append("          with an LM switcher; a probe needs less, it has neither weights nor caches of its own:")
    for way in arrangements(sizes, switcher, load):
        devices = "" if way.devices == 1 else f" of {way.devices}, the fullest"
        lines.append(
            f"          {way.name}: peak {_size(process + way.peak)}{devices} (weights {_size(way.weights)}, caches "
            f"{_size(way.caches)}, activations {_size(way.activations)}); {_work(way.work)} a response"
            f"{' on the busiest' if way.devices > 1 else ''}"
        )
    return lines


def _cost(run: Run) -> list[str]:
    recipe = run.recipe
    rollout, decoding, n = recipe.rollout, recipe.decoding, len(recipe.pool)
    states = rollout.queries * rollout.states * rollout.rounds
    rounds = f"{rollout.rounds} rounds, " if rollout.rounds > 1 else ""
    questions = len(recipe.tasks) * (recipe.evaluate.limit or 0)
    responses = questions * len(recipe.evaluate.policies) * len(recipe.evaluate.seeds)
    most = rollout.racing.max if rollout.budget == "racing" else rollout.completions

    def written(completions: int) -> str:
        return f"{states * decoding.max_new_tokens * (1 + n * completions) / 1e6:.2f} M new tokens"

    lines = [
        f"cost      rollout: {rounds}{states} states x {n} branches x {most} completions, at most {written(most)} "
        "(less where responses end early)"
    ]
    if rollout.budget == "racing":
        start = rollout.racing.start
        lines.append(
            f"          racing: {start} completions a branch, more only where they can change the label: from "
            f"{written(start)} on; uniform with {most} spends the most on every branch"
        )
    if responses:
        lines.append(
            f"          evaluate: {responses} responses, at most "
            f"{responses * decoding.max_new_tokens / 1e6:.2f} M new tokens"
        )
    tokens = ", ".join(f"{count:.0f} {what}" for what, count in work_tokens(Load.of(recipe), n).items())
    lines.append(f"          a response of {decoding.max_new_tokens} tokens, in any arrangement: {tokens}")
    return lines


def _work(count: float) -> str:
    return f"{count / 1e12:.1f} TFLOP" if count >= 1e11 else f"{count / 1e9:.2f} GFLOP"


def _size(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.1f} MiB"
