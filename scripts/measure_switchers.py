"""Switchers of different sizes: label skill, end-task outcome, added cost, in one table.

    python scripts/measure_switchers.py --run-dir runs/lab [--seeds 0 1 2] [--limit 120]
    python scripts/measure_switchers.py --run-dir runs/lab --switchers lora probe:aligned --limit 20    # to see it work

The run folder holds a finished rollout (`switchgen rollout lab`); every switcher is fitted to the same labels in a
folder of its own (RUN/switchers/<name>, gone on with if it is there). `lora` is the recipe's switcher,
`probe:<candidate>` a linear head on that candidate's hidden state, anything else a model's folder or hub name: an LM
with the recipe's LoRA.

Skill is measured on held-out queries. The outcome is `evaluate`'s mean on the test split over all run seeds. Added cost
is what the engines read more, per response, than when the same responses are written by the same writers and nobody is
asked (a replay, on the first seed's questions): in tokens, and in multiplications with a weight (tokens x parameters of
the model that reads them) as a share of the replay's. One JSON line last.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infer.evaluation import main as evaluate
from infer.questions import load_questions
from switchgen.api import response_seed
from switchgen.assembly import load_writers
from switchgen.commandline import parse_with_settings
from switchgen.loop import Loop
from switchgen.policies import Choice
from switchgen.rows import Row
from switchgen.rundir import Run, open_run
from switchgen.trace import Query
from train.switcher import main as train

DEFAULT = ("lora", "probe:pretrained", "probe:finetuned", "probe:aligned")


class Replay:
    """The writers of earlier responses once more, nobody asked."""

    name = "replay"
    engine = None

    def __init__(self, writers: dict[int, list[int]]) -> None:
        self.by_seed = writers

    def writers(self, num_candidates: int) -> Sequence[int]:
        return range(num_candidates)

    def choose(self, rows: Sequence[Row]) -> Choice:
        return Choice([self.by_seed[row.trace.seed][len(row.trace.segments)] for row in rows])


def run_of(arguments: argparse.Namespace, name: str) -> Run:
    """The recipe with this switcher, in a folder of its own that has the rollout's labels."""
    kind, _, host = name.partition(":")
    choice = {"lora": []}.get(name, [f"switcher.base={name}"])
    if kind == "probe":
        choice = ["switcher.kind=probe", f"switcher.base={host}"]
    seeds = f"evaluate.seeds=[{','.join(map(str, arguments.seeds))}]"
    own = ["evaluate.policies=[switcher]", "evaluate.against=null", seeds, f"evaluate.limit={arguments.limit}"]
    folder = arguments.run_dir / "switchers" / name.strip("/").replace("/", "_").replace(":", "-")
    if (arguments.run_dir / "lab").exists() and not (folder / "lab").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lab").symlink_to((arguments.run_dir / "lab").resolve(), target_is_directory=True)
    if not (folder / "rollout").exists():
        shutil.copytree(arguments.run_dir / "rollout", folder / "rollout")
    return open_run(arguments.recipe, [*choice, *own, *arguments.overrides], folder)


def asked_rows(run: Run, pool: Any, seed: int) -> Iterator[Row]:
    """A row for each test question."""
    for questions in load_questions(run):
        for example in questions.examples:
            name = f"{questions.name}/{example.id}"
            yield Row(pool, Query(name, example.messages), response_seed(seed, name))


def engine_work(loop: Loop, rows: Iterator[Row]) -> tuple[dict[str, float], dict[int, list[int]]]:
    """Tokens that went through each engine, and who wrote what."""
    for _, engine in loop.readers:
        engine.stats = type(engine.stats)()
    writers = {row.trace.seed: [segment.writer for segment in row.trace.segments] for row in loop.run(rows)}
    tokens = {}
    for _, engine in loop.readers:
        stats = engine.stats
        tokens[engine.name] = stats.read_tokens + stats.scored_tokens + stats.decoded_tokens
    return tokens, writers


def added_cost(run: Run, seed: int) -> dict[str, float]:
    """Tokens and weighted tokens a response that the switcher adds; see the module."""
    writer = load_writers(run, ["switcher"])["switcher"]
    asked = Loop(writer.pool, writer.policy, run.recipe.decoding, max_rows=run.recipe.engine.max_rows)
    with_switcher, writers = engine_work(asked, asked_rows(run, writer.pool, seed))
    replay = Loop(writer.pool, Replay(writers), run.recipe.decoding, max_rows=run.recipe.engine.max_rows)
    without, again = engine_work(replay, asked_rows(run, writer.pool, seed))
    assert again == writers, "a replay writes the same"
    sizes = {
        engine.name: sum(parameter.numel() for parameter in engine.model.parameters()) for _, engine in asked.readers
    }
    weighted = [
        sum(sizes[name] * count for name, count in tokens.items()) / len(writers) for tokens in (with_switcher, without)
    ]
    return {
        "added_tokens": round((sum(with_switcher.values()) - sum(without.values())) / len(writers), 1),
        "added_share": round(weighted[0] / weighted[1] - 1, 4),
        "added_gflops": round(2 * (weighted[0] - weighted[1]) / 1e9, 4),
    }


def measure(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """One row of the table."""
    run = run_of(arguments, name)
    summary = train(run)
    facts = json.loads((run.switcher_adapter / "switchgen.json").read_text())
    rows = [row for row in evaluate(run)["rows"] if row["task"] == "mean" and row["seed"] is None]
    figures = {key: rows[0][key] for key in ("value", "low", "high")} if rows else {}
    return {
        "switcher": name,
        **{key: summary[key] for key in ("accuracy", "majority", "n_held_out")},
        "label_outcome": facts.get("outcome"),
        "label_outcome_best": facts.get("outcome_best"),
        "end_task": figures,
        **added_cost(run, arguments.seeds[0]),
        "fit_seconds": facts["seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="lab")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--switchers", nargs="+", default=list(DEFAULT), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=120)
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    arguments = parse_with_settings(parser)
    table = []
    for name in arguments.switchers:
        table.append(measure(arguments, name))
        print(json.dumps(table[-1]), flush=True)
    print(json.dumps({"switchers": table, "seeds": arguments.seeds, "limit": arguments.limit}))


if __name__ == "__main__":
    main()
