"""Entries of a configuration that do nothing, because the modules they mean stay in high precision anyway."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence

from ..config import FP8Config
from ..modules.handler import Reason, Why

logger = logging.getLogger(__name__)

Known = tuple[Sequence[str], Sequence[str], Why]


def warn_of_idle_entries(known: Sequence[Known], types: Collection[str], config: FP8Config) -> None:
    """Name the overrides, rules for modules and entries of the allowlist that hold for no selected module.

    What asks for high precision does no harm where there is high precision anyway, and is not named.

    Args:
        known: all names of each module of a known kind, those of its class, and why it is selected or not.
        types: names of the classes of all modules.
        config: what to quantize and how. That its patterns match some module has been checked.
    """
    meant = config.unused_patterns(each[:2] for each in known)
    for place, pattern in config.unused_patterns(each[:2] for each in known if not _stays(each)):
        if (place, pattern) not in meant:
            found = [each for each in known if (place, pattern) not in config.unused_patterns([each[:2]])]
            _warn(f"{place} {pattern!r}", found, config)
    for pattern in config.allowlist["names"]:
        found = [each for each in known if any(re.search(pattern, name) for name in each[0])]
        if all(map(_stays, found)):
            _warn(f"allowlist name {pattern!r}", found, config)
    for kind in config.allowlist["types"]:
        found = [each for each in known if kind in each[1]]
        if kind in types and all(map(_stays, found)):  # INC's lists name types that not every model has
            _warn(f"allowlist type {kind!r}", found, config)


def _stays(module: Known) -> bool:
    return module[2].reason is not Reason.SELECTED


def _warn(entry: str, found: Sequence[Known], config: FP8Config) -> None:
    if not found:
        logger.warning("%s does nothing: what it matches is %s", entry, Reason.NO_CANDIDATE.value)
        return
    shown = ", ".join(f"{names[0]} ({why})" for names, _, why in found[:4]) + (", …" if len(found) > 4 else "")
    heads = not config.quantize_lm_head and any(why.reason is Reason.KEPT for _, _, why in found)
    hint = "; quantize_lm_head=True lifts what holds for heads" if heads else ""
    routes = not config.quantize_routers and any(why.reason is Reason.ROUTES for _, _, why in found)
    hint += "; quantize_routers=True lifts what holds for routers" if routes else ""
    logger.warning("%s does nothing: it stays in high precision anyway: %s%s", entry, shown, hint)
