"""FP8Callback: measuring, quantizing, monitoring and quantization-aware training, as a callback of a Trainer."""

from __future__ import annotations

import weakref
from typing import Any

from transformers import Trainer, TrainerCallback

from ..config import FP8Config
from ..errors import FP8ConfigError, nearest
from ..lifecycle import unwrapped
from .event import Event, calling_trainer
from .measuring import Measuring
from .monitoring import Monitoring
from .purpose import Purpose
from .quantization_aware import QuantizationAware
from .quantizing import Quantizing

PURPOSES: dict[str, type[Purpose]] = {
    each.name: each for each in (Measuring, Quantizing, Monitoring, QuantizationAware)
}


class FP8Callback(TrainerCallback):
    """What becomes of a model in FP8, while a transformers Trainer trains or evaluates it.

        trainer = Trainer(model, arguments, …, callbacks=[FP8Callback(FP8Config(), purpose="quantize")])

    What cannot work is refused when training begins. With several processes, all of them are given the callback.

    Args:
        config: what to quantize, and how; for "monitor" of a model in FP8 it may be left out.
        purpose: what to do:
            "measure": collect the ranges of activations, and write them to the config's `dump_stats_path`.
            "quantize": when training ends, evaluate the model, convert it, evaluate it in FP8 and save it; the model
            itself stays in high precision.
            "monitor": log how far ranges move, and how much saturates or becomes zero in FP8, module by module.
            "qat": train with weights and inputs that are rounded to FP8, then as "quantize".
        options: of the purpose:
            during ("measure", "quantize"): which batches are measured, "training" (default) or "evaluation".
            every ("measure", "quantize", "monitor"): only each so many steps; 1, and for "monitor" `logging_steps`.
            save_to ("quantize", "qat"): folder of the FP8 model; None: `<output_dir>/fp8`.
            evaluate ("quantize", "qat"): whether both models are evaluated, where the Trainer has an `eval_dataset`.
            worst ("monitor"): how many modules the summary names.

    Attributes:
        measurements: a `Measurements` of what was seen; None as long as nothing was.
        metrics: "full" and "fp8", the metrics of both models.
        saved_to: the folder of the FP8 model, once it is there.
        rates: "drift", "saturation" and "underflow" at the last monitored step, each by module.
        summary: the results in words.

    Raises:
        FP8ConfigError: an unknown purpose or option, or no config.
    """

    def __init__(self, config: FP8Config | None = None, purpose: str = "measure", **options: Any):
        if purpose not in PURPOSES:
            raise FP8ConfigError(f"FP8Callback: purpose={purpose!r} is not known: {nearest(str(purpose), PURPOSES)}")
        made_by = PURPOSES[purpose]
        for name in options:
            if name not in made_by.options():
                raise FP8ConfigError(
                    f"FP8Callback: {name}={options[name]!r} is no option of purpose={purpose!r}: "
                    f"{nearest(name, made_by.options())}"
                )
        self.config, self.purpose = config, purpose
        self._does = made_by(config, **options)
        self._trainer: weakref.ref[Trainer] | None = None

    def __getattr__(self, name: str) -> Any:
        if name in ("measurements", "metrics", "saved_to", "rates", "summary"):
            return self._does.results.get(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _event(self, args: Any, state: Any, control: Any, kwargs: dict[str, Any], *, begins: bool = False) -> Event:
        trainer = None if begins or self._trainer is None else self._trainer()
        if trainer is None:
            trainer = calling_trainer()
            self._trainer = weakref.ref(trainer)
        return Event(trainer, unwrapped(kwargs["model"]), args, state, control)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._does.made(self._event(args, state, control, kwargs, begins=True))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._does.train_begins(self._event(args, state, control, kwargs, begins=True))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._does.step_begins(self._event(args, state, control, kwargs))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._does.step_ended(self._event(args, state, control, kwargs))

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._does.epoch_ended(self._event(args, state, control, kwargs))

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._does.prediction_step(self._event(args, state, control, kwargs))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._does.evaluated(self._event(args, state, control, kwargs))

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self._does.evaluated(self._event(args, state, control, kwargs))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._does.saved(self._event(args, state, control, kwargs))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._does.train_ended(self._event(args, state, control, kwargs))
