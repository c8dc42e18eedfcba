"""The same evaluation under other settings, in a folder of its own inside the run folder."""

from __future__ import annotations

from typing import Any

from switchgen.assembly import is_own_model
from switchgen.config import check_recipe
from switchgen.rundir import Run


def sub_run(run: Run, place: str, updates: dict[str, Any]) -> Run:
    """A run in `RUN/<place>` whose recipe differs by `updates`; it uses the run's own switcher.

    Args:
        updates: sections of the recipe, as plain values, merged into it.

    Raises:
        ConfigError: the settings do not go together.
    """
    data = run.recipe.model_dump()
    if data["switcher"]["adapter"] is None and run.switcher_adapter.is_dir():
        data["switcher"]["adapter"] = str(run.switcher_adapter.resolve())
    for section, values in updates.items():
        data[section] = {**data[section], **values} if isinstance(values, dict) else values
    return Run(run.name, check_recipe(data, f"{run.source}, {place}"), run.dir / place, run.source)


def choosing(run: Run, policies: list[str]) -> list[str]:
    """Policies that a changed setting may change: no models that the run has made; those live in its own folder."""
    return [policy for policy in policies if not is_own_model(policy)]
