"""Running calibration data through a model that is being measured."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..config import FP8Config
from ..errors import FP8CalibrationError, FP8Error, FP8StateError
from ..lifecycle.prepare import settle_measurements
from ..lifecycle.state import FP8State, measuring_state, unwrapped
from ..measure import Observers
from .batching import batch_size_of
from .decode import decodes, masks_in, needs_decoder_start, passes
from .facts import too_long
from .source import check_dataset

logger = logging.getLogger(__name__)

_FEW_TOKENS = 1024


def calibrate(model: nn.Module, config: FP8Config | None = None, *, batches: Iterator[Any] | None = None) -> nn.Module:
    """Run the config's `dataset` through a prepared model, with a progress bar, without gradients.

    Args:
        model: a model in measuring state.
        config: where the data comes from; by default the config the model was prepared with.
        batches: of the config's dataset, where that has been opened already.

    Returns:
        `model` itself, still measuring: call it again with more data, or go on with `convert(model)`.

    Raises:
        FP8StateError: the model is not being measured.
        FP8CalibrationError: the data cannot be used, or there is none.
        FP8MeasurementError: weights have changed since the first data went through.
    """
    given, model = model, unwrapped(model)
    state = measuring_state(model, "calibrate")
    config = config or state.config
    if config.dataset is None:
        raise FP8CalibrationError("calibrate: the config has no dataset: pass FP8Config(dataset=…)")
    if state.observers is None:
        raise FP8StateError("calibrate: measuring has ended for this model: call convert(model)")
    source = check_dataset(config.dataset)
    settle_measurements(model, state)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            forward = partial(_run_batches, model, state, config)
            if batches is not None:
                forward(batches)
            else:
                source.run(config.dataset, model, config, forward)
    finally:
        for module in training:
            module.training = True
    settle_measurements(model, state)
    return given


def _run_batches(model: nn.Module, state: FP8State, config: FP8Config, batches: Iterator[Any]) -> None:
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    digest, samples, tokens = hashlib.sha256(state.measurements.data.encode()), 0, 0
    with tqdm(total=config.num_calibration_samples, desc="Calibrating", unit="sample") as progress:
        for batch in batches:
            inputs = _to_device(batch, device)
            assert state.observers is not None
            _forward_and_decode(model, state.observers, config, inputs, samples)
            size = batch_size_of(batch)
            samples, tokens = samples + size, tokens + _update(digest, inputs)
            progress.update(size)
        progress.total = samples
        progress.refresh()
    if samples == 0:
        raise FP8CalibrationError("the dataset is empty: no sample went through the model")
    if 0 < tokens < _FEW_TOKENS:
        logger.warning("calibrated on %d tokens only: ranges will not be representative; use more data", tokens)
    state.measurements.samples += samples
    state.measurements.data = digest.hexdigest()[:32]


def _to_device(batch: Any, device: torch.device) -> Any:
    """Model inputs on `device`: a mapping, or the tensor (of a sequence the first: the rest are labels)."""
    if isinstance(batch, Mapping):
        return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    if isinstance(batch, (list, tuple)) and batch:
        batch = batch[0]
    if torch.is_tensor(batch):
        return batch.to(device)
    raise FP8CalibrationError(
        f"a batch of type {type(batch).__name__} cannot be given to a model: expected a dict of inputs or a tensor"
    )


def _forward_and_decode(model: nn.Module, observers: Observers, config: FP8Config, inputs: Any, samples: int) -> None:
    """One forward pass; where attention is measured, over a cache, and `decode_steps` tokens further.

    So it is with a decoder that begins with one token, of which nothing is known but what it generates.
    """
    goes_on = config.wants_attention or needs_decoder_start(model, inputs)
    if not goes_on or not isinstance(inputs, Mapping) or not decodes(model):
        with observers.only_where(*masks_in(inputs), exact=True):
            _call(model, inputs, samples)
        return
    output, hint = None, ""
    with closing(passes(model, _cast(model, inputs), config.decode_steps)) as following:
        while True:
            with _explained(model, inputs, samples, hint):
                try:
                    call = following.send(output)
                except StopIteration:
                    return
            with observers.only_where(*call.masks, exact=True):
                output, hint = _call(model, call.inputs, samples, hint), "; decode_steps=0 leaves out decoding"


def _call(model: nn.Module, inputs: Any, samples: int, hint: str = "") -> Any:
    with _explained(model, inputs, samples, hint):
        return model(**_cast(model, inputs)) if isinstance(inputs, Mapping) else model(_as_dtype(model, inputs))


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


def _cast(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _as_dtype(model, value) for key, value in inputs.items()}


def _as_dtype(model: nn.Module, value: Any) -> Any:
    """Images and other floating-point inputs in the model's dtype, as its own pipeline would give them."""
    dtype = getattr(model, "dtype", None)
    if dtype is not None and torch.is_tensor(value) and value.is_floating_point():
        return value.to(dtype)
    return value


def _update(digest: Any, inputs: Any) -> int:
    """Add a batch to the data's fingerprint; how many tokens it holds (0 for other data)."""
    tensors = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    for tensor in tensors:
        if torch.is_tensor(tensor):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    if not isinstance(inputs, Mapping) or not torch.is_tensor(inputs.get("input_ids")):
        return 0
    mask = inputs.get("attention_mask")
    return int(mask.sum()) if torch.is_tensor(mask) and mask.ndim == 2 else inputs["input_ids"].numel()
