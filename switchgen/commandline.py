"""Command lines on which settings of the recipe (`a.b=c`) may stand anywhere: for the front door and for scripts."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

_SETTING = re.compile(r"[A-Za-z_]\w*(\.[\w-]+)*=.*", re.DOTALL)


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
