"""Progress where nobody looks at a bar: lines in the log."""

from __future__ import annotations

import logging

import pytest

import switchgen.progress
from switchgen.progress import progress


def test_a_log_gets_lines(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A stage whose output went to a file used to say nothing until it was done."""
    caplog.set_level(logging.INFO, logger="switchgen")
    with progress("rollout", total=600, done=20, unit="state") as advance:
        advance(7)
        assert [record.getMessage() for record in caplog.records] == ["rollout: 20 of 600 states are there"]
        monkeypatch.setattr(switchgen.progress, "LINE_SECONDS", 0.0)
        advance(7)
        advance(7)
    assert len(caplog.records) == 3
    assert caplog.records[-1].getMessage().startswith("rollout: 23 of 600 states, ")
    assert caplog.records[-1].getMessage().endswith(" tokens/s")
