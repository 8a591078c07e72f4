"""A tiny model of a pair that transformers itself can build and run, with inputs for it."""

from __future__ import annotations

import copy
import functools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING

from . import inputs, overrides, shrink
from .facts import parts
from .pairs import Pair, class_of

LARGEST = 64_000_000  # parameters


class Built(NamedTuple):
    """A model that runs: in high precision, what it is given, and in which dtype it runs."""

    model: Any
    batches: list[dict[str, Any]]
    dtype: torch.dtype


class CannotBuild(Exception):
    """transformers itself cannot build or run a pair here; says why, attempt by attempt."""


def candidates(pair: Pair) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Ways to make a configuration, the tiniest first."""
    if pair.model_type in overrides.CONFIGS:
        yield "own", overrides.CONFIGS[pair.model_type]
    kinds: dict[str, dict[str, bool]] = {
        "proportional": {},
        "with fewer heads": {"fewer_heads": True},
        "with full pictures": {"pictures": False},
        "with full widths": {"widths": False},
        "with full widths and pictures": {"widths": False, "pictures": False},
    }
    for name, options in kinds.items():
        yield name, lambda options=options: _made(pair, options)  # type: ignore[misc]
    yield "default", lambda: CONFIG_MAPPING[pair.model_type]()


def _made(pair: Pair, options: dict[str, bool]) -> Any:
    small = shrink.proportional(shrink.default(pair.model_type), **options)
    for key in (pair.model_type, pair.class_name):
        for name, value in overrides.FIELDS.get(key, {}).items():
            *path, last = name.split(".")
            part = functools.reduce(dict.__getitem__, path, small)
            part[last] = value(small) if callable(value) else value
    return CONFIG_MAPPING[pair.model_type].from_dict(small)


def config_for(model_class: Any, config: Any) -> Any:
    """The configuration inside this one, or around it, of the kind that a model class takes; or this one itself."""
    wanted = model_class.config_class
    for _, each in parts(config):
        if isinstance(each, wanted):
            return each
    if set(wanted.sub_configs) == {"text_config"}:
        text = config.get_text_config()
        return wanted(text_config=text, hidden_size=text.hidden_size)
    return config


def build(pair: Pair) -> Built:
    """A tiny model and two batches of inputs that it takes.

    Raises:
        CannotBuild: no way of making a configuration gives a model that runs.
    """
    causes: list[str] = []
    for name, make in candidates(pair):
        try:
            with limited_to(15):
                return _built(class_of(pair), make)
        except ImportError as error:
            raise CannotBuild(_short(error)) from None
        except Exception as error:
            causes.append(f"{name}: {type(error).__name__}: {_short(error)}")
    raise CannotBuild(" | ".join(causes))


def _built(model_class: Any, make: Callable[[], Any]) -> Built:
    config = config_for(model_class, make())
    with torch.device("meta"):
        count = sum(each.numel() for each in model_class(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise CannotBuild(f"{count:,} parameters, which is too large for a census")
    torch.manual_seed(0)
    model = model_class(copy.deepcopy(config)).eval()
    lively(model)
    errors = []
    for dtype in (torch.bfloat16, torch.float32):
        try:
            model.to(dtype)
            batches = inputs.batches(model)
            return Built(model, batches, dtype)
        except Exception as error:
            errors.append(error)
            model.to(torch.float32)
    raise errors[-1]


@torch.no_grad()
def lively(model: Any) -> None:
    """Give parameters that start as constants some variation: zeros would hide what is computed with them."""
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.numel() < 2:
            continue
        if parameter.ndim > 1 and parameter.min() == parameter.max():
            parameter.normal_(0, 0.1)
        elif name.endswith(("gamma", "lambda1", "layer_scale", "lambda_1", "lambda_2")) and parameter.abs().max() < 0.1:
            parameter.fill_(0.5)


@contextmanager
def limited_to(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError where something takes more than these seconds of the processor's time."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:240]
