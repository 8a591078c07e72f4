"""requantize: from one FP8 format to another, without the model in high precision."""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel

from ..calibration import calibrate
from ..checkpoint.folder import config_of_transformers
from ..config import KEYS, FP8Config
from ..config.requantizing import OF_MEASURING, OF_SCALES
from ..errors import FP8ConfigError
from ..files.skeleton import class_saved
from ..lifecycle import FP8State, data_of, finalize_calibration, prepare, state_of, with_change
from .opened import (
    Rewritten,
    open_checkpoint,
    refuse_existing,
    refuse_unchanged,
    rescheme,
    with_keys,
    write_checkpoint,
)

_NO_RANGES = "give a dataset to measure them with, or activation_scheme='dynamic' or 'weight_only'"


def requantize(
    folder: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: FP8Config,
    *,
    max_shard_size: int | str = "5GB",
) -> Rewritten:
    """Write a checkpoint of ours in another FP8 format, from the values that it has in FP8.

    Static scales follow from the ranges in the checkpoint; where it has none, `config` needs a dataset, and they are
    measured on the dequantized model. Which modules are in FP8 stays as it is.

    Args:
        folder: of the checkpoint, of a model of transformers.
        output: a folder that is not there yet.
        config: the keys that were given to it are those that change, for all modules: of scales and formats (as
            `FP8Config.preset("FP8_BLOCK")` has them), and a dataset.
        max_shard_size: of one file of weights, as `save_pretrained` takes it.

    Returns:
        where it is, and the error that was added to the weights of each module.

    Raises:
        FP8ConfigError: nothing changes, or a key is given that is about something else.
        FP8CheckpointError: the output exists, the folder holds no checkpoint of ours, or a module cannot be scaled so.
        FP8MeasurementError: static scales need ranges, which the checkpoint lacks.
    """
    source, place = os.fspath(folder), os.fspath(output)
    keys = _checked(config)
    refuse_existing(place)
    measured = _measured(source, config, keys) if config.dataset is not None else None
    model, state = open_checkpoint(source)
    was = {key: getattr(state.config, key) for key in keys}
    new = with_keys(state.config, keys)
    if measured is None:
        refuse_unchanged("requantize", state.config, new, keys, "give another format, or a dataset to measure anew")
    else:
        state.measurements = measured.measurements
    rows = rescheme(model, state, new, source, _NO_RANGES)
    made = Rewritten(os.path.abspath(place), new, rows)
    provenance = state.provenance
    if measured is not None:  # of the dequantized model, which no original has the fingerprint of
        data = {name: value for name, value in data_of(measured).items() if name != "model_fingerprint"}
        provenance = {**provenance, "data": data}
    state.provenance = with_change(provenance, "requantized", **keys, before=was, **made.change())
    write_checkpoint(model, source, place, max_shard_size)
    return made


def _checked(config: FP8Config) -> dict[str, Any]:
    """The keys of scales and formats that a configuration was given.

    Raises:
        FP8ConfigError: none was, or another one.
    """
    if not isinstance(config, FP8Config):
        raise FP8ConfigError(f"requantize: expected an FP8Config, found {config!r}: use FP8Config(…) or a preset")
    given = [name for name in KEYS if config.says(name)]
    if other := [name for name in given if name not in (*OF_SCALES, *OF_MEASURING)]:
        raise FP8ConfigError(
            f"requantize: {other[0]} is not about scales and formats, and cannot be changed in FP8: expected "
            f"{', '.join(OF_SCALES)}, or a dataset; quantize the original model for the rest"
        )
    keys = {name: getattr(config, name) for name in given if name in OF_SCALES}
    if not keys:
        raise FP8ConfigError(f"requantize: nothing to change: give a preset, or some of {', '.join(OF_SCALES)}")
    if config.dataset is None and (idle := [name for name in given if name in OF_MEASURING]):
        raise FP8ConfigError(
            f"requantize: {idle[0]} says how ranges are measured, and nothing is to be measured: give a dataset with "
            "it, or leave it out"
        )
    return keys


def _measured(source: str, config: FP8Config, keys: dict[str, Any]) -> FP8State:
    """The state of the dequantized model, that the data of a configuration went through; no file of it is left.

    Raises:
        FP8ConfigError: all scales are dynamic, and follow from no data.
    """
    said = config_of_transformers(source)
    cls = class_saved(source, said)
    model: PreTrainedModel = cls.from_pretrained(source, quantization_config=FP8Config(dequantize=True))
    data = {name: getattr(config, name) for name in OF_MEASURING if config.says(name)}
    carried = FP8Config.from_dict(said["quantization_config"])
    with TemporaryDirectory(prefix="fp8-") as folder:
        data |= {"mode": "AUTO", "dump_stats_path": os.path.join(folder, "measure")}
        prepare(model, with_keys(carried, keys).replace(**data))
        calibrate(model)
        finalize_calibration(model)
    state = state_of(model)
    assert state is not None
    return state
