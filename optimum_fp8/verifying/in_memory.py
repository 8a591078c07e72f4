"""A checkpoint against the model it was saved from, which is still in memory: loaded in a fresh process, and run."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from ..checkpoint.digests import digests
from ..errors import FP8NotAvailableError
from .finding import Finding, error, warning
from .opened import COPY
from .reload import HOW, INPUTS, LOGITS, STATE, outputs

_LENGTHS = (3, 8, 16)  # tokens of the prompts
_DEVICES = ("cpu", "cuda")  # those of others may belong to one process alone
_TOLERANCE = 0.02  # of the largest logit: what other kernels round otherwise
_AGAIN = "save the model again, and report it if it stays so"


def check_against_memory(folder: str, model: Any) -> Iterator[Finding]:
    """What of a checkpoint is not the model that it was saved from: each tensor, and the logits of a few prompts.

    Raises:
        FP8NotAvailableError: it is no model of transformers, or not on a CPU or a GPU.
    """
    refuse_incomparable(model, "leave `model` out")
    inputs = _inputs(model)
    with tempfile.TemporaryDirectory(prefix="fp8-") as exchange:
        save_file(inputs, os.path.join(exchange, INPUTS))
        _write(os.path.join(exchange, HOW), _how(model))
        command = [sys.executable, "-m", f"{__package__}.reload", os.path.abspath(folder), exchange]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            last = ended.stderr.strip().splitlines()[-1:] or [f"status {ended.returncode}"]
            yield error(folder, f"a fresh process cannot load it: {last[0]}", "a checkpoint that loads", _AGAIN)
            return
        with open(os.path.join(exchange, STATE), encoding="utf-8") as file:
            state = json.load(file)
        logits = load_file(os.path.join(exchange, LOGITS))
    yield from _other_tensors(digests(model.state_dict()), state)
    yield from _other_logits(folder, _in_eval(model, inputs), logits)


def refuse_incomparable(model: Any, advice: str) -> None:
    """Refuse a model that no fresh process can be compared with.

    Raises:
        FP8NotAvailableError: it is no model of transformers, or not on a CPU or a GPU.
    """
    if not isinstance(model, transformers.PreTrainedModel) or model.device.type not in _DEVICES:
        found = f"{type(model).__name__} on {getattr(model, 'device', 'its device')}"
        raise FP8NotAvailableError(
            f"{found} cannot be compared with a checkpoint: expected a model of transformers on a CPU or a GPU; "
            f"{advice}"
        )


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    """Prompts of random tokens, or an image of noise; empty for other kinds of models."""
    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    known = inspect.signature(model.forward).parameters
    if model.main_input_name == "input_ids" and "input_ids" in known and getattr(config, "vocab_size", 0):
        return {
            f"a prompt of {length} tokens": torch.randint(0, config.vocab_size, (1, length), generator=generator)
            for length in _LENGTHS
        }
    size, channels = getattr(model.config, "image_size", None), getattr(model.config, "num_channels", None)
    if model.main_input_name == "pixel_values" and isinstance(size, int) and isinstance(channels, int):
        return {"an image": torch.rand((1, channels, size, size), generator=generator).to(model.dtype)}
    return {}


def _how(model: Any) -> dict[str, Any]:
    return {
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
    }


def _write(path: str, said: Mapping[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(said, file)


def _in_eval(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    training = model.training
    try:
        return outputs(model.eval(), inputs)
    finally:
        model.train(training)


def _other_tensors(here: Mapping[str, str], there: Mapping[str, str]) -> Iterator[Finding]:
    for name in sorted({*here, *there}):
        if name not in there:
            yield error(name, "nothing in the loaded model", "the tensor in memory", _AGAIN)
        elif name not in here:
            yield error(name, "a tensor that the model in memory does not have", "none", _AGAIN)
        elif here[name] != there[name]:
            yield error(name, "other values, shape or dtype once loaded", "those in memory", COPY)


def _other_logits(
    folder: str, here: Mapping[str, torch.Tensor], there: Mapping[str, torch.Tensor]
) -> Iterator[Finding]:
    if not here:
        found = "a kind of model whose inputs are not known: its outputs were not compared"
        yield warning(folder, found, "a language model, or one of images", "compare outputs on your own data")
    for name, expected in here.items():
        logits = there[name]
        if torch.equal(logits, expected):
            continue
        same = logits.shape == expected.shape
        off = float((logits - expected).abs().max() / expected.abs().max()) if same else float("nan")
        say = warning if off <= _TOLERANCE else error
        yield say(f"the logits of {name}", f"{off:.2e} of the largest off", "those of the model in memory", _AGAIN)
