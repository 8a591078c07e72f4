"""What made an FP8 model: versions, day, calibration data, and which modules were left out and why, as JSON.

It is written into the record of each checkpoint, and is carried along when that is loaded and saved again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers
from torch import nn

from .prepare import needs_ranges
from .state import FP8State, Phase, state_of

_PACKAGE = "optimum-fp8"
MERGED = "LoRA adapter merged"  # a change of a checkpoint, after which its weights are not the original's


def versions() -> dict[str, str]:
    """The versions of this package, torch and transformers; "unknown" where this one was not installed."""
    try:
        ours = version(_PACKAGE)
    except PackageNotFoundError:
        ours = "unknown"
    return {"optimum_fp8": ours, "torch": torch.__version__, "transformers": transformers.__version__}


def today() -> str:
    """The day, in UTC: no time, so that the same call makes the same files."""
    return datetime.now(UTC).date().isoformat()


def name_of_data(dataset: Any) -> str:
    """How provenance calls calibration data: a file or folder by its name alone, a dataset on the Hub by its own.

    Nothing is told of the machine that it lay on; data that have no name are called by their type.
    """
    if not isinstance(dataset, str | os.PathLike):
        return type(dataset).__name__
    path = os.fspath(dataset)
    is_path = os.path.isabs(path) or path.startswith((".", "~")) or os.path.exists(path)
    return os.path.basename(os.path.normpath(path)) if is_path else path


def made_here(state: FP8State) -> dict[str, Any]:
    """The provenance of a model that has just been converted."""
    skipped = {each.name: each.reason for each in state.decisions if not each.selected}
    made: dict[str, Any] = {"made_with": versions(), "date": today(), "skipped": skipped}
    return {**made, "data": data_of(state)} if needs_ranges(state) else made


def data_of(state: FP8State) -> dict[str, Any]:
    """What calibration has seen, or where the ranges are from that were measured before."""
    measured = state.measurements
    said = {
        "source": ", ".join(state.sources) or "a loop of the caller's",
        "samples": measured.samples,
        "tokens": state.tokens,
        "fingerprint": measured.data,
        "observer": measured.observer,
        "model_fingerprint": measured.fingerprint,
    }
    return {name: value for name, value in said.items() if value}


def with_change(provenance: Mapping[str, Any], what: str, **more: Any) -> dict[str, Any]:
    """Provenance with one more change of the FP8 model that it is of.

    Args:
        provenance: from before.
        what: was done to it.
        more: about it, as JSON.
    """
    change = {"what": what, **more, "date": today(), "made_with": versions()}
    return {**provenance, "changes": [*provenance.get("changes", []), change]}


def loaded_for(provenance: Mapping[str, Any], made_for: str, target: str) -> dict[str, Any]:
    """The provenance of a checkpoint that was made for one target and is loaded for another, or the same."""
    if not provenance or made_for == target:
        return dict(provenance)
    return with_change(provenance, "loaded for another target", before=made_for, target=target)


def provenance_in(model: nn.Module) -> dict[str, Any]:
    """The provenance of a converted model, or else of the first of the converted models inside; empty: not known."""
    for part in model.modules():
        state = state_of(part)
        if state is not None and state.phase is Phase.CONVERTED and state.provenance:
            return state.provenance
    return {}
