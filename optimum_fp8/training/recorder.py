"""Recorder: measures a model while a Trainer runs it, and goes on where a checkpoint has left it."""

from __future__ import annotations

import base64
import logging
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..calibration.decode import masks_in
from ..config import FP8Config
from ..errors import FP8ConfigError, FP8MeasurementError, FP8NotAvailableError
from ..lifecycle import (
    FP8State,
    dequantize,
    finalize_calibration,
    needs_ranges,
    settle_measurements,
    start_measuring,
    state_of,
    unreached,
)
from ..measure import Measurements, observer_class, processes
from .event import Event
from .passes import ForwardPasses, samples_in
from .purpose import Purpose

logger = logging.getLogger(__name__)

TRAINING, EVALUATION = "training", "evaluation"
_WEIGHT = "weight"


class Recorder:
    """Measures what goes through the selected modules in the forward passes of a Trainer.

    While weights change, the ranges are those of all steps together, or of the last evaluation; they count as those of
    the weights at the end. What was seen is written into the state of the Trainer before it saves a checkpoint, and is
    found there when training is resumed from it. The best model that is loaded at the end has the ranges of its own
    checkpoint.

    Args:
        config: which modules are measured, and by which observer.
        during: "training" or "evaluation".
        every: only each so many steps of training.
        key: under which the state of the Trainer holds what was seen.
    """

    def __init__(self, config: FP8Config, during: str, every: int, key: str):
        self.config, self.during, self.every, self.key = config, during, every, key
        self.model: nn.Module | None = None
        self._passes: ForwardPasses | None = None
        self._event: Event | None = None
        self._earlier: Measurements | None = None
        self._now: tuple[int, str] | None = None
        self._best: tuple[int, str] | None = None
        self._evaluated_at, self._is_over = -1, False
        self._steps = 0

    # --- beginning and ending -------------------------------------------------------------------------------------

    def start(self, event: Event, *, trained: bool = True) -> FP8State:
        """Attach observers to a model, which may be `trained` while they are there.

        Raises:
            what `prepare` raises.
        """
        self.stop()
        state = start_measuring(event.model, self.config, trained=trained)
        self.model, self._event, self._steps = event.model, event, event.state.global_step
        self._evaluated_at, self._is_over = -1, False
        try:
            if needs_ranges(state):
                self._refuse(event, trained)
                self._resume(event)
                self._passes = ForwardPasses(event.model, self._watched)
        except BaseException:
            self.stop()
            raise
        if state.observers is not None:
            state.observers.paused = True
        return state

    @property
    def measures(self) -> bool:
        """Whether anything is measured at present."""
        return self._passes is not None

    @property
    def state(self) -> FP8State:
        """What is known of the model that is measured."""
        state = state_of(self.model) if self.model is not None else None
        assert state is not None
        return state

    def finish(self, event: Event) -> Measurements:
        """End measuring with the weights that the model has now, and write what was seen; all processes call it.

        The model stays in measuring state: it can be converted.

        Raises:
            what `finalize_calibration` raises.
        """
        assert self.model is not None
        settle_measurements(self.model, self.state)
        self._take_best(event)
        if self._earlier is not None and processes().leads:
            self._earlier.fingerprint = self.state.measurements.fingerprint
            self.state.measurements.include(self._earlier)
        self._earlier = None
        if self._passes is not None:
            self._passes.remove()
        return finalize_calibration(self.model)

    def stop(self) -> None:
        """Leave the model as it was before; whatever was not finished is lost."""
        if self._passes is not None:
            self._passes.remove()
        if self.model is not None and state_of(self.model) is not None:
            dequantize(self.model)
        self.model = self._passes = None

    def _refuse(self, event: Event, trained: bool) -> None:
        config, several = self.config, processes().count > 1
        if "input" not in config.measured:
            raise FP8ConfigError(
                f"FP8Callback: measure_exclude={config.measure_exclude!r} leaves nothing to scale static activations "
                "by: leave it out, or use activation_scheme='dynamic'"
            )
        asked = [key for key in ("attention", "kv_cache") if any(getattr(v, key) for v in config.variants.values())]
        asked += [key for key in ("fold_batch_norm", "calibrate_all_experts") if getattr(config, key)]
        if trained and asked:
            raise FP8NotAvailableError(
                f"FP8Callback: {asked[0]}=True changes how a model computes while it is measured, and so how it is "
                "trained: give the config a `dataset` and purpose='quantize', which calibrates with it after "
                "training, or leave the key out"
            )
        if event.args.torch_compile:
            raise FP8NotAvailableError(
                "FP8Callback: torch_compile=True leaves no place to measure a model that is trained: give the config a "
                "`dataset` and purpose='quantize', which calibrates with it after training, or use "
                "activation_scheme='dynamic'"
            )
        why = observer_class(config.observer).not_mergeable
        if why and (several or event.state.global_step):
            where = "in several processes" if several else "in a training that is resumed"
            raise FP8ConfigError(f"FP8Callback: observer={config.observer!r} cannot measure {where}: {why}")
        if self.during == EVALUATION and trained and event.trainer.eval_dataset is None:
            raise FP8ConfigError(
                "FP8Callback: during='evaluation', and the Trainer has no eval_dataset: give it one, and an "
                "eval_strategy, or use during='training'"
            )

    # --- while the model runs -------------------------------------------------------------------------------------

    def step_begins(self) -> None:
        """Count a step of training."""
        self._steps += 1

    def warn_of_unreached(self) -> None:
        """Tell early what the conversion will refuse: modules that no batch has gone through."""
        names = [target.name for target in unreached(self.state_model, self.state.targets(self.state_model))]
        if names:
            logger.warning(
                "FP8Callback: the first step of training did not reach %s: if none does, they cannot have static "
                "activations: put them on the blocklist, or set ignore_modules_wo_measures=True",
                names[:8],
            )

    def first_pass(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """What to enter for a forward pass that has begun already when the observers came."""
        return self._watched(model, inputs)

    def add_earlier(self, measurements: Measurements) -> None:
        """Go on from what was measured of the same weights before."""
        self._earlier = measurements

    @property
    def state_model(self) -> nn.Module:
        """The model that is measured."""
        assert self.model is not None
        return self.model

    def _watched(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """What to enter for a forward pass: nothing where it is not to be measured."""
        if model.training != (self.during == TRAINING):
            return None
        assert self._event is not None
        if model.training:
            if (self._steps - 1) % self.every:
                return None
        elif self._event.trains and self._evaluated_at != self._event.trainer.state.global_step:
            self._evaluated_at = self._event.trainer.state.global_step
            self._forget()
        return self._measuring(inputs)

    @contextmanager
    def _measuring(self, inputs: dict[str, Any]) -> Iterator[None]:
        state = self.state
        assert state.observers is not None
        with state.observers.only_where(*masks_in(inputs)):
            state.observers.paused = False
            try:
                yield
            finally:
                state.observers.paused = True
        state.measurements.samples += samples_in(inputs)

    def _forget(self) -> None:
        """Begin anew: what was measured was of other weights."""
        seen = self.state.measurements
        for place in [place for place in seen.tensors if place[1] != _WEIGHT]:
            del seen.tensors[place]
        seen.experts.clear()
        seen.samples, self._earlier = 0, None

    def training_is_over(self) -> None:
        """Have an evaluation that comes now begin anew: it is of the model that stays, the best one it may be."""
        self._evaluated_at, self._is_over = -1, True

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def record(self, event: Event) -> None:
        """Put what was seen so far into the state of the Trainer, which is saved next; all processes call it."""
        self._now = (event.state.global_step, _packed(self._seen()))
        event.remembered[self.key] = {"now": self._now, "best": self._best}

    def saved(self, event: Event) -> None:
        """Keep what belongs to the best checkpoint so far."""
        if self._now is not None and event.state.best_global_step == event.state.global_step == self._now[0]:
            self._best = self._now

    def _seen(self) -> Measurements:
        """What all processes have seen of activations, in this run and before it was resumed; no weights."""
        own = self.state.measurements
        mine = own.without_data()
        mine.tensors = {place: each for place, each in own.tensors.items() if place[1] != _WEIGHT}
        mine.experts, mine.samples = own.experts, own.samples
        merged = processes().merged(mine, everywhere=True)
        if self._earlier is None:
            return merged
        total = merged.without_data()
        self._earlier.fingerprint = merged.fingerprint
        total.include(self._earlier)
        total.include(merged)
        return total

    def _resume(self, event: Event) -> None:
        """Go on from what the checkpoint holds that training is resumed from."""
        self._earlier = self._now = self._best = None
        found = event.remembered.get(self.key)
        step = event.state.global_step
        if step == 0:
            return
        if found is None or found["now"][0] != step:
            logger.warning(
                "FP8Callback: the checkpoint of step %d that training is resumed from holds no ranges: what was seen "
                "before it does not count",
                step,
            )
            return
        self._now = (step, found["now"][1])
        self._best = self._now if event.state.best_global_step == step else found["best"]
        self._earlier = _unpacked(self._now[1], self.state.measurements)

    def _take_best(self, event: Event) -> None:
        """Take the ranges of the best checkpoint, where the model that it holds was loaded in the end."""
        best, step = event.state.best_global_step, event.state.global_step
        if not event.trains or not event.args.load_best_model_at_end or best in (None, step):
            return
        if self.during == EVALUATION and self._is_over and self._evaluated_at == step:
            return  # measured just now
        if self._best is None or self._best[0] != best:
            logger.warning(
                "FP8Callback: the best model, of step %s, was loaded, and no ranges were kept with its checkpoint: "
                "those of all steps are used",
                best,
            )
            return
        self._forget()
        self._earlier = _unpacked(self._best[1], self.state.measurements)


class Recording(Purpose):
    """A purpose whose recorder measures what goes through the model, and has the ranges ready for each checkpoint.

    Attributes:
        recorder: what measures.
    """

    recorder: Recorder
    _first: int | None = None  # the number of the first step, after which it is known what is not reached

    def step_begins(self, event: Event) -> None:
        self.recorder.step_begins()

    def step_ended(self, event: Event) -> None:
        recorder = self.recorder
        if recorder.measures and event.state.global_step == self._first and recorder.during == TRAINING:
            recorder.warn_of_unreached()
        self._record_if_saved(event)

    def epoch_ended(self, event: Event) -> None:
        self._record_if_saved(event)

    def _record_if_saved(self, event: Event) -> None:
        if self.recorder.measures and event.control.should_save:
            self.recorder.record(event)


def _packed(measurements: Measurements) -> str:
    """Measurements as text for JSON."""
    return base64.b64encode(zlib.compress(measurements.encoded())).decode("ascii")


def _unpacked(text: str, model: Measurements) -> Measurements:
    """What `_packed` was given, as measurements of a model.

    Raises:
        FP8MeasurementError: they are of other modules, or by another observer.
    """
    found, _ = Measurements.decoded(zlib.decompress(base64.b64decode(text)), "the state of the Trainer")
    if found.observer != model.observer:
        raise FP8MeasurementError(
            f"FP8Callback: the checkpoint that training is resumed from holds ranges of observer={found.observer!r}, "
            f"the config says {model.observer!r}: resume with the config that training began with"
        )
    found.fingerprint, found.architecture = model.fingerprint, dict(model.architecture)
    for observer in found.tensors.values():
        observer.context = model.context
    return found
