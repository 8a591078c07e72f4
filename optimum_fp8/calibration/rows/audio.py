"""Audio of calibration data: decoded, checked for its sampling rate, and put through a feature extractor."""

from __future__ import annotations

import io
import os
import wave
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from ...config import FP8Config
from ...errors import FP8CalibrationError
from ..batching import companion, groups
from ..facts import ModelFacts
from .columns import Row
from .ways import Way, span


class Sound(NamedTuple):
    """Samples of one channel, as floats, and how many of them are a second."""

    array: np.ndarray
    rate: int


class Audio(Way):
    """A column of audio: `input_features` or `input_values`, whatever the model's feature extractor makes of it."""

    name = "the audio"

    def __init__(self, column: str, folder: str, config: FP8Config, model: ModelFacts):
        self.column, self.folder, self.config, self.model = column, folder, config, model
        self.used = (column,)
        processor = companion("processor", config.processor, model.origin)
        self.extractor = getattr(processor, "feature_extractor", processor)
        self.rate: int | None = getattr(self.extractor, "sampling_rate", None)
        if self.rate is None:
            raise FP8CalibrationError(
                f"column {column!r} holds audio, and {type(processor).__name__} is no feature extractor: pass one as "
                "processor= in the config"
            )

    def check(self, row: Row) -> bool:
        """Refuse a row without audio, or with audio of another rate; files are not opened."""
        value, where = row.values.get(self.column), self._where(row)
        if isinstance(value, Mapping) and "array" in value:
            self._checked(_array(value, where), where)
        elif isinstance(value, (str, os.PathLike)):
            _path(value, where, self.folder)
        elif not isinstance(value, Mapping) and not hasattr(value, "get_all_samples"):
            raise FP8CalibrationError(f"{where} is {_found(value)}, not audio: leave such rows out, or correct them")
        return True

    def batches(self, rows: Iterable[Row]) -> Iterator[Any]:
        """What the feature extractor makes of each group of rows, without padding that a model takes for sound."""
        for group in groups(islice(rows, self.config.most_samples), self.config.batch_size):
            arrays = [self.sound(row).array for row in group]
            try:
                yield from self._extracted(arrays)
            except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                raise FP8CalibrationError(
                    f"{span(group)}: {type(self.extractor).__name__} cannot take the audio in "
                    f"column {self.column!r}: {error}"
                ) from error

    def sound(self, row: Row) -> Sound:
        """The audio of a row, at the feature extractor's rate."""
        value, where = row.values.get(self.column), self._where(row)
        return self._checked(decoded(value, where, self.folder, self.rate), where)

    def _extracted(self, arrays: list[np.ndarray]) -> Iterator[Any]:
        """One batch, where rows are of one length or a mask says which frames are padding; else one batch a row.

        A mask of a waveform does not say which of the frames are padding that a model makes of it.
        """
        options = {"sampling_rate": self.rate, "return_tensors": "pt"}
        alone = [self.extractor(array, **options) for array in arrays]
        name = self.extractor.model_input_names[0]
        if len({batch[name].shape[1:] for batch in alone}) == 1:  # so it is too where all are padded to one length
            yield {key: torch.cat([batch[key] for batch in alone]) for key in alone[0]}
        elif alone[0][name].ndim > 2 and self.model.takes("attention_mask") and self.extractor.return_attention_mask:
            yield self.extractor(arrays, padding=True, return_attention_mask=True, **options)
        else:
            yield from alone

    def _checked(self, sound: Sound, where: str) -> Sound:
        if sound.rate != self.rate:
            raise FP8CalibrationError(
                f"{where} has a sampling rate of {sound.rate} Hz, and {type(self.extractor).__name__} takes "
                f"{self.rate}: resample it, or cast the column to datasets.Audio(sampling_rate={self.rate}) with "
                "torchcodec"
            )
        if not sound.array.size:
            raise FP8CalibrationError(f"{where} is empty: leave such rows out")
        return sound

    def _where(self, row: Row) -> str:
        return f"{row.where}, column {self.column!r}"


def decoded(value: Any, where: str, folder: str, rate: int | None) -> Sound:
    """Audio from an array with its rate, a decoder of torchcodec, a path, or the bytes of a file.

    Files are decoded by torchcodec, which resamples them to `rate`; without it, WAV files by Python.

    Raises:
        FP8CalibrationError: it is none of these, or cannot be read.
    """
    if isinstance(value, Mapping) and "array" in value:
        return _array(value, where)
    if hasattr(value, "get_all_samples"):
        samples = value.get_all_samples()
        return Sound(samples.data.mean(dim=0).numpy(), int(samples.sample_rate))
    source: Any = None
    if isinstance(value, Mapping) and value.get("bytes") is not None:
        source = io.BytesIO(value["bytes"])
    elif path := value.get("path") if isinstance(value, Mapping) else value:
        source = _path(path, where, folder)
    if source is None:
        raise FP8CalibrationError(f"{where} is {_found(value)}, not audio: leave such rows out, or correct them")
    if find_spec("torchcodec") is not None:
        from torchcodec.decoders import AudioDecoder

        try:
            return decoded(AudioDecoder(source, sample_rate=rate, num_channels=1), where, folder, rate)
        except (OSError, RuntimeError, ValueError) as error:
            raise FP8CalibrationError(f"{where} cannot be read as audio: {error}") from None
    return _wave(source, where)


def _wave(source: Any, where: str) -> Sound:
    try:
        with wave.open(source, "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            data = np.frombuffer(file.readframes(file.getnframes()), dtype=np.uint8)
    except (wave.Error, EOFError, OSError) as error:
        raise FP8CalibrationError(
            f"{where} is no WAV file of whole numbers ({error}): other audio needs torchcodec (pip install torchcodec)"
        ) from None
    # The bytes of a value as the upper ones of 32 bits; values of one byte have no sign.
    padded = np.zeros((len(data) // width, 4), dtype=np.uint8)
    padded[:, 4 - width :] = data[: len(padded) * width].reshape(-1, width) ^ (0x80 if width == 1 else 0)
    values = padded.view("<i4")[:, 0] / float(1 << 31)
    return Sound(values.reshape(-1, channels).mean(axis=1).astype(np.float32), rate)


def _array(value: Mapping[str, Any], where: str) -> Sound:
    try:
        array = np.asarray(value["array"], dtype=np.float32)
        rate = int(value["sampling_rate"])
    except (TypeError, ValueError) as error:
        raise FP8CalibrationError(f"{where} is no audio: expected numbers and their sampling_rate ({error})") from None
    if array.ndim == 2:  # channels first, as torchcodec has them, or last, as soundfile
        array = array.mean(axis=int(array.shape[0] > array.shape[1]))
    if array.ndim != 1:
        raise FP8CalibrationError(f"{where} has an array of shape {array.shape}: expected one channel of audio")
    return Sound(array, rate)


def _path(value: Any, where: str, folder: str) -> str:
    path = os.path.join(folder, value)
    if not os.path.isfile(path):
        raise FP8CalibrationError(f"{where} is {os.fspath(value)!r}, and there is no such file: expected audio")
    return path


def _found(value: Any) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
