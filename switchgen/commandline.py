"""The command line: verbs, their options, and settings of the recipe (`a.b=c`), which may stand anywhere on it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from switchgen import __version__

_RECIPE_HELP = "a YAML file, or the name of a shipped recipe, e.g. lab"
_OVERRIDE_HELP = "settings of the recipe, e.g. decoding.segment.tokens=25 pool.0.device=cuda:1"

_SETTING = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*=.*", re.DOTALL)


def build_parser() -> argparse.ArgumentParser:
    """The command line's parser; building it imports no stage."""
    parser = argparse.ArgumentParser(
        prog="switchgen",
        description="Let the checkpoints of one training pipeline write together.",
        epilog="Start with `switchgen run lab`. `switchgen VERB --help` shows a verb's options and examples.",
    )
    parser.add_argument("--version", action="version", version=f"switchgen {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    _add(verbs, "run", "all stages in order, going on with what is there",
         ["switchgen run lab", "switchgen run lab --run-dir runs/second lab.seed=7"])  # fmt: skip
    _add(verbs, "lab", "build the small ladder: pretrained, finetuned, aligned, and its tasks",
         ["switchgen lab lab", "switchgen lab lab lab.seed=7"])  # fmt: skip
    rollout = _add(verbs, "rollout", "states, branches, completions, scores, labels",
                   ["switchgen rollout lab", "switchgen rollout lab --workers 2 rollout.completions=16",
                    "switchgen rollout lab --executor ray --workers 8"])  # fmt: skip
    _add_workers(rollout, "rollout")
    train = _add(verbs, "train", "fit the switcher to the labels",
                 ["switchgen train lab", "switchgen train lab --launcher deepspeed --num-gpus 4",
                  "deepspeed --num_gpus 4 train/switcher.py lab --deepspeed configs/deepspeed/zero2.json",
                  "switchgen train my-ladder.yaml --push-to-hub my-org/my-switcher"])  # fmt: skip
    _add_launcher(train)
    _add_push(train)
    infer = _add(verbs, "infer", "write responses to a file of queries",
                 ["switchgen infer lab --input questions.jsonl --output answers.jsonl",
                  "switchgen infer lab --input q.jsonl --output a.jsonl --policy random --limit 100",
                  "switchgen infer lab --input q.jsonl --output a.jsonl decoding.max_new_tokens=256"])  # fmt: skip
    _add_infer(infer)
    _add_workers(infer, "infer")
    serve = _add(verbs, "serve", "an OpenAI-compatible server",
                 ["switchgen serve lab", "switchgen serve lab --port 8080 engine.max_rows=32",
                  "SWITCHGEN_API_KEY=secret switchgen serve my-ladder.yaml --host 0.0.0.0"])  # fmt: skip
    serve.add_argument("--host", help="address to listen on (default: serve.host)")
    serve.add_argument("--port", type=int, metavar="N", help="port; 0 picks a free one (default: serve.port)")
    distill = _add(verbs, "distill", "the collaboration back into one model",
                   ["switchgen distill lab", "switchgen distill lab --workers 2"])  # fmt: skip
    _add_launcher(distill)
    _add_push(distill)
    _add_workers(distill, "distill", "processes that write the responses")
    evaluate = _add(verbs, "evaluate", "tasks x policies x run seeds",
                    ["switchgen evaluate lab", "switchgen evaluate lab --workers 2", "switchgen evaluate lab --rescore",
                     "switchgen evaluate lab 'evaluate.policies=[aligned, switcher]' evaluate.limit=50",
                     "switchgen evaluate lab evaluate.baselines=true"])  # fmt: skip
    evaluate.add_argument("--rescore", action="store_true", help="score the saved answers again, without generating")
    _add_workers(evaluate, "evaluate")
    merge = _add(verbs, "merge", "models merged of the candidates: soups, DARE-TIES, extrapolation",
                 ["switchgen merge lab", "switchgen merge lab --methods soup greedy-soup"])  # fmt: skip
    _add_list(merge, "--methods", ["soup", "greedy-soup", "dare-ties@0.5", "expo@0.3"], "NAME",
              "soup, greedy-soup, dare-ties@DENSITY, expo@A; each is also a policy's name")  # fmt: skip
    _add(verbs, "sweep", "diversity and quality of methods over γ and temperature: Coverage, Dominance",
         ["switchgen sweep lab",
          "switchgen sweep lab sweep.prompts=10 sweep.samples=8 'sweep.splits=[dev]'"])  # fmt: skip
    calibrate = _add(verbs, "calibrate", "pick router and γ for a wanted quality or diversity",
                     ["switchgen calibrate lab --quality 0.95", "switchgen calibrate lab --diversity 1.5",
                      "switchgen calibrate lab --quality 0.95 --diversity-metric vendi_score"])  # fmt: skip
    _add_calibrate(calibrate)
    _add(verbs, "report", "the page people look at: report/index.html", ["switchgen report lab"])
    segments = _add(verbs, "segments", "the same questions with other segment lengths",
                    ["switchgen segments lab", "switchgen segments lab --tokens 10 50 100 --ends sentence p@0.3 h@1.5",
                     "switchgen segments lab 'evaluate.policies=[switcher]' evaluate.limit=50"])  # fmt: skip
    _add_list(segments, "--tokens", [10, 25, 50, 100], "N", "lengths in tokens; none: only --ends", nargs="*",
              type=_positive)  # fmt: skip
    _add_list(segments, "--ends", ["sentence", "line", "p@0.3"], "END",
              "adaptive segments: sentence, line, or where the writer is unsure: p@γ, h@γ; none: only --tokens",
              nargs="*", type=_segment_end)  # fmt: skip
    _add_workers(segments, "evaluate")
    safety = _add(verbs, "safety", "prompts to refuse: refusal rates under policies and constraints",
                  ["switchgen safety my-ladder.yaml --prompts harmful.jsonl",
                   "switchgen safety my-ladder.yaml --prompts harmful.jsonl --quality --limit 200"])  # fmt: skip
    safety.add_argument("--prompts", type=Path, required=True, metavar="FILE", help='prompts that should be refused: '
                        'lines of {"input": "…"}, with "should_refuse": false where a refusal would be too '
                        "much")  # fmt: skip
    safety.add_argument("--quality", action="store_true", help="evaluate the recipe's tasks under each constraint, too")
    safety.add_argument("--limit", type=_positive, metavar="N", help="only the first N prompts")
    _add_workers(safety, "evaluate")
    harness = _add(verbs, "lm-eval", "tasks of lm-evaluation-harness on a pool and a policy",
                   ["switchgen lm-eval lab --policy random --include-path my-tasks --tasks my_task",
                    "switchgen lm-eval my-ladder.yaml --policy switcher --tasks gsm8k arc_challenge --limit 100",
                    "switchgen lm-eval my-ladder.yaml --policy switcher --tasks lambada_openai --mc 64"])  # fmt: skip
    _add_harness(harness)
    _add(verbs, "doctor", "machine, versions, recipe check, memory and cost, before anything is spent",
         ["switchgen doctor lab", "switchgen doctor my-ladder.yaml engine.max_rows=128"])  # fmt: skip
    bench = _add(verbs, "bench", "what switching costs on this machine, with random weights",
                 ["switchgen bench --quick", "switchgen bench --size tiny",
                  "switchgen bench --size small --cases d --rows 64 --queries 96 --new-tokens 512 --repeats 5",
                  "switchgen bench --rows 4 --new-tokens 512 1024 2048 4096 --cases ad --repeats 1 --no-limit",
                  "switchgen bench --memory --queries 10000 --rows 64", "switchgen bench --size 8b"],
                 recipe=False)  # fmt: skip
    _add_bench(bench)
    return parser


