"""The models of `tests/data/version_1`: how each is made again from its folder, and what is computed with it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    ResNetForImageClassification,
)

DATA = Path(__file__).parents[1] / "data" / "version_1"


class LinearConfig(PreTrainedConfig):
    model_type = "linear_layers"


class LinearModel(PreTrainedModel):
    """Three linear layers with nothing inexact between them; the last one is the output head."""

    config_class = LinearConfig

    def __init__(self, config: LinearConfig):
        super().__init__(config)
        self.first, self.second, self.head = nn.Linear(16, 32), nn.Linear(32, 24), nn.Linear(24, 8)
        self.post_init()

    def forward(self, x: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.second(self.first(x).relu()).relu()))


# By the first word of a folder's name.
CLASSES: dict[str, type[PreTrainedModel]] = {
    "linear": LinearModel,
    "conv": ResNetForImageClassification,
    "llama": LlamaForCausalLM,
    "gpt2": GPT2LMHeadModel,
}


def sequential() -> nn.Sequential:
    """A model that transformers knows nothing of."""
    return nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 8)).eval()


def load(name: str, folder: Path) -> Any:
    """The model in `folder`, a checkpoint that is of the kind of the fixture called `name`, in float32."""
    return CLASSES[name.split("_")[0]].from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def outputs(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Logits of `inputs`; where they are tokens also what is generated from them, through a cache."""
    found = model(*inputs.values()) if isinstance(model, nn.Sequential) else model(**inputs).logits
    if "input_ids" not in inputs:
        return {"logits": found}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    answer = model.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True)
    return {"logits": found, "sequences": answer.sequences, "generated": torch.stack(answer.logits)}


def stored(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The inputs of a fixture, and what version 1 computed from them."""
    return load_file(DATA / name / "inputs.safetensors"), load_file(DATA / name / "expected.safetensors")
