"""Back to high precision: each weight in the dtype it had, also where a model keeps its first ones in float32."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

from optimum_fp8 import FP8Config

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
IDS = torch.arange(3, 27).view(2, 12)


class FirstInFloat32(hf.LlamaPreTrainedModel):
    """A model that keeps a first projection in float32, as those with a tower for sounds do."""

    _keep_in_fp32_modules_strict = ["tower"]

    def __init__(self, config):
        super().__init__(config)
        self.tower, self.embed = nn.Linear(16, 32), nn.Embedding(64, 32)
        self.up, self.down, self.head = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 8)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        seen = self.tower(torch.ones(16)).to(self.embed.weight.dtype)
        return self.head(self.down(self.up(self.embed(input_ids) + seen)))


@pytest.fixture
def folder(save):
    torch.manual_seed(0)
    return save(FirstInFloat32(hf.LlamaConfig(**SIZES)).eval(), torch.bfloat16)


@torch.no_grad()
def test_weights_get_their_own_dtype_back(folder, tmp_path):
    config = FP8Config(activation_scheme="weight_only")
    model = FirstInFloat32.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    expected, dtypes = model(IDS), (model.tower.weight.dtype, model.down.bias.dtype)
    assert dtypes == (torch.float32, torch.bfloat16)
    model.save_pretrained(tmp_path / "fp8")  # which leaves float32, the dtype of the first weight, in the config
    assert model.config.dtype in ("float32", torch.float32)
    model.dequantize()
    assert model.down.weight.dtype == torch.bfloat16 and model.tower.weight.dtype == torch.float32
    assert (model(IDS) - expected).norm() <= 0.02 * expected.norm()

    keys = {"dtype": torch.bfloat16, "quantization_config": FP8Config(dequantize=True)}
    plain = FirstInFloat32.from_pretrained(tmp_path / "fp8", **keys)
    assert plain.down.weight.dtype == torch.bfloat16 and torch.equal(plain(IDS), model(IDS))


@pytest.mark.parametrize("dtype", [torch.float32, "float16"])
def test_a_dtype_that_is_asked_for(folder, dtype):
    config = FP8Config(activation_scheme="weight_only")
    model = FirstInFloat32.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    assert model.dequantize(dtype).down.weight.dtype == getattr(torch, str(dtype).removeprefix("torch."))