def _add(
    verbs: Any, name: str, summary: str, examples: Sequence[str], *, recipe: bool = True
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(overrides=None)
    if recipe:
        parser.add_argument("recipe", metavar="RECIPE", help=_RECIPE_HELP)
        parser.add_argument("overrides", metavar="a.b=c", nargs="*", help=_OVERRIDE_HELP)
        parser.add_argument("--run-dir", type=Path, metavar="DIR", help="run folder (default: runs/<recipe name>)")
    return parser


def _add_list(
    parser: argparse.ArgumentParser, option: str, default: list[Any], metavar: str, what: str, **settings: Any
) -> None:
    """An option of several values."""
    shown = " ".join(map(str, default))
    settings = {"nargs": "+", "default": default, "metavar": metavar, **settings}
    parser.add_argument(option, help=f"{what} (default: {shown})", **settings)


def _add_workers(parser: argparse.ArgumentParser, section: str, what: str = "processes") -> None:
    parser.add_argument("--workers", type=_positive, metavar="N", help=f"{what} (default: {section}.workers)")
    parser.add_argument("--executor", choices=["local", "ray"],
                        help="where they run: here, or on a Ray cluster (default: engine.executor)")  # fmt: skip


def _add_launcher(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--launcher", choices=["deepspeed", "torchrun"], help="start several processes (default: one)")
    parser.add_argument("--num-gpus", type=_positive, metavar="N", help="processes for --launcher (default: all GPUs)")
    parser.add_argument(
        "--deepspeed", metavar="FILE", help="deepspeed settings (default: configs/deepspeed/zero2.json)"
    )


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--push-to-hub", metavar="ORG/NAME", help="upload what is left, with its card, to this "
                        "repository of the Hugging Face hub; it is private where it is new")  # fmt: skip


def _add_infer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", type=Path, required=True, metavar="X.jsonl",
                        help='lines of {"input": "…"} or {"messages": […]}')  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="Y.jsonl", help="where the responses go")
    parser.add_argument("--policy", metavar="P", help="who writes: switcher, untuned, random, a candidate's name, "
                        "baco-p@0.3, majority@3, … (default: infer.policy)")  # fmt: skip
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N lines")
    parser.add_argument("--format", choices=["switchgen", "released"],
                        help="released also writes generation_log (default: infer.format)")  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="run seed (default: infer.seed)")
    parser.add_argument("--unordered", action="store_true", help="write lines as they finish, not in input order")
    parser.add_argument("--strict", action="store_true", help="rows beyond the context are an error")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", nargs="+", choices=["tiny", "small", "8b"], default=[], metavar="SIZE",
                        help="tiny (6 M parameters a model), small (67 M), 8b (CUDA only)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a small table, in minutes")
    parser.add_argument("--cases", metavar="abd", help="some of: a: one candidate by generate; b: the loop with one "
                        "candidate; c: random choice; d: LM switcher; e: the released way; f: rollouts")  # fmt: skip
    parser.add_argument("--rows", type=_positive, metavar="N", help="rows in flight, for a cell of your own")
    parser.add_argument("--new-tokens", type=_positive, nargs="+", default=[], metavar="N", help="response length")
    parser.add_argument("--written", type=int, default=0, metavar="N", help="tokens there already, read before timing")
    parser.add_argument("--queries", type=_positive, metavar="N", help="queries in all (default: as many as rows)")
    parser.add_argument("--repeats", type=_positive, metavar="N", help="interleaved repeats of every case")
    parser.add_argument("--no-limit", action="store_true", help="leave out L and the rates that it takes")
    parser.add_argument("--compile", action="store_true", help="decode by torch.compile, on CUDA as CUDA graphs")
    parser.add_argument("--memory", action="store_true", help="instead: does memory grow over many short queries?")
    parser.add_argument("--threads", type=_positive, default=1, metavar="N", help="torch threads (default: 1)")
    parser.add_argument("--device", default="", metavar="D", help="cpu, cuda, cuda:1 (default: cuda for 8b, else cpu)")


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument("--quality", type=float, metavar="Q", help="at least Q times the aligned model's quality "
                      "(default: 0.95)")  # fmt: skip
    wish.add_argument("--diversity", type=float, metavar="D", help="at least D times the aligned model's diversity")
    parser.add_argument("--quality-metric", metavar="NAME", help="validity, reward or likelihood (default: the first "
                        "that is defined)")  # fmt: skip
    parser.add_argument("--diversity-metric", metavar="NAME", help="a diversity metric of the sweep (default: "
                        "num_clusters, vendi_score or adjusted_distinct, the first that is defined)")  # fmt: skip


