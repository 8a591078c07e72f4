"""What stands where a measurements file is looked for and is none of ours: for messages that name it."""

from __future__ import annotations

import glob
import os

from .inc import files_of_inc


def not_found(path: str, prefix: str) -> str:
    """Why there is nothing to read at `path`, the file of `prefix`, and what there is instead."""
    from_inc = files_of_inc(prefix)
    if from_inc:
        shown = f"{', '.join(from_inc[:2])}{', …' if len(from_inc) > 2 else ''}"
        return (
            f"{path} does not exist, only INC's own {shown}, which hold no ranges: expected INC's measurements, "
            f"{prefix}_hooks_maxabs.npz or .json"
        )
    ending = "_measurements.safetensors"
    ours = [prefix] if prefix.endswith(ending) else sorted(glob.glob(os.path.join(glob.escape(prefix), f"*{ending}")))
    if ours and os.path.exists(ours[0]):
        return f"dump_stats_path={prefix!r} is a folder and a file prefix: set it to {ours[0].removesuffix(ending)!r}"
    return (
        f"no measurements at {path}: give a `dataset`, or prepare the model, run calibration data through it and call "
        "finalize_calibration(model), or point dump_stats_path at where that was done"
    )


def not_readable(path: str, start: bytes, error: object) -> str:
    """Why `path`, of which `start` is the beginning, is no measurements file."""
    if os.path.isdir(path):
        return f"{path} is a folder, no measurements file: set another dump_stats_path"
    if start.startswith(b"PK") or (start.lstrip().startswith(b"{") and b'"Nodes"' in start):
        return f"{path} is a file of INC's: give it the name that INC gave it, …_hooks_maxabs.npz or .json"
    return f"{path} is not a measurements file or is damaged ({error}): measure again, or set another dump_stats_path"
