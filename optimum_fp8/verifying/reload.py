"""What a checkpoint becomes in a fresh process: run as `python -m optimum_fp8.verifying.reload FOLDER EXCHANGE`.

EXCHANGE is a folder with the inputs, in `inputs.safetensors`, and with how to load, in `how.json`; the logits and the
digests of all tensors are written to it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from ..checkpoint.digests import digests

INPUTS, HOW, LOGITS, STATE = "inputs.safetensors", "how.json", "logits.safetensors", "state.json"


def main(folder: str, exchange: str) -> None:
    """Load, run and tell."""
    with open(os.path.join(exchange, HOW), encoding="utf-8") as file:
        how = json.load(file)
    torch.set_num_threads(how["threads"])
    model_class = getattr(transformers, how["class"])
    model = model_class.from_pretrained(folder, dtype=how["dtype"], attn_implementation=how["attention"])
    model = model.to(how["device"]).eval()
    with open(os.path.join(exchange, STATE), "w", encoding="utf-8") as file:
        json.dump(digests(model.state_dict()), file)
    inputs = load_file(os.path.join(exchange, INPUTS))
    save_file(outputs(model, inputs), os.path.join(exchange, LOGITS))


@torch.no_grad()
def outputs(model: Any, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The first output of a model for each of some inputs, in float32 on the CPU."""
    found = {}
    for name, tensor in inputs.items():
        first = model(**{model.main_input_name: tensor.to(model.device)})[0]
        found[name] = first.float().cpu().contiguous()
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