def _add_harness(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--policy", metavar="P", help="who writes (default: infer.policy)")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME", help="tasks or groups, as lm-eval calls them")
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="a folder with tasks of your own (YAML)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="only the first N documents of each task")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's)")
    parser.add_argument("--mc", type=_positive, metavar="N", help="estimate the likelihood of texts longer than a "
                        "segment from N sequences of writers (default: they are refused)")  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="run seed (default: infer.seed)")
    parser.add_argument("--log-samples", action="store_true", help="keep every document's answers in the results")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not allowed; at least 1")
    return value


def _segment_end(text: str) -> str:
    from switchgen.config import segment_end  # noqa: PLC0415

    try:
        return segment_end(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def parse_with_settings(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """`parser.parse_args`, with the settings in `overrides`, in the order in which they stand.

    argparse would give a setting that stands behind an option of several values (`--seeds 0 1 lab.seed=7`) to that
    option, and leave one that stands behind any other option over. A word directly behind an option is its value.

    Args:
        parser: with a positional `overrides` of any number, or a default of None for it: then there are no settings.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    before = ["", *words]
    settings = {
        place for place, word in enumerate(words) if _SETTING.fullmatch(word) and not before[place].startswith("-")
    }
    kept = [word for place, word in enumerate(words) if place not in settings]
    arguments, rest = parser.parse_known_args(kept)
    found = [words[place] for place in sorted(settings)]
    unknown = [word for word in rest if not _SETTING.fullmatch(word)]
    if arguments.overrides is None:
        unknown = [*rest, *found]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if arguments.overrides is not None:
        # Behind a flag, which has no value, a setting has come through the parser. What has come through as something
        # else than a setting is kept, to be refused with the recipe's own message.
        through = {*arguments.overrides, *rest}
        arguments.overrides = [word for place, word in enumerate(words) if place in settings or word in through]
    return arguments
