"""A model whose weights FSDP2 has spread over processes: saved whole, and made again in FP8 from its files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ..config import FP8Config
from ..errors import FP8NotAvailableError
from ..measure import processes
from .event import Event


def own_class(model: nn.Module) -> type[Any]:
    """The class that a model had before FSDP2 put its own in front."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def refuse_unknown_classes(model: nn.Module) -> None:
    """Refuse what could not be made again from its files.

    Raises:
        FP8NotAvailableError: no model of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise FP8NotAvailableError(
            f"FP8Callback: {own_class(model).__name__} is spread over processes by FSDP, and no model of transformers, "
            "which are loaded from their files one weight at a time: use purpose='measure', and convert it in one "
            "process, or train it without FSDP"
        )


def save_whole(event: Event) -> None:
    """Save the trained model into the folder of the Trainer, whatever kind of checkpoint it makes; all call it."""
    whole = event.trainer.accelerator.get_state_dict(event.trainer.model)
    with processes().together():
        if processes().leads:
            folder, model = str(event.args.output_dir), event.model
            model.save_pretrained(folder, state_dict=whole)  # type: ignore[operator]
            processing_class: Any = event.trainer.processing_class
            if hasattr(processing_class, "save_pretrained"):
                processing_class.save_pretrained(folder)


@contextmanager
def made_again(event: Event, config: FP8Config) -> Iterator[nn.Module]:
    """What `from_pretrained` makes of the saved model, whole in each process.

    Args:
        event: the end of the training.
        config: what it is loaded with.
    """
    cls: Any = own_class(event.model)
    model = cls.from_pretrained(str(event.args.output_dir), quantization_config=config)
    yield model.to(event.args.device).eval()
