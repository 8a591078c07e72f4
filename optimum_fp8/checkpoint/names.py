"""What transformers calls the tensors in the files of a checkpoint once it has loaded them.

Models are rearranged from one version of transformers to the next, and the files keep the names of old: the head of
LLaVA is `lm_head`, and `language_model.lm_head` on disk. An FP8 checkpoint is renamed as one in high precision is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, apply_renamings, dot_natural_key

COMPILED = "_orig_mod."  # between the names of a compiled module and of what is in it


class ScaleBesideWeight(WeightRenaming):
    """Undoes what a renaming of a weight alone does to the scales beside it.

    Where files call the weight of a layer `X`, loading makes `X.weight` of it, and `X.weight.weight_scale` of what is
    its scale.
    """

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(r"\.weight\.((?:weight|input)_scale)$", r".\1")


def names_in_model(model: Any, keys: Iterable[str]) -> dict[str, str]:
    """The names that transformers gives `keys` of files when it loads them into `model`, by key.

    The prefix of the base model is left as it is.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        return {key: key for key in keys}
    renamings = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    renamings.append(ScaleBesideWeight())
    modules, names = {name for name, _ in model.named_modules()}, {}
    for key in sorted(keys, key=dot_natural_key):  # some renamings depend on what came before
        name = apply_renamings(key, renamings)
        as_it_is = _module(name) not in modules and _module(key) in modules  # as transformers decides
        names[key] = key if as_it_is else name
    return names


def name_of(module: str) -> str:
    """The name of a module, or of its place where it was compiled."""
    return f"{module}.".replace(COMPILED, "").removesuffix(".")


def _module(key: str) -> str:
    return key.rpartition(".")[0]
