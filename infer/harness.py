"""`switchgen lm-eval`: any task of lm-evaluation-harness on a pool and a policy.

RUN/lm-eval/<policy>--<tasks>.json   the harness's results, its samples with --log-samples
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infer.responses import file_name
from switchgen.errors import ConfigError
from switchgen.files import write_json
from switchgen.rundir import Run


def main(
    run: Run,
    *,
    policy: str | None = None,
    tasks: Sequence[str] = (),
    include_path: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    mc: int | None = None,
    seed: int | None = None,
    log_samples: bool = False,
) -> tuple[str, Path]:
    """Evaluate by the harness.

    Args:
        tasks: names of tasks or groups that the harness knows, or of those in `include_path`.
        mc: writer sequences from which texts beyond one segment are estimated.

    Returns:
        The harness's table, and where its results are.

    Raises:
        ConfigError: the harness is missing, no task, or one that it does not know.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm-evaluation-harness is missing; install it with `pip install 'switchgen[lm-eval]'`")
    if not tasks:
        raise ConfigError("lm-eval: no tasks; name them, e.g. --tasks gsm8k arc_challenge")
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"--include-path {include_path}: no such folder; allowed: a folder with tasks' YAML files")
    from lm_eval import simple_evaluate  # noqa: PLC0415
    from lm_eval.tasks import TaskManager  # noqa: PLC0415
    from lm_eval.utils import handle_non_serializable, make_table  # noqa: PLC0415

    from infer.harness_model import SwitchgenLM  # noqa: PLC0415

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ConfigError(
            f"lm-eval: unknown task {unknown[0]!r}; allowed: the names that `lm-eval ls tasks` lists"
            + ("" if include_path is None else f", and those of the YAML files in {include_path}")
        )
    model = SwitchgenLM(run=run, policy=policy, mc=mc, seed=seed)
    found = simple_evaluate(
        model, tasks=list(tasks), limit=limit, num_fewshot=num_fewshot, task_manager=manager, log_samples=log_samples
    )
    results: dict[str, Any] = {} if found is None else dict(found)
    path = run.dir / "lm-eval" / f"{file_name(model.policy)}--{file_name('+'.join(tasks))}.json"
    # The harness's results hold functions and arrays, for which it has its own rule.
    write_json(path, json.loads(json.dumps(results, default=handle_non_serializable)))
    return make_table(results), path
