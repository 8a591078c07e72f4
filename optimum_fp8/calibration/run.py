"""Running calibration data through a model that is being measured."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from ..config import FP8Config
from ..errors import FP8CalibrationError, FP8NotAvailableError, FP8StateError
from ..lifecycle import is_sharded, name_of_data, refuse_shares
from ..lifecycle.prepare import saw_activations, settle_measurements
from ..lifecycle.state import FP8State, measuring_state, unwrapped
from ..measure import Measurements, added_data, observer_class, processes
from .batch_digest import batch_digest, tokens_in
from .batching import batch_size_of
from .check import Check
from .convergence import Convergence
from .coverage import shortcomings
from .forward import model_inputs, run_batch
from .progress import Progress
from .repeats import Repeats
from .resume import Part, PartialFile
from .source import check_dataset

logger = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    config: FP8Config | None = None,
    *,
    batches: Iterator[Any] | None = None,
    checks: Sequence[Check] = (),
) -> nn.Module:
    """Run the config's `dataset` through a prepared model, with a progress bar, without gradients.

    Args:
        model: a model in measuring state.
        config: where the data comes from; by default the config the model was prepared with.
        batches: of the config's dataset, where that has been opened already.
        checks: look at the measurements as they grow, and may end the calibration.

    Returns:
        `model` itself, still measuring: call it again with more data, or go on with `convert(model)`.

    Raises:
        FP8StateError: the model is not being measured.
        FP8CalibrationError: the data cannot be used, or there is none.
        FP8MeasurementError: weights have changed since the first data went through.
        FP8NotAvailableError: processes split layers of the model.
    """
    given, model = model, unwrapped(model)
    state = measuring_state(model, "calibrate")
    config = config or state.config
    if config.dataset is None:
        raise FP8CalibrationError("calibrate: the config has no dataset: pass FP8Config(dataset=…)")
    if config.calibration == "sequential":
        raise FP8NotAvailableError(
            "calibrate: calibration='sequential' is for models that are quantized while they are loaded: pass the "
            "config to from_pretrained, or use calibration='whole'"
        )
    if state.observers is None:
        raise FP8StateError("calibrate: measuring has ended for this model: call convert(model)")
    source = check_dataset(config.dataset)
    refuse_shares(model)
    _refuse_second_part(state)
    settle_measurements(model, state)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            rounds = _Rounds(model, state, config, checks)
            if batches is not None:
                rounds.run(batches)
            else:
                source.run(config.dataset, model, config, rounds.run)
    finally:
        for module in training:
            module.training = True
    settle_measurements(model, state)
    state.sources.append(name_of_data(config.dataset))
    state.tokens += rounds.progress.tokens
    rounds.say()
    return given


def _refuse_second_part(state: FP8State) -> None:
    """Refuse to measure in parts where those cannot be merged."""
    name, several = state.measurements.observer, processes().count > 1
    why = observer_class(name).not_mergeable
    if why and (several or saw_activations(state.measurements)):
        where = "in several processes" if several else "a second time"
        raise FP8CalibrationError(f"observer={name!r} cannot measure {where}: {why}")


class _Rounds:
    """The calibration loop: rounds of one batch for each process, between which they speak to each other.

    All processes make all batches, and each runs its own. Whatever their number, measurements are looked at after the
    same batches, and in the end those of all together are the same.
    """

    def __init__(self, model: nn.Module, state: FP8State, config: FP8Config, checks: Sequence[Check]):
        self.model, self.state, self.config = model, state, config
        self.convergence, self.repeats = Convergence(stops=config.num_calibration_samples == "auto"), Repeats()
        self.checks: list[Check] = [self.convergence, *checks]
        self.ranks, self.sharded = processes(), is_sharded(model)
        device = next((parameter.device for parameter in model.parameters()), None)
        self.progress = Progress(config, shown=self.ranks.leads, device=device)
        self.file = PartialFile(model, state, config, len(self.checks))
        self.measured = state.measurements.without_data()  # of this process, by this calibration
        self.data, self.stopped, self.judged = "", False, False

    def run(self, batches: Iterator[Any]) -> None:
        """Run all batches, or as many as the checks want, and add what is measured to the state's measurements."""
        observers = self.state.observers
        assert observers is not None
        observers.measurements = self.measured
        try:
            with ExitStack() as stack:
                with self.ranks.together():
                    stack.enter_context(self.progress)
                batches = self._resumed(batches)
                while not self.stopped:
                    self._round(batches)
                self.progress.finished()
        finally:
            observers.measurements = self.state.measurements
        if self.progress.samples == 0:
            raise FP8CalibrationError("the dataset is empty: no sample went through the model")
        total = self.ranks.merged(self.measured, everywhere=False)
        with self.ranks.together():
            if self.ranks.leads:
                self.convergence.note(total, self.progress.batches, self.progress.samples)
        self.state.moved = self.ranks.agree({"moved": self.convergence.movement()})[0]["moved"]
        self.state.measurements.include(self.measured)
        self.state.partials.append(self.file.files)

    def say(self) -> None:
        """Log whether it was enough data, where this process tells."""
        total = self.ranks.merged(self.state.measurements, everywhere=False)
        if not self.ranks.leads:
            return
        movement, state = self.convergence.say(), replace(self.state, measurements=total)
        found = shortcomings(self.model, state, self.config, self.progress.tokens, self.repeats)
        for sentence in found:
            logger.warning("%s", sentence)
        self.progress.judged(movement, found)

    def _resumed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches that have not been run yet, after those of a calibration that was broken off."""
        with self.ranks.together():
            found = self.file.read() if self.ranks.leads else None
        said = {"model": self.measured.fingerprint, "part": vars(found[1]) if found else None}
        heard = self.ranks.agree(said)
        for rank, other in enumerate(heard):
            if other["model"] != heard[0]["model"]:
                raise FP8CalibrationError(f"rank {rank} measures another model than rank 0: load the same in each")
        if heard[0]["part"] is None:
            return batches
        part = Part(**heard[0]["part"])
        with self.ranks.together():
            skipped = list(islice(batches, part.batches))
            data = reduce(added_data, map(batch_digest, map(model_inputs, skipped)), "")
        if len(skipped) < part.batches or data != part.data:
            if self.ranks.leads:
                self.file.not_used("it is of other data")
            return chain(skipped, batches)
        if found:
            self.measured.include(found[0])
        for batch in skipped:
            self.repeats.add(model_inputs(batch))
        self.data, self.stopped, self.judged = part.data, part.stopped, part.stopped
        for check, remembered in zip(self.checks, part.checks, strict=True):
            check.restore(remembered)
        self.progress.resumed(part.batches, part.samples, part.tokens)
        return batches

    def _round(self, batches: Iterator[Any]) -> None:
        try:
            taken = list(islice(batches, self._width()))
            self._run(taken)
        except Exception as error:
            if not self.sharded:  # else the others wait for this one in the forward pass, until it has ended
                self.ranks.stop(error)
            raise
        last = not taken
        save = self.ranks.leads and self.file.is_due(self.progress.batches, last=last)
        heard = self.ranks.agree({"batches": self.progress.batches, "data": self.data, "save": save})
        for rank, other in enumerate(heard):
            if (other["batches"], other["data"]) != (heard[0]["batches"], heard[0]["data"]):
                raise FP8CalibrationError(
                    f"rank {rank} has other data than rank 0 after {self.progress.batches} batches: give all processes "
                    "the same data in the same order, not shares of it; calibration deals the batches out"
                )
        due = [] if last else [check for check in self.checks if check.is_due(self.progress.batches)]
        self.stopped = last
        if due or heard[0]["save"]:
            total = self.ranks.merged(self.measured, everywhere=False)
            self.judged = bool(due) and self._judged(due, total)
            self.stopped = last or self.judged
            if self.ranks.leads and (save or (self.stopped and self.file.is_due(self.progress.batches, last=True))):
                self._save(total)

    def _width(self) -> int:
        """How many batches the next round has: one for each process, fewer where a check is due before."""
        ahead = range(1, self.ranks.count)
        due = (n for n in ahead if any(check.is_due(self.progress.batches + n) for check in self.checks))
        return next(due, self.ranks.count)

    def _run(self, taken: list[Any]) -> None:
        """Run one of the batches that were taken in this process, and count all of them."""
        assert self.state.observers is not None
        inputs = [model_inputs(batch) for batch in taken]
        digests = [batch_digest(each) for each in inputs]
        for each in inputs:
            self.repeats.add(each)
        mine, before = self.ranks.rank, self.progress.samples
        if mine < len(taken):
            run_batch(self.model, self.state.observers, self.config, inputs[mine], before)
            self.measured.samples += batch_size_of(taken[mine])
            self.measured.data = added_data(self.measured.data, digests[mine])
        elif taken and self.sharded:  # the others cannot run theirs without this one
            self.state.observers.measurements = self.measured.without_data()
            run_batch(self.model, self.state.observers, self.config, inputs[-1], before)
            self.state.observers.measurements = self.measured
        self.data = reduce(added_data, digests, self.data)
        self.progress.advanced(len(taken), sum(map(batch_size_of, taken)), sum(map(tokens_in, inputs)))

    def _judged(self, due: list[Check], total: Measurements) -> bool:
        """Whether a check ends the calibration; rank 0 asks them."""
        try:
            asked = due if self.ranks.leads else []
            stops = [check.note(total, self.progress.batches, self.progress.samples) for check in asked]
        except Exception as error:
            self.ranks.stop(error)
            raise
        return bool(self.ranks.agree({"stop": any(stops)})[0]["stop"])

    def _save(self, total: Measurements) -> None:
        checks = [check.state() for check in self.checks]
        done = self.progress
        part = Part(done.batches, done.samples, done.tokens, self.data, checks, self.judged)
        if self.file.write(total, part):
            done.saved(self.file.path)
