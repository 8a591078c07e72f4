"""Folding batch norms, where the configuration asks for it: before anything is measured, and before a checkpoint loads.

Until a model is converted it can be taken back to the bit. From then on the folded weights are all there is.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import FP8Config
from ..errors import FP8CheckpointError, FP8NotAvailableError, FP8SelectionError
from ..modules.folded_batch_norm import Fold, fold
from ..modules.handler import Change
from ..selection import Decision, Pair, batch_norm_pairs, names_in_checkpoint, select

logger = logging.getLogger(__name__)


def fold_batch_norms(model: nn.Module, config: FP8Config) -> list[Change]:
    """Fold what can be folded, if `config` asks for it; what was changed.

    Raises:
        FP8SelectionError: there is nothing to fold, or a batch norm is in training mode.
        FP8NotAvailableError: weights are offloaded.
    """
    pairs = _pairs(model, config)
    for pair in pairs:
        conv, norm = model.get_submodule(pair.conv), model.get_submodule(pair.norm)
        if norm.training:
            raise FP8SelectionError(
                f"{pair.norm}: fold_batch_norm=True folds the running statistics of a batch norm, and this one is in "
                "training mode, where it uses those of each batch: call model.eval() first"
            )
        if any(tensor.is_meta for each in (conv, norm) for tensor in each.state_dict().values()):
            raise FP8NotAvailableError(
                f"{pair.conv}: fold_batch_norm=True needs its weights and those of {pair.norm}, which are offloaded or "
                "not loaded: load the model without offloading"
            )
    return _fold(model, pairs)


def select_folded(
    model: nn.Module, config: FP8Config, implementations: Mapping[int, str]
) -> tuple[list[Decision], set[str]]:
    """What `select` decides about a model that is to be folded when its weights are there, and the convolutions."""
    pairs = _pairs(model, config)
    folds = _fold(model, pairs)
    try:
        return select(model, config, implementations), {pair.conv for pair in pairs}
    finally:
        unfold_exactly(folds)


def expect_folded(model: nn.Module, config: FP8Config, tensors: Collection[str]) -> list[Change]:
    """Fold the batch norms of a model that a checkpoint with these tensors no longer has: its weights are to come.

    Raises:
        FP8CheckpointError: the checkpoint lacks one that cannot be folded.
    """
    if not config.fold_batch_norm:
        return []
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    holders = {name.rpartition(".")[0] for name in (f".{tensor}" for tensor in tensors)}

    def is_there(name: str) -> bool:
        return any(f".{each}" in holders for each in names_in_checkpoint(name, prefix))

    def is_gone(pair: Pair) -> bool:  # a checkpoint that cannot be looked into holds what is saved of such a model
        return not holders or (is_there(pair.conv) and not is_there(pair.norm))

    folds = _fold(model, [pair for pair in batch_norm_pairs(model) if is_gone(pair)])
    parents = {holder.rpartition(".")[0] for holder in holders}

    def is_new(name: str) -> bool:  # then the checkpoint has nothing around it either
        return parents.isdisjoint(f".{each}".rpartition(".")[0] for each in names_in_checkpoint(name, prefix))

    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    lost = [name for name in norms if not is_there(name) and not is_new(name)]
    if lost:
        unfold_exactly(folds)
        raise FP8CheckpointError(
            f"{lost[0]} was folded when the checkpoint was saved (fold_batch_norm=True), and cannot be in this "
            f"{type(model).__name__}, whose code uses it otherwise: load it with the version of the code that saved "
            "it, or quantize the original model again"
        )
    return folds


@contextmanager
def unfolded_on_error(changes: list[Change]) -> Iterator[list[Change]]:
    """Have an error inside undo the folds among these changes."""
    try:
        yield changes
    except BaseException:
        unfold_exactly(changes)
        raise


def unfold_exactly(changes: Sequence[Change]) -> None:
    """Undo the folds among these changes."""
    for change in reversed(changes):
        if isinstance(change, Fold):
            change.undo()


def _fold(model: nn.Module, pairs: Sequence[Pair]) -> list[Change]:
    return [fold(model, model.get_submodule(pair.conv), model.get_submodule(pair.norm)) for pair in pairs]


def _pairs(model: nn.Module, config: FP8Config) -> list[Pair]:
    if not config.fold_batch_norm:
        return []
    pairs = batch_norm_pairs(model)
    count = sum(isinstance(module, _BatchNorm) for module in model.modules())
    if pairs:
        logger.info("%d of %d batch norms are folded into convolutions", len(pairs), count)
        return pairs
    message = (
        f"fold_batch_norm=True folds nothing: of {type(model).__name__}'s {count} batch norms none is known to take "
        "the output of a convolution that goes nowhere else"
    )
    if config.lenient:
        logger.warning("%s", message)
        return []
    raise FP8SelectionError(f"{message}: leave the key out")
