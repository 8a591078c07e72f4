"""One calibration batch through the model: on its device, in its dtype, and decoding where that is measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import nn

from ..config import FP8Config
from ..errors import FP8CalibrationError, FP8Error
from ..measure import Observers
from .decode import decodes, masks_in, needs_decoder_start, passes
from .facts import too_long


def model_inputs(batch: Any) -> Any:
    """What of a batch a model is given: a mapping, or the tensor (of a sequence the first: the rest are labels).

    Raises:
        FP8CalibrationError: it is neither.
    """
    if isinstance(batch, (list, tuple)) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping) or torch.is_tensor(batch):
        return batch
    raise FP8CalibrationError(
        f"a batch of type {type(batch).__name__} cannot be given to a model: expected a dict of inputs or a tensor"
    )


def run_batch(model: nn.Module, observers: Observers, config: FP8Config, inputs: Any, samples: int) -> None:
    """One forward pass; where attention is measured, over a cache, and `decode_steps` tokens further.

    So it is with a decoder that begins with one token, of which nothing is known but what it generates. A batch that
    says `use_cache=False` is run as it is.

    Args:
        model: the model that `observers` measure.
        observers: are told what of the batch is padding.
        config: says whether to decode, and how far.
        inputs: `model_inputs` of the batch.
        samples: how many went through before, for messages.

    Raises:
        FP8CalibrationError: the model cannot be run on it.
    """
    inputs = to_device(model, inputs)
    cached = config.wants_attention and isinstance(inputs, Mapping) and inputs.get("use_cache") is not False
    goes_on = cached or needs_decoder_start(model, inputs)
    if not goes_on or not isinstance(inputs, Mapping) or not decodes(model):
        with observers.only_where(*masks_in(inputs), exact=True):
            call_model(model, inputs, samples)
        return
    output, hint = None, ""
    with closing(passes(model, cast_inputs(model, inputs), config.decode_steps)) as following:
        while True:
            with _explained(model, inputs, samples, hint):
                try:
                    call = following.send(output)
                except StopIteration:
                    return
            with observers.only_where(*call.masks, exact=True):
                output, hint = call_model(model, call.inputs, samples, hint), "; decode_steps=0 leaves out decoding"


def to_device(model: nn.Module, inputs: Any) -> Any:
    """A model's inputs on the device of its first weight that is anywhere."""
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    if isinstance(inputs, Mapping):
        return {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}
    return inputs.to(device)


def call_model(model: nn.Module, inputs: Any, samples: int, hint: str = "") -> Any:
    """What a model returns for its inputs, in its dtype; `samples` and `hint` are for messages.

    Raises:
        FP8CalibrationError: the model cannot be run on them.
    """
    with _explained(model, inputs, samples, hint):
        return model(**cast_inputs(model, inputs)) if isinstance(inputs, Mapping) else model(_as_dtype(model, inputs))


@contextmanager
def _explained(model: nn.Module, inputs: Any, samples: int, hint: str) -> Iterator[None]:
    """Say of an error that it comes from the calibration batch."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, FP8Error):
            raise
        given = sorted(inputs) if isinstance(inputs, Mapping) else f"a tensor of shape {tuple(inputs.shape)}"
        hint = f"{too_long(model, inputs)}{hint}"
        raise FP8CalibrationError(
            f"the model cannot be run on the calibration batch after {samples} samples ({given}): {error}{hint}"
        ) from error


def cast_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs with all that is floating-point in the model's dtype."""
    return {key: _as_dtype(model, value) for key, value in inputs.items()}


def _as_dtype(model: nn.Module, value: Any) -> Any:
    """Images and other floating-point inputs in the model's dtype, as its own pipeline would give them."""
    dtype = getattr(model, "dtype", None)
    if dtype is not None and torch.is_tensor(value) and value.is_floating_point():
        return value.to(dtype)
    return value
