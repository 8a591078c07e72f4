"""What was said to the `from_pretrained` or `save_pretrained` that is under way.

transformers hands quantizers the model and its files, but not the arguments with which they were found: the tokenizer
and the processor for calibration have to be looked for with the same. They are read from the frame of the call, which
changes nothing of transformers. Half of them are parameters of `from_pretrained`, the others are its local variables.
Likewise the state dict that `save_pretrained` is given, which it replaces by what the quantizer returns.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

import torch

from ..errors import FP8NotAvailableError
from ..lifecycle import Origin

_ARGUMENTS = (
    *("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token"),
    "trust_remote_code",  # handed on as the user gave it
)
_MODEL, _AUTO = "transformers.modeling_utils", "transformers.models.auto.auto_factory"


def loading_origin(model: Any) -> Origin:
    """Where `model` is being loaded from; of a model that is not, the place that it names."""
    name: str = getattr(model, "name_or_path", "") or ""
    arguments: dict[str, Any] = {}
    for frame in _calls("from_pretrained"):
        values = frame.f_locals
        if frame.f_globals["__name__"] == _MODEL and not arguments:
            name = values["pretrained_model_name_or_path"] or name
            arguments = {key: values.get(key) for key in _ARGUMENTS}
        elif frame.f_globals["__name__"] == _AUTO and arguments:
            arguments["code_revision"] = values.get("code_revision")
            break
    return Origin(str(name), {key: value for key, value in arguments.items() if value not in (None, "")})


def refuse_distributed_loading() -> None:
    """Refuse to calibrate what transformers is about to spread over processes.

    Raises:
        FP8NotAvailableError: it was told to, by `tp_plan`, `device_mesh` or a `distributed_config`.
    """
    for frame in _calls("from_pretrained"):
        values = frame.f_locals
        found = [name for name in ("tp_plan", "device_mesh", "distributed_config") if values.get(name) is not None]
        if found:
            raise FP8NotAvailableError(
                f"calibration of a model that from_pretrained spreads over processes ({found[-1]}): load it whole in "
                "each process, or measure it with prepare, after fully_shard; the FP8 "
                "checkpoint can be used in any way"
            )


def given_state_dict(model: Any) -> Mapping[str, torch.Tensor] | None:
    """The state dict that `model` is being saved with, where the caller gave one and this process writes it."""
    values: Mapping[str, Any] = next((frame.f_locals for frame in _calls("save_pretrained")), {})
    if values.get("self") is not model or not values["is_main_process"]:
        return None
    given: Mapping[str, torch.Tensor] | None = values["state_dict"]
    return given


def _calls(function: str) -> Iterator[FrameType]:
    """The frames of transformers' function of that name, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") in (_MODEL, _AUTO):
            yield frame
        frame = frame.f_back
