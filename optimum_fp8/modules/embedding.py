"""nn.Embedding and nn.EmbeddingBag in FP8: rows are gathered as codes, and what was gathered is dequantized."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import ops
from ..scales import WEIGHT_ONLY, PerChannel, PerTensor, Scheme
from .base import FP8Module
from .conv import LaterHandler
from .handler import Conversion, Quantize, Reason, Surroundings, Target, Why, register_handler

_MARK = "values_dtype"


class FP8Table(FP8Module):
    """Rows of a table `[rows, size]` in FP8; one scale, or one a row.

    A subclass's own forward runs as it is: what it calls `super().forward` for is the lookup in FP8.

    Attributes:
        values_dtype: an empty parameter in the dtype of what is returned. It comes first, because transformers takes
            the dtype of a model's first parameter for the model's; it is in no checkpoint.
    """

    rows_are_tokens = False
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    values_dtype: nn.Parameter

    def __init__(self, origin: Any, scheme: Scheme):
        super().__init__(origin.weight.shape, origin, scheme)
        mark = nn.Parameter(torch.empty(0, dtype=self.high_precision, device="cpu"), requires_grad=False)
        self._parameters = {_MARK: mark, **self._parameters}

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        return None if module.max_norm is None else "max_norm writes into its weight while it is used"

    def rows(self, input: torch.Tensor) -> torch.Tensor:
        """The rows `[…, size]` of indices `[…]`, in the dtype that the table had, or was cast to since."""
        parameters: dict[str, Any] = self._parameters
        table, scale = parameters["weight"], parameters["weight_scale"]
        if table.dtype is not self.scheme.fmt.dtype or table.dim() != 2:
            self._check_codes()
        elif table.is_meta and not input.is_meta:
            self._refuse_meta()
        return ops.embedding(input, self.codes, scale, self.high_precision, record=self.record)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if type(self.origin).forward is nn.Embedding.forward:
            return self.rows(*args, **kwargs)
        acting = self.acting(self.weight)  # torch's lookup in an FP8 tensor is the operator
        return type(acting).forward(acting, *args, **kwargs)

    def acting(self, weight: torch.Tensor) -> Any:
        """A module of the original's class with the buffers of this one and some weight."""
        acting = copy.copy(self.origin)
        acting._buffers, acting._modules = self._buffers, self._modules
        acting.__dict__["weight"] = weight
        return acting

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(f"{prefix}{_MARK}")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict({**state_dict, f"{prefix}{_MARK}": self.values_dtype}, prefix, *args)


class FP8Embedding(FP8Table, nn.Embedding):  # type: ignore[misc]
    """nn.Embedding with a table `[rows, size]` in FP8."""


class FP8EmbeddingBag(FP8Table):
    """Sums, means or maxima of rows of a table in FP8; of the table, the rows that are asked for are dequantized."""

    mode: str
    include_last_offset: bool

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        found, places = input.unique(return_inverse=True)
        padding = (found == self.padding_idx).nonzero().flatten().tolist() if self.padding_idx is not None else []
        return F.embedding_bag(
            places,
            self.rows(found),
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding[0] if padding else None,
        )


class EmbeddingHandler(LaterHandler):
    """Tables, where they are asked for; nothing that goes into them is rounded."""

    scales_beside = ("embed_scale",)  # which a subclass's own forward multiplies with

    @property
    def spoken_types(self) -> tuple[str, ...]:
        return ()  # a model that has nothing else has nothing that is quantized unasked

    def concerned(self, scheme: Scheme) -> bool:
        return scheme.embeddings

    def limit(self, module: Any, scheme: Scheme, around: Surroundings) -> tuple[dict[str, Any], str]:
        return {"activations": WEIGHT_ONLY}, ""

    def computes_just_that(self, module: Any, base: Any) -> bool:
        own = inspect.unwrap(type(module).forward)
        passes_on = base is nn.Embedding and "__class__" in own.__code__.co_freevars  # it calls super().forward
        return super().computes_just_that(module, base) or passes_on

    def refusal(self, module: Any, scheme: Scheme, around: Surroundings) -> Why | None:
        if "Sinusoidal" in type(module).__name__:
            return Why(Reason.UNFIT, "its weight is computed, and in no checkpoint")
        if not isinstance(scheme.weight.granularity, (PerTensor, PerChannel)):
            return Why(Reason.UNFIT, f"the rows of an embedding cannot be scaled {scheme.weight.granularity}")
        return super().refusal(module, scheme, around)

    def convert(self, target: Target, model: nn.Module, quantize: Quantize) -> Conversion:
        _initialize_buffers(target)
        return super().convert(target, model, quantize)

    def loaded(self, target: Target) -> None:
        _initialize_buffers(target)
        super().loaded(target)

    def state(self, module: Any) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in super().state(module).items() if name != _MARK}


def _initialize_buffers(target: Target) -> None:
    """Have the model around a module that became FP8 while loading set the buffers that are in no checkpoint.

    It tells by the class of a module which these are.
    """
    module = target.module
    if isinstance(module, FP8Table) and module._non_persistent_buffers_set:
        *_, around = (each for each in _models_around(target) if hasattr(each, "_init_weights"))
        acting = module.acting(torch.empty(module.weight_shape, device="meta"))
        around._init_weights(acting)


def _models_around(target: Target) -> Iterator[Any]:
    """The modules that a module is in, from the outermost inwards."""
    assert target.model is not None
    parts = target.name.split(".")
    return (target.model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts)))


register_handler(EmbeddingHandler("embedding", (nn.Embedding,), FP8Embedding))
register_handler(EmbeddingHandler("embedding bag", (nn.EmbeddingBag,), FP8EmbeddingBag))
