"""ModelFacts: what the kinds of calibration data have to know of the model that they are for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..lifecycle import Origin, state_of
from .decode import decodes

# What configurations call the number of tokens that the model takes.
_LIMITS = ("max_position_embeddings", "max_encoder_position_embeddings", "n_positions", "max_seq_len")
_SOUNDS = ("input_values", "input_features", "audio_values")
_NO_IMAGES = ("input_ids", "inputs_embeds", *_SOUNDS)


@dataclass(frozen=True)
class ModelFacts:
    """What a source may ask about the model.

    Attributes:
        origin: where it was loaded from, and with which arguments.
        inputs: the names that its `forward` takes; None if it takes any.
        main_input: the one of them that a call cannot do without, as transformers names it.
        max_tokens: the longest text it takes; None if nothing says so.
        decodes: calibration goes on behind the text: it needs room.
    """

    origin: Origin = Origin()
    inputs: frozenset[str] | None = None
    main_input: str = "input_ids"
    max_tokens: int | None = None
    decodes: bool = False

    def takes(self, name: str) -> bool:
        """Whether `forward` has an argument of this name."""
        return self.inputs is None or name in self.inputs

    @property
    def reads(self) -> bool:
        """Whether text may be given to it."""
        return self.takes("input_ids")

    @property
    def sees(self) -> bool:
        """Whether images may be given to it; some models have their own name for what processors make of them."""
        return self.takes("pixel_values") or self.main_input not in _NO_IMAGES

    @property
    def hears(self) -> bool:
        """Whether audio may be given to it."""
        return any(map(self.takes, _SOUNDS))


def facts_of(model: nn.Module, origin: Origin | None = None) -> ModelFacts:
    """The facts of a model, on meta or loaded; `origin` is the one its state knows, unless it is given."""
    state = state_of(model)
    origin = origin or (state.origin if state else None) or Origin(str(getattr(model, "name_or_path", "") or ""))
    named, required = _arguments(model)
    main = getattr(model, "main_input_name", None) or (required[0] if required else "input_ids")
    main = main if isinstance(main, str) else main[0]  # some have several, the main one first
    encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return ModelFacts(origin, named, main, max_tokens(model), decodes(model) and not encodes)


def _arguments(model: nn.Module) -> tuple[frozenset[str] | None, list[str]]:
    """The names that `forward` takes (None: any), and those it cannot do without."""
    parameters = inspect.signature(model.forward).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not named and any(p.kind is p.VAR_KEYWORD for p in parameters):  # a wrapper that hands on what it is given
        return None, []
    return frozenset(p.name for p in named), [p.name for p in named if p.default is p.empty]


def max_tokens(model: nn.Module) -> int | None:
    """The longest text that a model takes, as its configuration and its table of positions say."""
    limits = [limit for part in _parts(model) for limit in _limits(part)]
    return min(limits, default=None)


def _parts(model: Any) -> Iterator[Any]:
    """The model, and the encoder that its text goes into where that has a configuration of its own."""
    yield model
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and callable(
        getattr(model, "get_encoder", None)
    ):
        yield model.get_encoder()


def _limits(model: Any) -> Iterator[int]:
    config = _text_config(getattr(model, "config", None))
    said = (getattr(config, name, None) for name in _LIMITS)
    for limit in said:
        if not isinstance(limit, int) or isinstance(limit, bool) or limit <= 0:
            continue
        yield limit
        for name, module in model.named_modules():  # RoBERTa counts positions from behind the padding's
            table = isinstance(module, nn.Embedding) and "pos" in name.rpartition(".")[2]
            if table and module.num_embeddings == limit and module.padding_idx is not None:
                yield limit - module.padding_idx - 1


def _text_config(config: Any) -> Any:
    """The configuration that is about text, of a nested one."""
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # several: text goes into the encoder's
        return config.get_text_config(encoder=True)


def too_long(model: nn.Module, inputs: Any) -> str:
    """A hint for the error of a model that was given more tokens than it takes; "" if it was not."""
    ids = inputs.get("input_ids") if hasattr(inputs, "get") else None
    limit = max_tokens(model)
    if limit is None or not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[1] <= limit:
        return ""
    return f"; the rows of input_ids have {ids.shape[1]} tokens, and the model takes {limit}: cut them"
