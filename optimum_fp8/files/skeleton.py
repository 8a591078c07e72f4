"""The skeleton of a model that transformers knows: loaded on meta, so that nothing but headers is read.

Everything else is what `from_pretrained` does: which modules are selected, how they are named, and what
`save_pretrained` would write of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..checkpoint.folder import refuse_without_index
from ..checkpoint.intact import record
from ..checkpoint.provenance import told_of
from ..config import FP8Config
from ..errors import FP8CheckpointError
from ..formats import is_fp8
from ..hf.conversions import without_fp8
from ..hf.ties import Untied
from ..lifecycle import state_of
from ..modules import fp8_modules
from ..modules.fused_experts import FP8FusedExperts
from ..modules.named_weights import FP8NamedWeights
from .plan import Skeleton
from .source import Source

logger = logging.getLogger(__name__)

T = TypeVar("T")


def known_class(source: Source) -> Any:
    """The class of transformers that `config.json` names, or None."""
    names = source.config.get("architectures") or [None]
    found = getattr(transformers, str(names[0]), None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


def class_saved(folder: str, config: dict[str, Any]) -> Any:
    """The class of transformers that a checkpoint was saved from.

    Raises:
        FP8CheckpointError: this version of transformers has no such class.
    """
    found = known_class(Source(folder, [], {}, config))
    if found is None:
        raise FP8CheckpointError(
            f"{folder} is of {config.get('architectures')}, which transformers {transformers.__version__} does not have"
        )
    return found


def skeleton_of_class(source: Source, model_class: Any, config: FP8Config, dtype: str | torch.dtype) -> Skeleton:
    """What `from_pretrained` makes of the source, without values.

    Weights that transformers puts together of others while loading are left out, but for those of experts that an FP8
    checkpoint holds one by one, as the source does. So are modules with several weights, which become FP8 after it.
    """
    model, stored = _load(source, model_class, config, dtype)
    layers = fp8_modules(model).items()
    made = [name for name, module in layers if f"{name}.weight" not in stored or module.derived]
    made += [name for name, module in model.named_modules() if isinstance(module, FP8NamedWeights)]
    made += [name for name in _experts(model) if any(key not in stored for key in _codes_of_experts(model, name))]
    if made:
        logger.warning(
            "%d modules stay in high precision, because transformers converts or puts them together while loading, and "
            "that takes the model: %s; to have them in FP8, use from_pretrained and save_pretrained",
            len(made),
            ", ".join(made[:8]) + (", …" if len(made) > 8 else ""),
        )
        config = config.replace(modules_to_not_convert=[*(config.modules_to_not_convert or []), *made])
        model, stored = _load(source, model_class, config, dtype)
    saved, names = _saved(model)
    state, carried = state_of(model), model.config.quantization_config
    assert state is not None
    held = {key: source.tensors[name] for key, name in stored.items()}
    told = record(model, carried, **told_of(model))
    return Skeleton(model, saved, names, held, state.decisions, carried, told, {}, whole=True)


def write_config(model: Any, folder: str) -> None:
    """The configurations that `save_pretrained` writes beside the weights."""
    model.config.dtype = str(model.dtype).split(".")[1]
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _load(source: Source, model_class: Any, config: FP8Config, dtype: str | torch.dtype) -> tuple[Any, dict[str, str]]:
    """The model on meta, and the name in the files of each of its tensors that is there as it is."""
    refuse_without_index(source.folder)  # of a class that transformers knows
    model = model_class.from_pretrained(
        os.path.abspath(source.folder), quantization_config=config, dtype=dtype, device_map="meta"
    )
    stored = in_files(model, source.tensors)
    return model, untied_keys(model, stored)


def untied_keys(model: Any, stored: Mapping[str, T]) -> dict[str, T]:
    """What is stored, by the names of tensors, with what was untied in an FP8 model under both of its names.

    A head that is in FP8 has a weight of its own, which the files of the original hold as that of the embedding.
    """
    found, state = dict(stored), state_of(model)
    assert state is not None
    for change in state.changes:
        if isinstance(change, Untied):
            prefix = next((name for name, part in model.named_modules() if part is change.owner), "")
            dot = f"{prefix}." if prefix else ""
            for target, tied in change.before.items():
                for one, other in ((target, tied), (tied, target)):
                    if f"{dot}{other}" in found:
                        found.setdefault(f"{dot}{one}", found[f"{dot}{other}"])
    return found


def in_files(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """The keys of files by the names of the tensors that transformers loads them into, unconverted."""
    experts = [key for name in _experts(model) for key in _codes_of_experts(model, name)]
    mapping, state = without_fp8(get_model_conversion_mapping(model), experts), model.state_dict()
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    found = {}
    for key in sorted(keys, key=dot_natural_key):  # some renamings depend on what came before
        name, converted = rename_source_key(key, renamings, converters, model.base_model_prefix, state)
        if name not in state and key in state:  # as transformers decides
            name, converted = rename_source_key(key, [], [], model.base_model_prefix, state)
        if converted is None and name in state:
            found[name] = key
    return found


def _experts(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, FP8FusedExperts)]


def _codes_of_experts(model: Any, name: str) -> list[str]:
    """The names of the weights of experts in FP8, as their state has them."""
    return [f"{name}.{key}" for key, each in model.get_submodule(name).tensors().items() if is_fp8(each.dtype)]


def _saved(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state of a model by the names that `save_pretrained` gives it, and the model's own names by those."""
    ignored = set(model._keys_to_ignore_on_save or ())
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    # Weights of experts that are parts of one stack are not tied, and have no parameters of their own to look at.
    experts = {f"{name}.{key}" for name in _experts(model) for key in model.get_submodule(name).tensors()}
    others = {name: tensor for name, tensor in state.items() if name not in experts}
    kept = remove_tied_weights_from_state_dict(others, model)
    state = {name: tensor for name, tensor in state.items() if name in kept or name in experts}
    own = {id(tensor): name for name, tensor in state.items()}
    saved = dict(revert_weight_conversion(model, state))
    return saved, {name: own[id(tensor)] for name, tensor in saved.items() if id(tensor) in own}
