"""Several processes for one fit: commands of the deepspeed and torchrun launchers, and what a rank knows of them."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from switchgen.commandline import parse_with_settings
from switchgen.config import CONFIGS_DIR, nearest
from switchgen.errors import ConfigError, SwitchgenError, WorkerError
from switchgen.ranks import is_main_process
from switchgen.rundir import Run, open_run, write_provenance

logger = logging.getLogger("switchgen")

Launcher = Literal["deepspeed", "torchrun"]


def barrier() -> None:
    """Wait for the other ranks."""
    import torch.distributed as dist  # noqa: PLC0415

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def deepspeed_file(name: str) -> str:
    """The path of a deepspeed settings file: as given, or shipped (`zero2`, `configs/deepspeed/zero2.json`).

    Raises:
        ConfigError: there is no such file.
    """
    shipped = {path.stem: path for path in sorted((CONFIGS_DIR / "deepspeed").glob("*.json"))}
    path = Path(name).expanduser()
    if path.is_file():
        return str(path.resolve())
    if path.stem in shipped and path.parent in (Path("."), Path("configs/deepspeed")):
        return str(shipped[path.stem])
    raise ConfigError(
        f"deepspeed settings {name!r}: no such file{nearest(path.stem, list(shipped))}; allowed: a JSON file, or "
        f"one of {', '.join(shipped)}"
    )


def deepspeed_settings(given: str | dict[str, Any] | None) -> dict[str, Any] | None:
    """What deepspeed settings say, whatever name or path they are given by; None for none.

    Raises:
        ConfigError: there is no such file, or it is no JSON object.
    """
    if not isinstance(given, str):
        return given
    path = deepspeed_file(given)
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"deepspeed settings {given!r}: {path} is no JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"deepspeed settings {given!r}: {path} holds no JSON object")
    return settings


def launch(
    run: Run,
    script: Path,
    launcher: Launcher,
    *,
    num_gpus: int | None = None,
    deepspeed: str | None = None,
    command: Sequence[str] = (),
) -> None:
    """Run a stage's file under a launcher and wait for it.

    Args:
        num_gpus: processes; default one per GPU.
        deepspeed: deepspeed settings; default ZeRO-2 under the deepspeed launcher.
        command: recipe and overrides as the user gave them; default: the recipe that `run` resolved.

    Raises:
        ConfigError: the launcher or its settings are missing.
        WorkerError: the launched processes failed.
    """
    if not command:
        write_provenance(run)
        command = [str(run.dir / "recipe.yaml")]
    words = launcher_command(
        script, launcher, num_gpus or _num_devices(), [*command, "--run-dir", str(run.dir)], deepspeed
    )
    logger.info("%s", " ".join(words))
    with subprocess.Popen(words) as processes:
        try:
            code = processes.wait()
        finally:
            if processes.poll() is None:
                processes.terminate()  # the launcher ends its ranks, and only then itself
    if code:
        raise WorkerError(f"the {launcher} processes ended with code {code}; their messages are above")


def launcher_command(
    script: Path, launcher: Launcher, num_processes: int, arguments: Sequence[str], deepspeed: str | None = None
) -> list[str]:
    """The command line that starts `script` in several processes on this machine."""
    program = _program(launcher)
    if deepspeed is not None or launcher == "deepspeed":
        arguments = [*arguments, "--deepspeed", deepspeed_file(deepspeed or "zero2")]
    if launcher == "deepspeed":
        head = [program, "--num_accelerators", str(num_processes), "--master_port", str(_free_port())]
    else:
        head = [program, "--standalone", "--nproc-per-node", str(num_processes)]
    return [*head, str(script.resolve()), *arguments]


def _program(launcher: Launcher) -> str:
    """The launcher beside this Python, or on the PATH."""
    beside = Path(sys.executable).with_name(launcher)
    program = str(beside) if beside.is_file() else shutil.which(launcher)
    if program is None:
        extra = " (pip install 'switchgen[deepspeed]')" if launcher == "deepspeed" else ""
        raise ConfigError(f"launcher {launcher!r} is not installed{extra}")
    return program


def _num_devices() -> int:
    import torch  # noqa: PLC0415

    return max(1, torch.cuda.device_count())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def script(main: Callable[..., dict[str, Any]]) -> int:
    """What a stage's file does when a launcher starts it; returns the exit code (0 done, 2 the input is wrong)."""
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415

    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*")
    parser.add_argument("--run-dir", type=Path, metavar="DIR")
    parser.add_argument("--deepspeed", metavar="FILE")
    parser.add_argument("--local_rank", "--local-rank", type=int, help="set by the launcher")
    arguments = parse_with_settings(parser)
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logger.setLevel(logging.INFO if is_main_process() else logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        run = open_run(arguments.recipe, arguments.overrides, arguments.run_dir)
        summary = main(run, deepspeed=arguments.deepspeed)
    except SwitchgenError as error:
        if is_main_process():
            logger.error("switchgen: %s", error)
        return 2
    if is_main_process():
        logger.info("%s", json.dumps(summary, ensure_ascii=False))
    return 0
