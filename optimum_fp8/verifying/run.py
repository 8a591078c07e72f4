"""verify: everything that can be told of an FP8 checkpoint without running it."""

from __future__ import annotations

import os
from typing import Any

from .against import check_against, errors_against
from .finding import ERROR, Finding
from .formats import rules_of
from .high_precision import check_high_precision_against
from .in_memory import check_against_memory
from .layers import check_layers, layers_in
from .opened import open_folder, reading
from .saved import check_loading, check_saved
from .values import check_values


def verify(
    folder: str | os.PathLike[str], against: str | os.PathLike[str] | None = None, *, model: Any = None
) -> list[Finding]:
    """What is wrong with an FP8 checkpoint of any of the known formats, in a folder; one tensor is in memory at a time.

    Read are the headers and all tensors: names, dtypes, shapes and values of codes and scales, the index and the
    configuration. Of a checkpoint of ours also what its files say of how it was saved.

    Args:
        folder: of the checkpoint.
        against: the folder of the model that was quantized: each weight is compared with its original, and so is what
            stayed in high precision.
        model: the converted model of transformers that was saved: the checkpoint is loaded in a fresh process, with as
            much memory again, and must have the same tensors and compute the same logits for a few prompts.

    Returns:
        errors first; empty: nothing is wrong.

    Raises:
        FP8CheckpointError: `folder` is no folder, or `against` holds none of its weights.
        FP8NotAvailableError: `model` is none of transformers, or on another device than a CPU or a GPU.
    """
    opened = open_folder(folder)
    layers, rules = layers_in(opened), rules_of(opened.quantization)
    found = list(opened.findings)
    saved, sealed = check_saved(opened)
    found += saved + list(check_layers(opened, layers, rules))
    with reading(opened) as read:
        found += check_values(opened, layers, read, sealed)
    if against is not None:
        found += check_against(opened, layers, errors_against(opened, layers, against))
        found += check_high_precision_against(opened, layers, against)
    loading = list(check_loading(opened))
    if not any(each.severity == ERROR for each in found):
        found += loading
    elif unsaid := [each for each in loading if not any(each.where == other.where for other in found)]:
        found += unsaid
    if model is not None:
        found += check_against_memory(opened.folder, model)
    return sorted(dict.fromkeys(found), key=lambda each: each.severity != ERROR)
