"""The one rule of the house: rollout, train, infer -> switchgen -> libraries; and what an import may cost."""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import os
import pkgutil
import re
import resource
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import switchgen
from switchgen.commandline import build_parser

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("rollout", "train", "infer")
FRONT_DOOR = ("switchgen.__main__", "switchgen.pipeline")
# Never loaded by the core: slow to import, optional, or with a mind of their own.
HEAVY = ("trl", "deepspeed", "ray", "wandb", "datasets")


@dataclass(frozen=True)
class Import:
    importer: str
    """Dotted name of the module that imports, e.g. `train.switcher`."""
    imported: str
    """Dotted name as written, made absolute, e.g. `switchgen.records.LabelRecord`."""
    lazy: bool
    """Whether it stands inside a function."""

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported}{' in a function' if self.lazy else ''}"

    def is_of(self, *modules: str) -> bool:
        return any(self.imported == module or self.imported.startswith(f"{module}.") for module in modules)


def imports_of(importer: str, tree: ast.AST, package: str, lazy: bool = False) -> Iterator[Import]:
    """Every import under a node: statements, relative ones too, and `import_module("a constant")`.

    `package` is what relative imports in the module `importer` start from.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(importer, alias.name, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = [node.module] if node.module else []
            if node.level:
                origin = package.split(".")[: len(package.split(".")) - node.level + 1] + origin
            yield from (Import(importer, ".".join([*origin, alias.name]), lazy) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (Import(importer, str(arg.value), lazy) for arg in node.args if isinstance(arg, ast.Constant))
        in_function = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from imports_of(importer, node, package, in_function)


def is_wrong(arrow: Import) -> bool:
    """Whether an import breaks the house's rule."""
    room = arrow.importer.partition(".")[0]
    if room in STAGES:
        others = [stage for stage in STAGES if stage != room]
        return arrow.is_of(*others, *FRONT_DOOR)
    if arrow.importer == "switchgen.__main__":
        return arrow.is_of(*STAGES, *FRONT_DOOR) and not arrow.lazy
    if arrow.importer == "switchgen.pipeline":
        return arrow.is_of("switchgen.__main__") or (arrow.is_of(*STAGES) and not arrow.lazy)
    return arrow.is_of(*STAGES, *FRONT_DOOR)


def project_imports() -> Iterator[Import]:
    for room in ("switchgen", *STAGES):
        for file in sorted((ROOT / room).rglob("*.py")):
            path = file.relative_to(ROOT).with_suffix("")
            is_package = path.name == "__init__"
            module = ".".join(path.parent.parts if is_package else path.parts)
            package = module if is_package else module.rpartition(".")[0]
            yield from imports_of(module, ast.parse(file.read_text(encoding="utf-8")), package)


@pytest.mark.parametrize(
    ("importer", "source", "wrong"),
    [
        ("train.switcher", "from switchgen.records import LabelRecord", False),
        ("train.switcher", "from train import lab", False),
        ("train.switcher", "from . import lab", False),
        ("train.switcher", "from rollout.states import State", True),
        ("train.switcher", "from ..infer import batch", True),
        ("train.switcher", "def f():\n    import infer.batch", True),
        ("train.switcher", "import importlib\nimportlib.import_module('infer.batch')", True),
        ("infer.batch", "if TYPE_CHECKING:\n    from train import lab", True),
        ("infer.batch", "from switchgen import pipeline", True),
        ("infer.batch", "import training", False),
        ("switchgen.loop", "def f():\n    from infer.batch import main", True),
        ("switchgen.policies.fixed", "from ..pipeline import run_all", True),
        ("switchgen.__main__", "def f():\n    from infer.batch import main", False),
        ("switchgen.__main__", "from infer.batch import main", True),
        ("switchgen.pipeline", "async def f():\n    import infer.batch", False),
        ("switchgen.pipeline", "class A:\n    import infer.batch", True),
    ],
)
def test_the_rule_itself(importer: str, source: str, wrong: bool) -> None:
    arrows = imports_of(importer, ast.parse(source), importer.rpartition(".")[0])
    assert any(is_wrong(arrow) for arrow in arrows) == wrong


def test_every_import_points_the_right_way() -> None:
    arrows = list(project_imports())
    assert len(arrows) > 50, "hardly any imports were found: is the walk looking in the right place?"
    assert [str(arrow) for arrow in arrows if is_wrong(arrow)] == []


def test_no_stage_file_bears_a_librarys_name() -> None:
    """Launchers put a script's folder first on the path, where `train/datasets.py` would hide the library."""
    ours = {"switchgen", *STAGES, "configs", "data"}
    constraints = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    libraries = {name.lower().replace("-", "_") for name in constraints} - ours
    libraries |= (sys.stdlib_module_names | set(importlib.metadata.packages_distributions())) - ours
    modules = [path for stage in STAGES for path in (ROOT / stage).rglob("*.py") if path.stem != "__init__"]
    assert [str(path.relative_to(ROOT)) for path in modules if path.stem in libraries] == []


def run_python(code: str, *arguments: str) -> str:
    """Runs code in a fresh interpreter that finds this checkout's packages, and nothing of the working folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_core_loads_no_heavy_library() -> None:
    modules = [module.name for module in pkgutil.walk_packages(switchgen.__path__, "switchgen.")]
    loaded = run_python(
        "import importlib, sys\n"
        "for module in sys.argv[1].split(): importlib.import_module(module)\n"
        "print(*sys.modules)",
        " ".join(modules),
    ).split()
    assert set(modules) <= set(loaded)
    assert [library for library in HEAVY if library in loaded] == []


def test_import_switchgen_alone_loads_no_library_at_all() -> None:
    loaded = run_python("import sys, switchgen; print(*sys.modules)").split()
    assert [library for library in (*HEAVY, "torch", "transformers", "pydantic") if library in loaded] == []


def verbs() -> list[str]:
    (choices,) = (
        action.choices for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    return sorted(choices)


@pytest.mark.parametrize("verb", ["", *verbs()])
def test_help_answers_within_a_second(verb: str) -> None:
    """In processor time, which is what a start takes on a free machine: it waits for nothing and uses one thread."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        text = run_python(
            "import sys\nfrom switchgen.__main__ import main\nmain(sys.argv[1:])", *([verb] if verb else []), "--help"
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert text.startswith("usage: switchgen")
    assert statistics.median(seconds) < 1, seconds
