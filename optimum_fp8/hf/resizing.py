"""A model whose embeddings or output head are in FP8 must not resize them: transformers would do it by half."""

from __future__ import annotations

from types import MethodType
from typing import Any

from ..errors import FP8NotAvailableError
from ..modules import FP8Module
from ..modules.handler import Change

_METHOD = "resize_token_embeddings"


class _Guard(Change):
    """The guard in an instance's place of the method; undone, the class has its own again."""

    def undo(self) -> None:
        self.owner.__dict__.pop(self.attribute, None)


def guard_resizing(model: Any) -> list[Change]:
    """Have `model`, and the models in it, refuse to resize embeddings where these or their output head are in FP8.

    Returns:
        what was changed.
    """
    changes: list[Change] = []
    for part in model.modules():
        if hasattr(type(part), _METHOD) and _METHOD not in part.__dict__ and _in_fp8(part) is not None:
            part.__dict__[_METHOD] = MethodType(resize_token_embeddings, part)
            changes.append(_Guard(part, _METHOD, None))
    return changes


def resize_token_embeddings(model: Any, new_num_tokens: int | None = None, *args: Any, **options: Any) -> Any:
    """What the class does, where the size stays as it is and as long as neither embedding nor head is in FP8.

    Raises:
        FP8NotAvailableError: names the one that is.
    """
    fixed, size = _in_fp8(model), model.get_input_embeddings().weight.shape[0]
    if fixed is not None and (new_num_tokens not in (None, size) or args or options):
        raise FP8NotAvailableError(
            f"resize_token_embeddings: {fixed.name} is in FP8 and would keep its {fixed.weight.shape[0]} rows, one for "
            "each token: resize the original model and quantize it again, or call optimum_fp8.dequantize(model) first"
        )
    return getattr(type(model), _METHOD)(model, new_num_tokens, *args, **options)


def _in_fp8(model: Any) -> FP8Module | None:
    """The output head of a model, or its embedding, if it is in FP8."""
    for ask in ("get_output_embeddings", "get_input_embeddings"):
        try:
            found = getattr(model, ask)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(found, FP8Module):
            return found
    return None
