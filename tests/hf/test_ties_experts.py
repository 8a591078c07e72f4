"""Stacks of experts that two blocks share, as an encoder and a decoder may: in FP8 as they compute with the tie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from moe_models import LOCAL
from torch import nn
from transformers.models.dbrx.modeling_dbrx import DbrxFFN
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from optimum_fp8 import FP8Config, convert, dequantize, quantization_report
from optimum_fp8.hf.ties import tied_modules, untie

IDS = torch.arange(3, 27).view(2, 12)
# All of the experts are asked: with fewer, one that is chosen otherwise would change the output more than FP8 does.
CONFIG = LOCAL | {"num_experts_per_tok": 4, "tie_word_embeddings": True}


class Tied(hf.MixtralPreTrainedModel):
    """An encoder and a decoder, whose expert stacks, routers and norms are one."""

    _tied_weights_keys = {
        r"encoder\.(?:[^.]+\.)*weight": r"decoder\.(?:[^.]+\.)*weight",
        r"encoder\.(?:[^.]+\.)*gate_up_proj": r"decoder\.(?:[^.]+\.)*gate_up_proj",
        r"encoder\.(?:[^.]+\.)*down_proj": r"decoder\.(?:[^.]+\.)*down_proj",
    }

    def __init__(self, config: Any):
        super().__init__(config)
        self.embed, self.first, self.last = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 8)
        self.encoder, self.decoder = self.part(config), self.part(config)
        self.post_init()

    def part(self, config: Any) -> nn.Module:
        return nn.ModuleDict({"norm": nn.LayerNorm(32, bias=False), "mlp": MixtralSparseMoeBlock(config)})

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.first(self.embed(input_ids))
        for part in (self.encoder, self.decoder):
            hidden = hidden + part["mlp"](part["norm"](hidden))
        return self.last(hidden)


class TiedDbrx(Tied):
    """The same with stacks that a part of the experts' module holds."""

    _tied_weights_keys = {
        r"encoder\.(?:[^.]+\.)*weight": r"decoder\.(?:[^.]+\.)*weight",
        r"encoder\.(?:[^.]+\.)*(?:w1|v1|w2)": r"decoder\.(?:[^.]+\.)*(?:w1|v1|w2)",
    }

    def part(self, config: Any) -> nn.Module:
        sizes = {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 4}
        own = hf.DbrxConfig(d_model=32, n_heads=4, ffn_config=sizes)
        return nn.ModuleDict({"norm": nn.LayerNorm(32, bias=False), "mlp": DbrxFFN(own)})

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.first(self.embed(input_ids))
        for part in (self.encoder, self.decoder):
            hidden = hidden + part["mlp"](part["norm"](hidden))[0]
        return self.last(hidden)


@torch.no_grad()
def outputs(model: Any) -> torch.Tensor:
    return model(IDS)


def made(model_class: Any) -> Any:
    """The model with weights of ordinary size, since stacks of some classes start as zeros."""
    torch.manual_seed(0)
    model = model_class(hf.MixtralConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("how", ["from_pretrained", "convert", "static"])
@pytest.mark.parametrize("model_class", [Tied, TiedDbrx])
def test_tied_stacks_of_experts(save, tmp_path, how, model_class):
    original = made(model_class)
    assert original.all_tied_weights_keys
    expected, folder = outputs(original), save(original, torch.float32)
    config = FP8Config(activation_scheme="weight_only")
    if how == "static":
        config = FP8Config(dataset=[{"input_ids": IDS}])
    if how == "convert":
        model = convert(model_class.from_pretrained(folder), config)
    else:
        model = model_class.from_pretrained(folder, quantization_config=config)
    experts = {row.name for row in quantization_report(model).quantized if "experts" in row.name}
    assert len(experts) == 2, "both sides are in FP8"
    found = outputs(model)
    assert (found - expected).norm() / expected.norm() < 0.15

    for name in ("fp8", "again"):
        model.save_pretrained(tmp_path / name)
        model, info = model_class.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(outputs(model), found)
        model.tie_weights()  # as resizing the embeddings does
        assert torch.equal(outputs(model), found)

    plain = dequantize(model)
    assert plain.all_tied_weights_keys == original.all_tied_weights_keys
    for target, source in original.all_tied_weights_keys.items():
        assert plain.get_parameter(target) is plain.get_parameter(source)
    assert (outputs(plain) - expected).norm() / expected.norm() < 0.15


@pytest.mark.parametrize("model_class", [Tied, TiedDbrx])
def test_the_tie_of_a_stack_is_that_of_its_experts(model_class):
    model = made(model_class)
    before = dict(model.all_tied_weights_keys)
    experts = {name for name in tied_modules(model) if name.endswith("experts")}
    assert experts == {"encoder.mlp.experts", "decoder.mlp.experts"}
    changes = untie(model, sorted(experts))
    assert not {name for name in tied_modules(model) if name.endswith("experts")}
    assert "encoder.norm" in tied_modules(model)
    for change in reversed(changes):
        change.undo()
    assert model.all_tied_weights_keys == before
