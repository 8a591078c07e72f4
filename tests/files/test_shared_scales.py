"""One scale for layers that serving engines fuse."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from files.conftest import CHANNELS, DYNAMIC, WEIGHT_ONLY, contents
from hf.conftest import llama
from safetensors.torch import load_file
from tiny_models import tiny_bert, tiny_gpt2

from optimum_fp8 import FP8Config, quantize_files
from optimum_fp8.errors import FP8ConfigError, FP8SelectionError
from optimum_fp8.modules import fp8_modules
from optimum_fp8.scales import weight_scale

GROUPS = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")]


def uneven_llama():
    model = llama()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.mul_(9.0)
            layer.mlp.up_proj.weight.mul_(5.0)
    return model


def all_tensors(folder):
    return {key: each for path in folder.glob("*.safetensors") for key, each in load_file(path).items()}


@pytest.mark.parametrize(
    "options",
    [DYNAMIC, WEIGHT_ONLY | {"scale_method": "maxabs_arbitrary"}, DYNAMIC | {"scale_method": "maxabs_hw_opt_weight"}],
    ids=["hw", "arbitrary", "search"],
)
@pytest.mark.parametrize("size", ["5GB", "10KB"])
def test_siblings_share_the_largest_of_their_scales(save, tmp_path, options, size):
    model = uneven_llama().to(torch.bfloat16)
    source, config = save(model), FP8Config(**options)
    quantize_files(source, tmp_path / "fp8", config, share_scales=True, max_shard_size=size)
    found, method = all_tensors(tmp_path / "fp8"), {"method": config.scale_method, "target": config.resolved_target}
    for layer in range(2):
        for group in GROUPS:
            names = [f"model.layers.{layer}.{name}" for name in group]
            own = [weight_scale(model.get_submodule(name).weight, **method) for name in names]
            for name in names:
                scale, codes = found[f"{name}.weight_scale"], found[f"{name}.weight"]
                assert torch.equal(scale, torch.stack(own).amax(dim=0))
                weight = model.get_submodule(name).weight.detach().float()
                expected = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
                assert torch.equal(codes[0].view(torch.uint8), expected.view(torch.uint8))
    alone = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(found[f"{alone}_scale"], weight_scale(model.get_parameter(alone), **method))


def test_only_where_asked_and_what_is_loaded_computes(save, tmp_path, ids):
    source = save(uneven_llama())
    quantize_files(source, tmp_path / "own", FP8Config(**DYNAMIC, scale_method="maxabs_arbitrary"))
    quantize_files(
        source, tmp_path / "shared", FP8Config(**DYNAMIC, scale_method="maxabs_arbitrary"), share_scales=True
    )
    own, shared = all_tensors(tmp_path / "own"), all_tensors(tmp_path / "shared")
    differing = {key.rpartition(".")[0].rpartition(".")[2] for key in own if key.endswith("_scale")
                 and not torch.equal(own[key], shared[key])}  # fmt: skip
    assert differing == {"q_proj", "v_proj", "gate_proj"}
    model = hf.LlamaForCausalLM.from_pretrained(tmp_path / "shared")
    high = hf.LlamaForCausalLM.from_pretrained(source)(ids).logits.detach()
    assert len(fp8_modules(model)) == 14
    assert 0 < float((model(ids).logits.detach() - high).norm() / high.norm()) < 0.1


def test_siblings_of_other_names(save, tmp_path):
    quantize_files(save(tiny_bert()), tmp_path / "fp8", FP8Config(**DYNAMIC), share_scales=True)
    found = all_tensors(tmp_path / "fp8")
    prefix = "bert.encoder.layer.0.attention.self."
    assert torch.equal(found[f"{prefix}query.weight_scale"], found[f"{prefix}value.weight_scale"])


def test_those_with_another_scheme_or_in_high_precision_do_not_take_part(save, tmp_path):
    overrides = {r"layers\.0\.self_attn\.q_proj": {"fp8_config": "E5M2"}}
    config = FP8Config(
        **DYNAMIC, scale_method="maxabs_arbitrary", overrides=overrides, blocklist={"names": [r"1.*k_proj"]}
    )
    source = save(uneven_llama())
    quantize_files(source, tmp_path / "own", config)
    quantize_files(source, tmp_path / "shared", config, share_scales=True)
    own, shared = all_tensors(tmp_path / "own"), all_tensors(tmp_path / "shared")
    q, k, v = (f"model.layers.0.self_attn.{name}_proj.weight_scale" for name in "qkv")
    assert torch.equal(shared[q], own[q]) and torch.equal(shared[v], own[v])
    q, k, v = (f"model.layers.1.self_attn.{name}_proj.weight_scale" for name in "qkv")
    assert (
        k not in shared and torch.equal(shared[q], torch.maximum(own[q], own[v])) and torch.equal(shared[q], shared[v])
    )


def test_what_cannot_be_shared_is_refused(save, tmp_path):
    with pytest.raises(FP8ConfigError, match="q_proj are per channel"):
        quantize_files(save(llama()), tmp_path / "fp8", FP8Config(**CHANNELS), share_scales=True)
    with pytest.raises(FP8SelectionError, match="no layers in FP8 have names that tell they are fused"):
        quantize_files(save(tiny_gpt2(), name="gpt2"), tmp_path / "fp8", FP8Config(**DYNAMIC), share_scales=True)
    assert not contents(tmp_path / "fp8")
