"""save: a converted model in a folder and, where it is asked for, checked there by a fresh process."""

from __future__ import annotations

import logging
import os

from torch import nn

from ..checkpoint import save as write
from ..errors import FP8CheckpointError
from .finding import ERROR
from .in_memory import refuse_incomparable
from .run import verify as findings_of

logger = logging.getLogger(__name__)

_TOLD = 4


def save(
    model: nn.Module, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB", verify: bool = False
) -> None:
    """Write a converted model: `model.safetensors` with all of its state, and `quantization.json`.

    The folder is made beside its place and moved there, so it is whole or not there. `load` reads it. A transformers
    model is written by its own `save_pretrained`, and read by `from_pretrained`; a model of diffusers is written by its
    own, and read by `load`.

    Args:
        model: what `convert` returned.
        folder: where to; one that holds anything is refused.
        max_shard_size: of one file of weights, as `save_pretrained` takes it.
        verify: check what was written, as `verify(folder, model=model)` does: a fresh process loads it, with as much
            memory again, and must have the same tensors and compute the same logits. Warnings are logged.

    Raises:
        FP8StateError: the model is not converted, or only parts of it are.
        FP8CheckpointError: the folder holds something, a scale is not sound, or what was written is not the model in
            memory; then the folder stays.
        FP8NotAvailableError: weights are offloaded, there is state that is no tensor, or a model is to be verified that
            is none of transformers, or not on a CPU or a GPU: nothing is written.
    """
    if verify:
        refuse_incomparable(model, "verify=False")
    write(model, folder, max_shard_size=max_shard_size)
    found = findings_of(folder, model=model) if verify else []
    wrong = [str(each) for each in found if each.severity == ERROR]
    for each in found[len(wrong) :]:
        logger.warning("%s", each)
    if wrong:
        more = f"; and {len(wrong) - _TOLD} more" if len(wrong) > _TOLD else ""
        raise FP8CheckpointError(
            f"{os.path.abspath(folder)} was written, but is not what the model in memory is: {'; '.join(wrong[:_TOLD])}"
            f"{more}"
        )
