"""What a training ends with where it ends in FP8: the trained model, the same in FP8, and the metrics of both."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

from ..checkpoint import save
from ..checkpoint.folder import CONFIG_FILE, config_of_transformers
from ..checkpoint.whole_folder import put_in_place
from ..errors import FP8CheckpointError, FP8ConfigError, FP8NotAvailableError
from ..hf.attach import attach_quantizer, detach_quantizers
from ..lifecycle import FP8State, convert_with, unfold_exactly
from ..measure import processes, why_unwritable
from .event import Event
from .sharded import refuse_unknown_classes, save_whole

logger = logging.getLogger(__name__)

FULL, FP8 = "eval", "eval_fp8"  # how the names of their metrics begin


class Outcome:
    """The end of a training: saves and evaluates, and leaves the Trainer with the model that it trained.

    Args:
        save_to: folder of the FP8 model; None: `fp8` in the Trainer's own.
        evaluate: whether both models are evaluated, where there is an `eval_dataset`.
    """

    def __init__(self, save_to: str | os.PathLike[str] | None, evaluate: bool):
        self.save_to, self.evaluate = save_to, evaluate
        self.metrics: dict[str, dict[str, float]] = {}

    def folder(self, event: Event) -> str:
        """Where the FP8 model goes."""
        return os.fspath(self.save_to or os.path.join(str(event.args.output_dir), "fp8"))

    def check(self, event: Event) -> None:
        """Refuse, before training, what could not be done after it.

        Raises:
            FP8ConfigError: nothing can be written there, or something else would be overwritten.
            FP8NotAvailableError: what is trained are adapters.
        """
        refuse_adapters(event.model)
        if event.is_sharded:
            refuse_unknown_classes(event.model)
        folder, own = self.folder(event), str(event.args.output_dir)
        with processes().together():
            if os.path.abspath(folder) == os.path.abspath(own):
                raise FP8ConfigError(
                    f"FP8Callback: save_to={folder!r} is the folder of the trained model itself (output_dir): choose "
                    "another, or leave it out"
                )
            for place in (own, os.path.dirname(os.path.abspath(folder))) if processes().leads else ():
                if reason := why_unwritable(place):
                    raise FP8ConfigError(f"FP8Callback: the models cannot be saved: {reason}: choose another folder")
            if processes().leads and not _is_free(folder):
                raise FP8ConfigError(
                    f"FP8Callback: {folder!r} holds something other than an FP8 checkpoint, which would be "
                    "overwritten: choose another folder with save_to"
                )

    def keep(self, event: Event) -> None:
        """Save the trained model as `Trainer.save_model` does, whatever comes next, and evaluate it."""
        if event.is_sharded:
            save_whole(event)
        else:
            event.trainer.save_model(str(event.args.output_dir), _internal_call=True)
        self._evaluate(event, "full", FULL)

    def in_fp8(self, event: Event, made: AbstractContextManager[nn.Module]) -> str:
        """Evaluate and save what is made of the model in FP8, inside of `made`.

        Returns:
            the folder that it was saved to.
        """
        folder = self.folder(event)
        with made as model:
            with evaluated_instead(event, model):
                self._evaluate(event, "fp8", FP8)
            with processes().together():
                if processes().leads:
                    save_into(model, folder, event.trainer.processing_class)
        return folder

    def _evaluate(self, event: Event, name: str, prefix: str) -> None:
        if self.evaluate and event.trainer.eval_dataset is not None:
            self.metrics[name] = event.trainer.evaluate(metric_key_prefix=prefix)

    def summary(self, folder: str, full_is: str = "in high precision") -> str:
        """Both results in words, side by side; `full_is` says how the trained model computes."""
        lines = [f"the FP8 model is in {folder}"]
        full, fp8 = self.metrics.get("full", {}), self.metrics.get("fp8", {})
        for key, value in full.items():
            other = fp8.get(key.replace(FULL, FP8, 1))
            if key.startswith(FULL) and isinstance(value, float) and other is not None and not _is_speed(key):
                lines.append(f"{key}: {value:.6g} {full_is}, {other:.6g} in FP8")
        return "\n".join(lines)


def refuse_adapters(model: nn.Module) -> None:
    """Refuse a model of which adapters are trained.

    Raises:
        FP8NotAvailableError: it is one of peft.
    """
    if hasattr(model, "peft_config"):
        raise FP8NotAvailableError(
            "FP8Callback: the model is one of peft, whose adapters are trained and saved by themselves: train it "
            "without this purpose, then merge them into an FP8 checkpoint of the base model with merge_lora, or use "
            "purpose='measure' or 'monitor'"
        )


def _is_speed(key: str) -> bool:
    return key.endswith(("_runtime", "_per_second", "_time"))


@contextmanager
def converted(model: nn.Module, state: FP8State) -> Iterator[nn.Module]:
    """Have a model be in FP8 inside; afterwards it is as it was, to the very parameters."""
    training = [module for module in model.modules() if module.training]
    take_back: Callable[[], None] = convert_with(model, state, attach_quantizer)
    try:
        yield model
    finally:
        take_back()
        detach_quantizers(model)
        unfold_exactly(state.changes)
        for module in model.modules():
            module.training = False
        for module in training:
            module.training = True


@contextmanager
def evaluated_instead(event: Event, model: nn.Module) -> Iterator[None]:
    """Have the Trainer evaluate another model inside."""
    trainer: Any = event.trainer
    own = (trainer.model, trainer.model_wrapped)
    if model is not event.model:
        trainer.model = trainer.model_wrapped = model
    try:
        yield
    finally:
        trainer.model, trainer.model_wrapped = own


def save_into(model: nn.Module, folder: str, processing_class: Any = None) -> None:
    """Save a converted model, and what goes with it, into a folder that is whole or as it was.

    Args:
        model: the model.
        folder: where to; what is there is replaced.
        processing_class: a tokenizer or the like, which is saved with it.
    """
    around = os.path.dirname(os.path.abspath(folder))
    os.makedirs(around, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=around, prefix=".fp8-") as temporary:
        made = os.path.join(temporary, "model")
        save(model, made)
        if hasattr(processing_class, "save_pretrained"):
            processing_class.save_pretrained(made)
        put_in_place(made, folder)


def _is_free(folder: str) -> bool:
    """Whether a folder is not there, empty, or holds an FP8 checkpoint."""
    if not os.path.lexists(folder):
        return True
    if not os.path.isdir(folder):
        return False
    if not os.listdir(folder) or os.path.isfile(os.path.join(folder, CONFIG_FILE)):
        return True
    try:
        return bool(config_of_transformers(folder))
    except (FP8CheckpointError, json.JSONDecodeError):
        return False
