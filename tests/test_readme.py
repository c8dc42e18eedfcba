"""What the documents tell people to type works: commands parse, recipes load, files exist, Python examples run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from script_modules import load_script

from switchgen.commandline import build_parser, parse_with_settings
from switchgen.config import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[1]
# The log and the changelog speak of the past; everything else must hold today.
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "configs/**/*.md", "data/**/*.md")
    for path in ROOT.glob(pattern)
    if path.name not in ("LOG.md", "CHANGELOG.md")
)


class Block(NamedTuple):
    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def fenced_blocks(document: Path) -> list[Block]:
    """The fenced code blocks of a document, each with the line where it starts."""
    text = document.read_text(encoding="utf-8")
    return [
        Block(document, text[: match.start()].count("\n") + 1, match["language"], match["text"])
        for match in re.finditer(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]


BLOCKS = [block for document in DOCUMENTS for block in fenced_blocks(document)]


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block as lists of words: comments and leading variable settings dropped."""
    lines = block.text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [list(_without_settings(line)) for line in words if _without_settings(line)]


def _without_settings(words: list[str]) -> list[str]:
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


def blocks_in(*languages: str) -> list[pytest.param]:
    return [pytest.param(block, id=str(block)) for block in BLOCKS if block.language in languages]


def check_switchgen_command(words: list[str], folder: Path) -> None:
    """The front door takes the command, and its recipe (shipped, or shown in a document) loads with its overrides."""
    arguments = parse_with_settings(build_parser(), words)
    recipe = folder / arguments.recipe
    load_recipe(str(recipe) if recipe.exists() else arguments.recipe, arguments.overrides)


@pytest.fixture
def written_recipes(tmp_path: Path) -> Path:
    """A folder with the documents' recipes under the names their first line gives them (`# my-ladder.yaml`)."""
    for block in BLOCKS:
        title = re.match(r"# (\S+\.yaml)\b", block.text) if block.language == "yaml" else None
        if title:
            (tmp_path / title[1]).write_text(block.text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("block", blocks_in("bash"))
def test_shell_commands_would_run(block: Block, written_recipes: Path) -> None:
    for program, *words in commands(block):
        if program == "switchgen":
            check_switchgen_command(words, written_recipes)
        elif program.startswith("./"):
            assert os.access(ROOT / program, os.X_OK), f"{program} is no executable file of the project"


@pytest.mark.parametrize("block", blocks_in("yaml"))
def test_yaml_blocks_are_recipes_or_parts_of_one(block: Block, tmp_path: Path) -> None:
    settings = yaml.safe_load(block.text)
    assert set(settings) <= set(Recipe.model_fields), "an unknown section"
    if "pool" in settings:
        (tmp_path / "recipe.yaml").write_text(block.text, encoding="utf-8")
        load_recipe(str(tmp_path / "recipe.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks_in("python"))
def test_python_examples_run(block: Block, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with ExitStack() as stack:
        text = block.text
        if EXAMPLE_ADDRESS in text:
            text = text.replace(EXAMPLE_ADDRESS, stack.enter_context(served_lab(tmp_path, environment)))
        process = subprocess.run(
            [sys.executable, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
    assert process.returncode == 0, process.stderr


EXAMPLE_ADDRESS = "http://127.0.0.1:8000/v1"


@contextmanager
def served_lab(folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The address at which a server of the shipped ladder answers."""
    command = [sys.executable, "-m", "switchgen", "serve", "lab", "infer.policy=random", "--port", "0"]
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip().rpartition(" at ")[2]
        finally:
            process.kill()


@pytest.mark.parametrize("document", [pytest.param(path, id=str(path.relative_to(ROOT))) for path in DOCUMENTS])
def test_what_is_named_in_passing_exists(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for verb in re.findall(r"`switchgen ([a-z-]+)", prose):
        # Exits on an unknown verb.
        build_parser().parse_known_args([verb, "RECIPE", "--input", "X", "--output", "Y", "--prompts", "Z"])
    links = [link for link in re.findall(r"\]\(([^)#\s]+)\)", prose) if "://" not in link]
    # `rollout/summary.json` and the like are in a run folder: of the stages, only code is ours.
    paths = re.findall(r"`(?:\./)?((?:configs|data|tests|scripts|docs)/[\w./-]*)`", prose)
    paths += re.findall(r"`((?:switchgen|rollout|train|infer)/[\w./-]*(?:\.py|/))`", prose)
    missing = [link for link in links if not (document.parent / link).exists()]
    missing += [path for path in paths if not (ROOT / path).exists()]
    assert missing == []


def test_the_page_of_fields_is_the_recipe_s() -> None:
    """Made anew by `python scripts/recipe_fields.py`; every field says what it is for."""
    page = load_script("recipe_fields").page()
    assert (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8") == page
    assert [line for line in page.splitlines() if line.endswith("|  |")] == []


def test_the_readme_shows_the_two_commands_and_a_python_example() -> None:
    readme = [block for block in BLOCKS if block.document == ROOT / "README.md"]
    typed = [command[0] for block in readme if block.language == "bash" for command in commands(block)]
    assert typed[:2] == ["./scripts/demo", "./scripts/test"]
    assert any(block.language == "python" for block in readme)
