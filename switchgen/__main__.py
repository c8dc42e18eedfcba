"""The front door: what each verb does. `switchgen VERB RECIPE [a.b=c …]`; the options are in `commandline`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from switchgen.commandline import build_parser, parse_with_settings
from switchgen.errors import ConfigError, SwitchgenError, WorkerError

Verb = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 1 the work failed, 2 the user's input is wrong."""
    arguments = parse_with_settings(build_parser(), argv)
    _quiet()
    try:
        _run_verb(arguments)
    except SwitchgenError as error:
        print(f"switchgen: {error}", file=sys.stderr)  # noqa: T201
        return 2
    except WorkerError as error:
        print(f"switchgen: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        print("switchgen: stopped; start the same command again to go on", file=sys.stderr)  # noqa: T201
        return 130
    return 0


def _run_verb(arguments: argparse.Namespace) -> None:
    from switchgen.ranks import is_launched, lead  # noqa: PLC0415

    verb = VERBS[arguments.verb]
    if is_launched() and arguments.verb in SHARED:
        lead(lambda: verb(arguments))
    else:
        verb(arguments)


def _quiet() -> None:
    """Our own messages on stderr; the libraries' progress bars and notices off."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("switchgen").setLevel(logging.INFO)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Deprecations inside the libraries are not the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning)
    if not os.path.exists("/dev/nvidiactl"):
        # Where deepspeed is installed it looks for an accelerator when transformers imports it, and says so.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Idle threads that spin take the cores from the busy ones; must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", "0")


def _open(arguments: argparse.Namespace) -> Any:
    from switchgen.rundir import check_lab, open_run  # noqa: PLC0415

    executor = getattr(arguments, "executor", None)
    chosen = [] if executor is None else [f"engine.executor={executor}"]
    run = open_run(arguments.recipe, [*arguments.overrides, *chosen], arguments.run_dir)
    if arguments.verb not in ("lab", "doctor", "report"):
        check_lab(run)
    return run


def _run(arguments: argparse.Namespace) -> None:
    from switchgen.pipeline import run_all  # noqa: PLC0415

    say(run_all(arguments.recipe, arguments.overrides, arguments.run_dir))


def _lab(arguments: argparse.Namespace) -> None:
    from switchgen.pipeline import build_lab  # noqa: PLC0415

    say(f"ladder in {build_lab(_open(arguments))}")


def _rollout(arguments: argparse.Namespace) -> None:
    from rollout.stage import main as rollout  # noqa: PLC0415

    _report_summary(rollout(_open(arguments), workers=arguments.workers))


def _train(arguments: argparse.Namespace) -> None:
    from train.hub import fit_and_push  # noqa: PLC0415
    from train.switcher import main as train  # noqa: PLC0415

    run, options = _open(arguments), _launch_options(arguments)
    _report_summary(fit_and_push(lambda: train(run, **options), run.switcher_adapter, arguments.push_to_hub))


def _distill(arguments: argparse.Namespace) -> None:
    from train.distill import main as distill  # noqa: PLC0415
    from train.hub import fit_and_push  # noqa: PLC0415

    run, options = _open(arguments), _launch_options(arguments)
    _report_summary(
        fit_and_push(
            lambda: distill(run, workers=arguments.workers, **options), run.dir / "distilled", arguments.push_to_hub
        )
    )


def _launch_options(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.launcher is None:
        if arguments.num_gpus is not None or arguments.deepspeed is not None:
            raise ConfigError("--num-gpus and --deepspeed belong to --launcher; allowed launchers: deepspeed, torchrun")
        return {}
    return {"launcher": arguments.launcher, "num_gpus": arguments.num_gpus, "deepspeed": arguments.deepspeed,
            "command": [arguments.recipe, *arguments.overrides]}  # fmt: skip


def _infer(arguments: argparse.Namespace) -> None:
    from infer.batch import main as infer  # noqa: PLC0415

    run = _open(arguments)
    summary = infer(
        run,
        input=arguments.input,
        output=arguments.output,
        policy=arguments.policy or run.recipe.infer.policy,
        limit=arguments.limit,
        format=arguments.format or run.recipe.infer.format,
        unordered=arguments.unordered,
        strict=arguments.strict,
        seed=run.recipe.infer.seed if arguments.seed is None else arguments.seed,
        workers=arguments.workers,
    )
    _report_summary(summary)


def _serve(arguments: argparse.Namespace) -> None:
    from infer.serve.command import main as serve  # noqa: PLC0415

    serve(_open(arguments), host=arguments.host, port=arguments.port, say=say)


def _evaluate(arguments: argparse.Namespace) -> None:
    from infer.evaluation import main as evaluate  # noqa: PLC0415
    from infer.report import results_table  # noqa: PLC0415

    say(results_table(evaluate(_open(arguments), rescore=arguments.rescore, workers=arguments.workers)))


def _merge(arguments: argparse.Namespace) -> None:
    from infer.merging import main as merge  # noqa: PLC0415

    _report_summary(merge(_open(arguments), arguments.methods))


def _sweep(arguments: argparse.Namespace) -> None:
    from infer.report_sweep import sweep_table  # noqa: PLC0415
    from infer.sweep import main as sweep  # noqa: PLC0415

    say(sweep_table(sweep(_open(arguments))))


def _calibrate(arguments: argparse.Namespace) -> None:
    from infer.calibrate import calibration_table  # noqa: PLC0415
    from infer.calibrate import main as calibrate  # noqa: PLC0415

    document = calibrate(
        _open(arguments),
        quality=0.95 if arguments.quality is None and arguments.diversity is None else arguments.quality,
        diversity=arguments.diversity,
        quality_metric=arguments.quality_metric,
        diversity_metric=arguments.diversity_metric,
    )
    say(calibration_table(document))
    _report_summary({key: value for key, value in document.items() if key != "considered"})


def _report(arguments: argparse.Namespace) -> None:
    from infer.report import write_report  # noqa: PLC0415

    say(f"report: {write_report(_open(arguments).dir)}")


def _segments(arguments: argparse.Namespace) -> None:
    from infer.report_analyses import analyses_markdown, analyses_of  # noqa: PLC0415
    from infer.segment_lengths import main as segments  # noqa: PLC0415

    document = segments(_open(arguments), tokens=arguments.tokens, ends=arguments.ends, workers=arguments.workers)
    say(analyses_markdown(analyses_of({}, None, {"segments": document})))


def _safety(arguments: argparse.Namespace) -> None:
    from infer.report_analyses import analyses_markdown, analyses_of  # noqa: PLC0415
    from infer.safety import main as safety  # noqa: PLC0415

    document = safety(_open(arguments), arguments.prompts, quality=arguments.quality, limit=arguments.limit,
                      workers=arguments.workers)  # fmt: skip
    say(analyses_markdown(analyses_of({}, None, {"safety": document})))


def _lm_eval(arguments: argparse.Namespace) -> None:
    from infer.harness import main as lm_eval  # noqa: PLC0415

    table, path = lm_eval(
        _open(arguments),
        policy=arguments.policy,
        tasks=arguments.tasks,
        include_path=arguments.include_path,
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        mc=arguments.mc,
        seed=arguments.seed,
        log_samples=arguments.log_samples,
    )
    say(f"{table}\nresults: {path}")


def _doctor(arguments: argparse.Namespace) -> None:
    from rollout.questions import warn_of_budget  # noqa: PLC0415
    from switchgen.doctor import examine  # noqa: PLC0415

    run = _open(arguments)
    warn_of_budget(run.recipe.rollout)
    lines, sound = examine(run)
    say("\n".join(lines))
    if not sound:
        raise ConfigError("the recipe cannot run as it is; see the problems above")


def _bench(arguments: argparse.Namespace) -> None:
    from infer.bench.command import main as bench  # noqa: PLC0415

    _report_summary(bench(arguments, say))


def _report_summary(summary: dict[str, Any]) -> None:
    import json  # noqa: PLC0415

    say(json.dumps(summary, ensure_ascii=False))


def say(text: str) -> None:
    """A verb's result, on stdout. Where its reader has gone (`| head`) the rest is nobody's; the work is done."""
    try:
        print(text, flush=True)  # noqa: T201
    except BrokenPipeError:
        # Python flushes once more at its end, which must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


VERBS: dict[str, Verb] = {
    "run": _run,
    "lab": _lab,
    "rollout": _rollout,
    "train": _train,
    "infer": _infer,
    "serve": _serve,
    "distill": _distill,
    "evaluate": _evaluate,
    "merge": _merge,
    "sweep": _sweep,
    "calibrate": _calibrate,
    "report": _report,
    "segments": _segments,
    "safety": _safety,
    "lm-eval": _lm_eval,
    "doctor": _doctor,
    "bench": _bench,
}

SHARED = ("rollout", "infer", "evaluate", "segments", "safety")
"""Verbs whose work a launcher's ranks share. A fit's ranks each run the whole verb."""


if __name__ == "__main__":
    sys.exit(main())
