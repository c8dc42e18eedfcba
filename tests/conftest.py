"""What every test stands on: one thread, no network, nothing random, and an honest list of what could not run.

A test that needs something the machine may lack says so, and is listed by name as NOT RUN where it is missing (with
``--strict-run``, which ``./scripts/test --strict`` passes on, that is an error):

- ``@pytest.mark.needs("g++", "python-headers")``: programs, by the names in ``PROGRAMS`` or on the PATH;
- the fixture ``test_data``: the folder of real data that the variable SWITCHGEN_TEST_DATA names;
- ``@pytest.mark.gpu``: a CUDA device (listed, but never an error: no script can install one).
"""

from __future__ import annotations

import os

# Before anything imports torch: the suite runs several processes side by side, each on one thread, and spinning OpenMP
# threads would slow all of them down. The hub and tracking variables also reach the processes that tests start.
os.environ.update(
    DS_ACCELERATOR="cpu",
    GOMP_SPINCOUNT="0",
    HF_DATASETS_OFFLINE="1",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",
    TOKENIZERS_PARALLELISM="false",
    WANDB_ERROR_REPORTING="false",
    WANDB_MODE="offline",
)

import ipaddress
import shutil
import signal
import socket
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_RUN = "NOT RUN: missing "
GPU = "a CUDA device"

# What a test may need, and where it is looked for; any other name is looked up on the PATH as it is.
PROGRAMS = {
    "chromium": ("chromium", "chromium-browser", "google-chrome"),
    "g++": ("g++", "c++"),
}

hypothesis.settings.register_profile("switchgen", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("switchgen")

# A shell that starts the suite in the background makes it ignore Ctrl-C, and every process it starts, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def find_program(name: str) -> str | None:
    """The path of a program (or of the interpreter's C headers, ``python-headers``); None where it is missing."""
    if name == "python-headers":
        header = Path(sysconfig.get_path("include"), "Python.h")
        return str(header) if header.is_file() else None
    return next((path for program in PROGRAMS.get(name, (name,)) if (path := shutil.which(program))), None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-run", action="store_true", help="a test that is listed as NOT RUN is an error")


def pytest_runtest_setup(item: pytest.Item) -> None:
    missing = [name for mark in item.iter_markers("needs") for name in mark.args if find_program(name) is None]
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            missing.append(GPU)
    if missing:
        pytest.skip(NOT_RUN + ", ".join(missing))


def tests_not_run(reporter: Any) -> list[tuple[str, str]]:
    """(missing things, test id) of each test that was skipped because something it needs is not there."""
    reasons = [
        (str(report.longrepr[2]).partition(NOT_RUN)[2], report.nodeid)
        for report in reporter.getreports("skipped")
        if isinstance(report.longrepr, tuple)
    ]
    return sorted(reason for reason in reasons if reason[0])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    not_run = tests_not_run(terminalreporter)
    for missing in sorted({missing for missing, _ in not_run}):
        terminalreporter.section(f"NOT RUN (missing: {missing})", yellow=True)
        for _, test in (entry for entry in not_run if entry[0] == missing):
            terminalreporter.write_line(test)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    is_worker = hasattr(session.config, "workerinput")
    if is_worker or reporter is None or not session.config.getoption("--strict-run"):
        return
    if exitstatus == pytest.ExitCode.OK and any(missing != GPU for missing, _ in tests_not_run(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


class NetworkRefusedError(RuntimeError):
    """A test reached for the network."""


def _is_local(address: Any) -> bool:
    """Whether an address (a path, or a tuple that starts with the host) stays on this machine."""
    host = address[0] if isinstance(address, tuple) else None
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        number = ipaddress.ip_address(host.decode() if isinstance(host, bytes) else host)
    except ValueError:  # another name, which would have to be looked up
        return False
    return number.is_loopback or number.is_unspecified


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Refuses connections and name lookups beyond this machine, loudly: an OSError would be taken for bad weather."""
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(address: Any) -> None:
        if not _is_local(address):
            raise NetworkRefusedError(f"tests are offline, but something reaches for {address!r}")

    def guarded_connect(self: socket.socket, address: Any) -> None:
        check(address)
        connect(self, address)

    def guarded_connect_ex(self: socket.socket, address: Any) -> int:
        check(address)
        return connect_ex(self, address)

    def guarded_getaddrinfo(host: Any, *args: Any, **kwargs: Any) -> Any:
        check((host,))
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket.socket, "connect_ex", guarded_connect_ex)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data (scored task files, real instructions) that SWITCHGEN_TEST_DATA names."""
    folder = os.environ.get("SWITCHGEN_TEST_DATA")
    if not folder:
        pytest.skip(NOT_RUN + "SWITCHGEN_TEST_DATA")
    path = Path(folder)
    assert path.is_dir(), f"SWITCHGEN_TEST_DATA names {folder}, which is no folder"
    return path


@pytest.fixture(scope="session")
def lab_ladder() -> Path:
    """The shipped small ladder: ``pretrained/``, ``finetuned/``, ``aligned/`` and ``tasks/``."""
    path = ROOT / "data" / "lab"
    assert path.is_dir(), f"{path} is part of the project, but it is not there"
    return path
