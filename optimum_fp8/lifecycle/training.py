"""Quantization-aware training: putting a model into it, telling its steps, and what a conversion takes from it.

A step is a step of an optimizer of the model's parameters, told by a hook that torch calls after each. So neither
gradient accumulation nor recomputation of activations counts twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..config import FP8Config
from ..errors import FP8MeasurementError, FP8NotAvailableError, FP8StateError
from ..measure import Measurements
from ..modules.fake_quant import Delay, FakeQuant
from ..modules.fake_quantized import FakeQuantized
from ..modules.handler import Change
from ..selection import select
from .sharded import is_sharded
from .state import FP8State, Phase, set_state, state_of, unwrapped


def start_training(model: nn.Module, config: FP8Config, measurements: Measurements) -> FP8State:
    """Have the selected modules compute with rounded weights and inputs from now on.

    Args:
        model: in high precision.
        config: with `fake_quant`.
        measurements: of the model, that hold nothing yet.

    Raises:
        FP8NotAvailableError: a module of a kind that cannot be trained so, or weights that are spread already.
    """
    if is_sharded(model):
        raise FP8NotAvailableError(
            "prepare: the weights of this model are spread over processes: prepare(model, config) before it is sharded "
            "(before fully_shard, or accelerator.prepare)"
        )
    state = FP8State(config, select(model, config), Phase.TRAINING, measurements)
    delay = Delay(config.amax_history_len, config.freeze_scales_at)
    made = [(target, target.handler.fake_quant(target, delay)) for target in state.targets(model)]
    state.changes += [FakeQuantized(target, fake) for target, fake in made]
    state.changes.append(TrainingSteps(model, [fake for _, fake in made]))
    set_state(model, state)
    return state


def finish_training_step(model: nn.Module) -> None:
    """Count a step of a model in quantization-aware training, where its optimizer is none of torch's.

    Steps of torch's optimizers are counted by themselves, and no step is counted twice.

    Raises:
        FP8StateError: the model is not in quantization-aware training.
    """
    state = state_of(unwrapped(model))
    if state is None or state.phase is not Phase.TRAINING:
        raise FP8StateError("finish_training_step: this model is in no quantization-aware training: prepare(model, …)")
    for change in state.changes:
        if isinstance(change, TrainingSteps):
            change.advance()


class TrainingSteps(Change):
    """Tells the modules of a model in training when a step is over; `undo` ends that.

    Args:
        model: the model.
        fakes: what its modules remember.
    """

    def __init__(self, model: nn.Module, fakes: list[FakeQuant]):
        super().__init__(model, "", None)
        self.fakes = fakes
        self.put_on()

    __hash__ = object.__hash__

    def put_on(self) -> None:
        """Tell them from now on."""
        if not _hooks:
            _hooks.append(register_optimizer_step_post_hook(_after_step))
        _running.add(self)

    def undo(self) -> None:
        _running.discard(self)

    def belongs_to(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer is of some of the model's parameters."""
        of_optimizer = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        return any(id(parameter) in of_optimizer for parameter in self.owner.parameters())

    @torch.no_grad()
    def advance(self) -> None:
        """End a step, if any module was trained since the last one; the ranges of all processes become one."""
        if not any(fake.used for fake in self.fakes):
            return
        current = [found for fake in self.fakes if (found := fake.current()) is not None]
        if current and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            together = torch.cat(current)
            dist.all_reduce(together, dist.ReduceOp.MAX)
            for own, common in zip(current, together.split([len(own) for own in current]), strict=True):
                own.copy_(common)
        for fake in self.fakes:
            fake.finish_step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.put_on()  # a copy of a model counts its own steps


_running: WeakSet[TrainingSteps] = WeakSet()
_hooks: list[Any] = []


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for steps in list(_running):
        if steps.belongs_to(optimizer):
            steps.advance()


@contextmanager
def trained_state(model: nn.Module, state: FP8State) -> Iterator[FP8State]:
    """Take a model out of training: its state as one that was measured.

    An error inside puts it back.

    Raises:
        FP8NotAvailableError: the weights are spread over processes.
        FP8MeasurementError: no step was made.
    """
    if is_sharded(model):
        raise FP8NotAvailableError(
            "convert: the weights of this model are spread over processes: save it (save_pretrained, or "
            "trainer.save_model), load it in one process by from_pretrained(…, quantization_config=config) with the "
            "config that it was trained with, and convert(model) there"
        )
    modules = [change for change in state.changes if isinstance(change, FakeQuantized)]
    unseen = [each.target.name for each in modules if each.fake.lacks_ranges]
    if unseen and not state.config.ignore_modules_wo_measures:
        raise FP8MeasurementError(
            f"convert: {len(unseen)} modules have no range of their inputs, which training observes: "
            f"{', '.join(unseen[:8])}: train the model first (a forward pass in training mode), use "
            "activation_scheme='dynamic', or set ignore_modules_wo_measures=True"
        )
    with torch.no_grad():
        scales = {parameter: scale for each in modules for parameter, scale in each.frozen_scales().items()}
    for change in reversed(state.changes):
        change.undo()
    try:
        config = state.config.replace(fake_quant=False, amax_history_len=1, freeze_scales_at=None)
        measured = replace(state.measurements.without_data(), fingerprint=state.fingerprint(model))
        for each in modules:
            each.measured(measured)
        measuring = replace(state, config=config, phase=Phase.MEASURING, measurements=measured, changes=[])
        yield replace(measuring, weight_scales=scales)
    except BaseException:
        return_to_training(model, state)
        raise


def return_to_training(model: nn.Module, state: FP8State) -> None:
    """Put a model that `trained_state` took out of training back, as it was."""
    for change in state.changes:
        if isinstance(change, FakeQuantized | TrainingSteps):
            change.put_on()
    set_state(model, state)
