"""What is made from the table of keys: the arguments in FP8Config's docstring, the table in the documentation."""

from __future__ import annotations

import re

from .keys import KEYS


def docstring_arguments() -> str:
    """The `Args` section of FP8Config's docstring."""
    lines = [f"    {key.name}: {key.text} ({key.values.text})." for key in KEYS.values()]
    return "\n".join(["Args:", *lines])


def markdown_table() -> str:
    """The table of keys in `docs/configuration.md`."""
    lines = ["| key | values | default | from | overrides | meaning |", "|---|---|---|---|---|---|"]
    for each in KEYS.values():
        default = f'"{each.default}"' if isinstance(each.default, str) else each.default
        meaning = f"{each.text}, see {each.see}" if each.see else each.text
        by_module = "yes" if each.of_module else ""
        cells = [f"`{each.name}`", each.values.text, f"`{default}`", each.origin, by_module, meaning]
        lines.append(re.sub(" +", " ", f"| {' | '.join(cells)} |"))
    return "\n".join(lines)
