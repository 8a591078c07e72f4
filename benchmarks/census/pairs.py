"""The pairs of architecture and auto class that the installed transformers has."""

from __future__ import annotations

from typing import Any, NamedTuple

import transformers
from transformers.models.auto import modeling_auto

# The class of an architecture that says most about it comes first: with it a census begins.
_FIRST = (
    "CAUSAL_LM",
    "MULTIMODAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "CTC",
)


class Pair(NamedTuple):
    """One model class of an architecture, and the auto classes that lead to it."""

    model_type: str
    class_name: str
    autos: tuple[str, ...]


def auto_name(mapping: str) -> str:
    """ "MODEL_FOR_CAUSAL_LM_MAPPING" as "CAUSAL_LM"; "MODEL_MAPPING" as "MODEL"."""
    return mapping.removesuffix("_MAPPING").removeprefix("MODEL_FOR_")


def mappings() -> dict[str, Any]:
    """transformers' mappings from configurations to model classes, by the name of the auto class."""
    return {
        auto_name(name): value
        for name, value in vars(modeling_auto).items()
        if name.endswith("_MAPPING") and hasattr(value, "_model_mapping")
    }


def pairs() -> list[Pair]:
    """Every model class of every architecture, the telling ones of each first."""
    found: dict[tuple[str, str], list[str]] = {}
    for auto, mapping in mappings().items():
        for model_type, names in mapping._model_mapping.items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault((model_type, name), []).append(auto)
    made = [Pair(*key, tuple(autos)) for key, autos in found.items()]
    return sorted(made, key=lambda pair: (pair.model_type, _rank(pair), pair.class_name))


def _rank(pair: Pair) -> int:
    ranks = [_FIRST.index(auto) for auto in pair.autos if auto in _FIRST]
    return min(ranks, default=len(_FIRST) + (pair.autos == ("MODEL",)))


def class_of(pair: Pair) -> Any:
    """The model class itself."""
    return getattr(transformers, pair.class_name)


def loading_class(pair: Pair, config: Any) -> Any:
    """The auto class that users load the pair with; the model class where there is none, or it leads to another.

    Args:
        pair: of architecture and model class.
        config: of such a model, which tells an auto class where to go.
    """
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        if not isinstance(auto, type) or mapping is None or auto.__name__ == "AutoBackbone":  # which loads no folders
            continue
        if type(config) in mapping and mapping._model_mapping.get(config.model_type) == pair.class_name:
            return auto
    return class_of(pair)
