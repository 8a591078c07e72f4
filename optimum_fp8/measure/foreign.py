"""What stands where a measurements file is looked for and is none of ours: for messages that name it."""

from __future__ import annotations

import glob
import os

_UNREADABLE = "which optimum_fp8 cannot read yet: measure again with optimum_fp8"


def files_of_inc(prefix: str) -> list[str]:
    """Measurement files of Intel Neural Compressor that a `dump_stats_path` means: as its prefix, folder or file."""
    start = glob.escape(prefix)
    patterns = [f"{start}_hooks_*"]  # <prefix>_hooks_maxabs_0_8.npz
    if os.path.isdir(prefix):
        patterns.append(os.path.join(start, "*_hooks_*"))
    elif "_hooks_" in os.path.basename(prefix):
        patterns.append(f"{start}*")
    found = {path for pattern in patterns for path in glob.glob(pattern)}
    return sorted(path for path in found if path.endswith((".json", ".npz")))


def not_found(path: str, prefix: str) -> str:
    """Why there is nothing to read at `path`, the file of `prefix`, and what there is instead."""
    from_inc = files_of_inc(prefix)
    if from_inc:
        shown = f"{', '.join(from_inc[:2])}{', …' if len(from_inc) > 2 else ''}"
        return f"{path} does not exist, only INC's own {shown}, {_UNREADABLE}"
    ending = "_measurements.safetensors"
    ours = [prefix] if prefix.endswith(ending) else sorted(glob.glob(os.path.join(glob.escape(prefix), f"*{ending}")))
    if ours and os.path.exists(ours[0]):
        return f"dump_stats_path={prefix!r} is a folder and a file prefix: set it to {ours[0].removesuffix(ending)!r}"
    return (
        f"no measurements at {path}: give a `dataset`, or prepare the model, run calibration data through it and call "
        "finalize_calibration(model), or point dump_stats_path at where that was done"
    )


def not_readable(path: str, error: object) -> str:
    """Why `path` is no measurements file."""
    if os.path.isdir(path):
        return f"{path} is a folder, no measurements file: set another dump_stats_path"
    with open(path, "rb") as file:
        start = file.read(4096)
    if start.startswith(b"PK") or (start.lstrip().startswith(b"{") and b'"Nodes"' in start):
        return f"{path} is a file of INC's, {_UNREADABLE}"
    return f"{path} is not a measurements file or is damaged ({error}): measure again, or set another dump_stats_path"
