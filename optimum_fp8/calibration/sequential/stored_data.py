"""StoredData: calibration data that go through a model many times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import torch
from torch import nn

from ...errors import FP8CalibrationError
from ...measure import added_data
from ..batch_digest import batch_digest, tokens_in
from ..batching import batch_size_of
from ..decode import decodes, masks_in, needs_decoder_start, passes
from ..forward import call_model, cast_inputs, model_inputs, to_device
from ..repeats import Repeats
from .kept import Kept
from .stand_ins import Output


class StoredData:
    """Batches by their number, with which the model can be called again and again.

    Args:
        model: the model.
        batches: the data.
        kept: where they are kept.
        prompts: whether they are given to the model as the prompts of `generate` are, where it generates.

    Attributes:
        kinds: number of the first batch with each set of inputs: others may go through other parts of the model.
        digest: of the data.
        sizes: samples and tokens of each batch; no tokens in other data than text.
        masks: of each batch, which say what of it is padding.
        repeats: samples that are there more than once.
    """

    def __init__(self, model: nn.Module, batches: Iterator[Any], kept: Kept, *, prompts: bool = False):
        self._model, self._kept, self._prompts = model, kept, prompts and decodes(model)
        self._batches: list[Output] = []
        self._before: list[int] = []
        self.kinds: dict[tuple[str, ...], int] = {}
        self.sizes: list[tuple[int, int]] = []
        self.masks: list[list[torch.Tensor]] = []
        self.digest, self.repeats = "", Repeats()
        for batch in batches:
            inputs = model_inputs(batch)
            self.digest = added_data(self.digest, batch_digest(inputs))
            self.repeats.add(inputs)
            self._add(to_device(model, inputs), batch_size_of(batch))

    @property
    def samples(self) -> int:
        return sum(samples for samples, _ in self.sizes)

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.sizes)

    def _add(self, inputs: Any, size: int) -> None:
        if needs_decoder_start(self._model, inputs):
            raise FP8CalibrationError(
                "calibration='sequential' does not decode, and the batches say nothing of what the decoder of "
                f"{type(self._model).__name__} reads: put decoder_input_ids or labels into them, or use "
                "calibration='whole'"
            )
        names = (key for key, value in inputs.items() if value is not None) if isinstance(inputs, dict) else ()
        self.kinds.setdefault(tuple(sorted(names)), len(self))
        masks, tokens = masks_in(inputs), tokens_in(inputs)
        if self._prompts and isinstance(inputs, dict):
            with closing(passes(self._model, cast_inputs(self._model, inputs), 0)) as prompt:
                inputs, masks = next(prompt)
        output = Output(inputs, (), {}, {})
        self._kept.put(("batch", len(self)), output.take_tensors())
        self._batches.append(output)
        self._before.append(self.samples)
        self.sizes.append((size, tokens))
        self.masks.append(masks)

    def __len__(self) -> int:
        return len(self._batches)

    def inputs(self, batch: int) -> Any:
        return self._batches[batch].of(self._kept.get(("batch", batch)), (), {})

    def run(self, batch: int) -> None:
        """Call the model with the batch of a number."""
        call_model(self._model, self.inputs(batch), self._before[batch])
