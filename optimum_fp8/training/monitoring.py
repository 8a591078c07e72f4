"""purpose="monitor": what FP8 loses of each module's input while training goes on, in the logs of the Trainer."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from ..calibration.decode import masks_in
from ..config import FP8Config
from ..errors import FP8ConfigError
from ..lifecycle import Phase, state_of
from ..measure import processes
from ..measure.padding import Padding
from ..modules.handler import converted_modules
from ..scales import WEIGHT_ONLY, Scheme
from ..selection import select
from .event import Event
from .passes import ForwardPasses
from .purpose import Purpose, check_count
from .rates import lost

logger = logging.getLogger(__name__)

DRIFT, SATURATION, UNDERFLOW = "drift", "saturation", "underflow"
PREFIX = "fp8"


class Monitoring(Purpose):
    """Logs three values for each module, every so many steps, by names that stay: `fp8/<value>/<module>`.

    drift: log2 of max|x| over that of the first monitored step, which is where a range that was measured then would be
    now: 1 is twice as much.
    saturation: the part of the values beyond the full scale.
    underflow: the part of the values other than zero that become zero.

    The scale is that of the FP8 module; of a module in high precision, the one that its config would give it: dynamic,
    or static from max|x| of the first monitored step. Modules whose activations are not rounded have a drift only.
    """

    name = "monitor"
    needs_config = False

    def __init__(self, config: FP8Config | None, every: int | None = None, worst: int = 3):
        super().__init__(config)
        self.every = None if every is None else check_count("every", every)
        self.worst = check_count("worst", worst)
        self._event: Event | None = None
        self._passes: ForwardPasses | None = None
        self._handles: list[Any] = []
        self._schemes: dict[str, tuple[Scheme, torch.Tensor | None]] = {}
        self._seen: dict[str, torch.Tensor] = {}
        self._first: dict[str, float] = {}
        self._padding: Padding | None = None
        self._steps, self._due = 0, False

    # --- beginning and ending -------------------------------------------------------------------------------------

    def made(self, event: Event) -> None:
        self._detach()
        self._event, self._passes = event, ForwardPasses(event.model, self._watched)

    def train_begins(self, event: Event) -> None:
        self.made(event)
        self._attach(event.model)
        self._steps, self._first = event.state.global_step, {}
        if event.state.global_step:
            self._first = dict(event.remembered.get(self._key, {}))

    def train_ended(self, event: Event) -> None:
        self._detach()

    def _attach(self, model: nn.Module) -> None:
        for name, (module, scheme, scale) in self._found(model).items():
            self._schemes[name] = scheme, scale
            self._handles.append(module.register_forward_pre_hook(partial(self._look, name), with_kwargs=True))

    def _detach(self) -> None:
        if self._passes is not None:
            self._passes.remove()
        self._passes = None
        self._let_go()

    def _let_go(self) -> None:
        """Leave the modules alone until the next forward pass that is looked at."""
        while self._handles:
            self._handles.pop().remove()
        self._schemes, self._seen = {}, {}

    @property
    def _key(self) -> str:
        return f"optimum_fp8.{self.name}"

    def _found(self, model: nn.Module) -> dict[str, tuple[nn.Module, Scheme, torch.Tensor | None]]:
        """The modules to look at, with their schemes, and the scales that are there already.

        Raises:
            FP8ConfigError: a model in high precision, and no config.
            FP8SelectionError: the config selects nothing.
        """
        in_fp8 = {name: module for name, (module, _) in converted_modules(model).items() if hasattr(module, "scheme")}
        if in_fp8:
            return {
                name: (module, module.scheme, getattr(module, "input_scale", None)) for name, module in in_fp8.items()
            }
        state = state_of(model)
        if state is not None and state.phase is Phase.TRAINING:
            decisions = state.decisions
        elif self.config is not None:
            decisions = select(model, self.config)
        else:
            raise FP8ConfigError(
                "FP8Callback: purpose='monitor' of a model in high precision needs a config, found none: pass the "
                "FP8Config that the model is to be quantized with"
            )
        selected = [each for each in decisions if each.selected and each.handler.family.replaced]
        return {each.name: (model.get_submodule(each.name), each.scheme, None) for each in selected}

    # --- while the model runs -------------------------------------------------------------------------------------

    def step_begins(self, event: Event) -> None:
        every = self.every or max(1, int(event.state.logging_steps))
        self._steps += 1
        self._due = self._steps % every == 0 or self._steps == 1

    def step_ended(self, event: Event) -> None:
        if self._due and self._passes is not None:
            self._due = False
            self._log(event)

    def evaluated(self, event: Event) -> None:
        if not event.trains and self._handles:
            self._log(event)
            self._let_go()

    def _watched(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        assert self._event is not None
        if self._event.trains:
            return self._looking(inputs) if self._due and model.training else None
        if model.training:
            return None
        if not self._handles:  # an evaluation without training, of which nothing tells before its first batch
            self._attach(model)
        return self._looking(inputs)

    @contextmanager
    def _looking(self, inputs: dict[str, Any]) -> Iterator[None]:
        self._padding = Padding(masks_in(inputs))
        try:
            yield
        finally:
            self._padding = None

    @torch.no_grad()
    def _look(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())), None)
        if self._padding is None or not isinstance(x, torch.Tensor) or not x.is_floating_point() or not x.numel():
            return
        x = self._padding.rows_of(x)
        scheme, scale = self._schemes[name]
        largest = x.abs().amax().double()
        if scheme.activations == WEIGHT_ONLY:
            counts = largest.new_zeros(2)
        else:
            if scale is None:
                scale = scheme.dynamic_scale(x) if scheme.is_dynamic else self._scale_at_first(name, scheme, largest)
            counts = lost(x, spread(scale, x), scheme.fmt)
        found = torch.stack([largest, *counts, largest.new_tensor(x.numel())])
        known = self._seen.get(name)
        self._seen[name] = found if known is None else torch.cat([torch.maximum(known, found)[:1], (known + found)[1:]])

    def _scale_at_first(self, name: str, scheme: Scheme, largest: torch.Tensor) -> torch.Tensor:
        """The scale that a range measured at the first monitored step gives."""
        first = largest.new_tensor(self._first[name]) if name in self._first else largest
        return scheme.static_scale(first.float())

    # --- the logs -------------------------------------------------------------------------------------------------

    def _log(self, event: Event) -> None:
        found = self._gathered()
        for name, (largest, *_) in found.items():
            self._first.setdefault(name, largest)
        event.remembered[self._key] = dict(self._first)
        rates: dict[str, dict[str, float]] = {DRIFT: {}, SATURATION: {}, UNDERFLOW: {}}
        for name, (largest, saturated, vanished, count) in found.items():
            first = self._first[name]
            rates[DRIFT][name] = math.log2(largest / first) if largest > 0 and first > 0 else 0.0
            if self._schemes[name][0].activations != WEIGHT_ONLY:
                rates[SATURATION][name], rates[UNDERFLOW][name] = saturated / count, vanished / count
        self.results |= {"rates": rates, "summary": self._summary(rates)}
        logs = {f"{PREFIX}/{kind}/{name}": value for kind, values in rates.items() for name, value in values.items()}
        logs |= {f"{PREFIX}/{kind}_max": max(values.values(), key=abs) for kind, values in rates.items() if values}
        logger.info("FP8Callback: step %d: %s", event.state.global_step, self.results["summary"])
        should_log = event.control.should_log
        event.trainer.log(logs)
        event.control.should_log = (
            should_log  # which logging has taken for done: the loss of this step is still to come
        )

    def _gathered(self) -> dict[str, list[float]]:
        """What all processes have seen: max|x|, how many values saturate and vanish, and of how many, by module."""
        own = torch.stack(list(self._seen.values())).tolist() if self._seen else []
        said = dict(zip(self._seen, own, strict=True))
        self._seen = {}
        total: dict[str, list[float]] = {}
        for heard in processes().agree({"seen": said}):
            for name, (largest, *counts) in heard["seen"].items():
                before = total.get(name, [0.0] * 4)
                total[name] = [max(before[0], largest), *(a + b for a, b in zip(before[1:], counts, strict=True))]
        return total

    def _summary(self, rates: dict[str, dict[str, float]]) -> str:
        parts = []
        for kind, values in rates.items():
            worst = sorted(values.items(), key=lambda pair: -abs(pair[1]))[: self.worst]
            parts.append(f"{kind}: " + ", ".join(f"{name} {value:.3g}" for name, value in worst))
        return "; ".join(parts)


def spread(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A scale `(1,)`, `[…, 1]` or `[…, groups]` as one that broadcasts with `x` `[…, features]`."""
    groups = scale.shape[-1]
    return scale if groups == 1 else scale.repeat_interleave(x.shape[-1] // groups, dim=-1)
