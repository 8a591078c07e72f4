"""A model whose output head is in FP8 must not resize its embeddings: transformers would do it by half."""

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
    """Have `model`, and the models in it, refuse to resize the embeddings where their output head is in FP8.

    Returns:
        what was changed.
    """
    changes: list[Change] = []
    for part in model.modules():
        if hasattr(type(part), _METHOD) and _METHOD not in part.__dict__ and isinstance(_head(part), FP8Module):
            part.__dict__[_METHOD] = MethodType(resize_token_embeddings, part)
            changes.append(_Guard(part, _METHOD, None))
    return changes


def resize_token_embeddings(model: Any, new_num_tokens: int | None = None, *args: Any, **options: Any) -> Any:
    """What the class does, where the size stays as it is and as long as the head is not in FP8.

    Raises:
        FP8NotAvailableError: names the head.
    """
    head, size = _head(model), model.get_input_embeddings().weight.shape[0]
    if isinstance(head, FP8Module) and (new_num_tokens not in (None, size) or args or options):
        raise FP8NotAvailableError(
            f"resize_token_embeddings: {head.name} is in FP8 and would keep its {head.weight.shape[0]} outputs: resize "
            "the original model and quantize it again, or call optimum_fp8.dequantize(model) first"
        )
    return getattr(type(model), _METHOD)(model, new_num_tokens, *args, **options)


def _head(model: Any) -> Any:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
