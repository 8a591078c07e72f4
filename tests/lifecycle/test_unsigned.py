"""INC's measurements for a model: taken where names and weights are the model's, in every mode, refused otherwise."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path

import pytest
import torch
from gaudi_models import gaudi_model, generate
from hf.conftest import llama
from torch import nn
from transformers import AutoModelForCausalLM

from optimum_fp8 import FP8Config, convert, finalize_calibration, prepare
from optimum_fp8.attention import scales_of
from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.measure.inc import RANGES, File, FileName, Node, nodes_of, scaling_of, write_file, write_inc
from optimum_fp8.modules import fp8_modules

DATA = Path(__file__).parents[1] / "data" / "inc"
X = torch.linspace(-3, 3, 32).reshape(4, 8)


def net(first=0.353515625, third=0.2412109375, dtype=torch.bfloat16):
    """The model of `measured`, by its names and the ranges of its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)
    with torch.no_grad():
        for layer, maxabs in ((model[0], first), (model[2], third)):
            layer.weight.mul_(0.5)
            layer.weight[0, 0] = -maxabs
    return model


def config(**options):
    return FP8Config(
        **{
            "target": "cpu",
            "scale_method": "maxabs_arbitrary",
            "dump_stats_path": str(DATA / "measured" / "measure"),
            **options,
        }
    )


def measured(folder, nodes: dict[str, list[float]], weights: dict[str, float] | None = None) -> str:
    """INC's files with these inputs."""
    made = {
        name: Node(
            tuple(torch.tensor([[value]]) for value in values),
            None,
            {"weight": torch.tensor([[weights[name]]])} if weights and name in weights else None,
        )
        for name, values in nodes.items()
    }
    write_file(FileName(str(folder / "m")), File(RANGES, made))
    return str(folder / "m")


@pytest.mark.core
@pytest.mark.parametrize("mode", ["AUTO", "QUANTIZE"])
@pytest.mark.parametrize("scheme", ["auto", "static"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_incs_measurements_give_incs_scales(mode, scheme, dtype, caplog):
    model = convert(net(dtype=dtype), config(mode=mode, activation_scheme=scheme))
    scales = [(model[place].input_scale.item(), model[place].weight_scale.item()) for place in (0, 2)]
    assert scales == [(0.09130859375, 0.00157928466796875), (0.048583984375, 0.00107574462890625)], "INC's scale file"
    (said,) = [record.message for record in caplog.records if "no fingerprint" in record.message]
    assert "names of 2 modules and the ranges of 2 weights" in said and "no more can be checked" in said
    assert torch.isfinite(model(X.to(dtype))).all()


@pytest.mark.core
def test_from_pretrained_quantizes_with_incs_measurements(save, tmp_path, ids, caplog):
    original = llama()
    layers = {name: module for name, module in original.named_modules() if isinstance(module, nn.Linear)}
    inputs = {name: [float(place)] for place, name in enumerate(layers, start=1)}
    weights = {name: layer.weight.abs().max().bfloat16().item() for name, layer in layers.items()}
    path, prefix = save(original), measured(tmp_path, inputs, weights)
    options = {"target": "cpu", "scale_method": "maxabs_arbitrary", "dump_stats_path": prefix, "mode": "QUANTIZE"}
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=FP8Config(**options))
    expected = {name: torch.tensor(value[0]).bfloat16().item() / 112 for name, value in inputs.items()}
    found = {name: module.input_scale.item() for name, module in fp8_modules(model).items()}
    assert found and all(abs(found[name] / expected[name] - 1) < 2**-8 for name in found)
    assert f"the ranges of {len(layers)} weights are the same" in caplog.text, "of those in FP8 by now, too"
    assert torch.isfinite(model(ids).logits).all()
    weights |= {"model.layers.1.mlp.up_proj": 9.0}
    options["dump_stats_path"] = measured(tmp_path, inputs, weights)
    with pytest.raises(FP8MeasurementError, match=r"that of model.layers.1.mlp.up_proj has the range 9, the model's"):
        AutoModelForCausalLM.from_pretrained(path, quantization_config=FP8Config(**options))


@pytest.mark.parametrize("style", ["vLLM", "optimum-habana"])
def test_attention_and_the_cache_of_a_model_of_transformers(tmp_path, ids, style):
    original = llama()
    layers = [name for name, module in original.named_modules() if isinstance(module, nn.Linear)]
    fused = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    nodes = {name: [4.0] for name in layers if not (style == "vLLM" and name.endswith(fused))}
    for layer in range(len(original.model.layers)):
        at, last = f"model.layers.{layer}", ".attn.impl" if style == "vLLM" else ""
        if style == "vLLM":
            nodes |= {f"{at}.self_attn.qkv_proj": [4.0], f"{at}.mlp.gate_up_proj": [4.0]}
        scaled = original.model.layers[0].self_attn.scaling if style == "vLLM" else 1
        operations = {"matmul_qk": [8.0 * scaled, 1e4], "matmul_av": [1.0, 1e4], "k_cache": [16.0], "v_cache": [2.0]}
        nodes |= {f"{at}.self_attn{last}.{operation}": values for operation, values in operations.items()}
    options = {"attention": True, "kv_cache": True, "scale_method": "maxabs_pow2", "mode": "QUANTIZE"}
    model = convert(original, config(dump_stats_path=measured(tmp_path, nodes), **options))
    expected = {kind: 2.0 ** math.ceil(math.log2(value / 112)) for kind, value in {"q": 8, "k": 16, "v": 2}.items()}
    for layer in model.model.layers:
        scales = scales_of(layer.self_attn)
        assert {kind: scales[f"{kind}_scale"].item() for kind in "qkv"} == expected
        assert scales["output_scale"].item() == layer.self_attn.o_proj.input_scale.item() == 2.0**-4
        assert "k_cache_scale" not in scales, "the cache and the product share one"
    assert torch.isfinite(model(ids).logits).all()


@pytest.mark.core
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first": 0.375}, "1 weights are others: that of 0 has the range 0.353516, the model's 0.375"),
        ({"first": 0.375, "third": 0.25}, "2 weights are others"),
    ],
)
def test_weights_of_another_model(changes, message, caplog):
    with pytest.raises(FP8MeasurementError, match=f"are of another model .{message}"):
        convert(net(**changes), config(mode="QUANTIZE"))
    model = convert(net(**changes), config())
    assert message in caplog.text and "they are not used" in caplog.text
    assert {module.activations for module in fp8_modules(model).values()} == {"dynamic"}


def test_names_of_another_model():
    with pytest.raises(FP8MeasurementError, match="another model .the model has none of their modules 0, 2"):
        convert(nn.ModuleDict({"fc": nn.Linear(8, 8)}), config(mode="QUANTIZE"))


def test_modules_that_one_of_both_lacks_are_named(tmp_path, caplog):
    prefix = measured(tmp_path, {"0": [1.0], "experts.w13_list.0": [2.0], "head": [3.0]})
    with pytest.raises(FP8MeasurementError, match="1 selected modules were never reached by calibration: 2"):
        convert(net(), config(mode="QUANTIZE", dump_stats_path=prefix))
    assert "measured modules that the model does not have: experts.w13_list.0, head" in caplog.text
    model = convert(net(), config(mode="QUANTIZE", dump_stats_path=prefix, ignore_modules_wo_measures=True))
    assert list(fp8_modules(model)) == ["0"]


def test_measurements_that_happen_to_be_at_the_default_path(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hqt_output").symlink_to(DATA / "measured")
    model = convert(net(), FP8Config(target="cpu"))
    assert {module.activations for module in fp8_modules(model).values()} == {"static"}
    assert "./hqt_output/measure" in caplog.text
    model = convert(net(first=0.5), FP8Config(target="cpu"))
    assert {module.activations for module in fp8_modules(model).values()} == {"dynamic"}


def test_scales_alone_are_no_measurements(tmp_path):
    for path in (DATA / "measured").glob("*ARBITRARY*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(FP8MeasurementError, match="only INC's own .*ARBITRARY.* hold no ranges: .*hooks_maxabs.npz"):
        convert(net(), config(dump_stats_path=str(tmp_path / "measure")))


def test_an_observer_that_needs_more_than_ranges_says_so():
    with pytest.raises(FP8MeasurementError, match="made by the observer 'maxabs', which keeps no counts"):
        convert(net(), config(mode="QUANTIZE", observer="percentile"))


def test_what_stays_unsigned_in_our_own_file_is_checked_as_well(tmp_path, caplog):
    from optimum_fp8 import Measurements

    caplog.set_level(logging.WARNING)
    Measurements.load(DATA / "measured" / "measure").save(tmp_path / "ours")
    convert(net(), config(mode="QUANTIZE", dump_stats_path=str(tmp_path / "ours")))
    assert "no fingerprint" in caplog.text
    with pytest.raises(FP8MeasurementError, match="weights are others"):
        convert(net(third=0.5), config(mode="QUANTIZE", dump_stats_path=str(tmp_path / "ours")))


def all_scales(model: nn.Module) -> dict[str, float]:
    layers = {f"{name}.input_scale": module.input_scale.item() for name, module in fp8_modules(model).items()}
    attention = {
        f"{name}.{key}": scale.item()
        for name, module in model.named_modules()
        for key, scale in scales_of(module).items()
    }
    return layers | attention


@pytest.mark.core
@pytest.mark.parametrize("vllm", [False, True])
def test_what_we_measured_comes_back_from_incs_files_as_it_was(tmp_path, ids, vllm):
    original, options = llama(), {"attention": True, "kv_cache": True, "scale_method": "maxabs_pow2"}
    given = copy.deepcopy(original)
    prepare(original, config(dump_stats_path=str(tmp_path / "ours"), activation_scheme="static", **options))
    original.generate(ids, max_new_tokens=3, do_sample=False)
    nodes = nodes_of(finalize_calibration(original).tensors, vllm=vllm, scaling=scaling_of(given))
    write_inc(tmp_path / "inc", nodes.nodes)
    names = {name.rpartition(".")[2] for name in nodes.nodes}
    assert {"matmul_qk", "matmul_av", "softmax", "k_cache", "fused_scaled_dot_product_attention"} <= names
    assert ("qkv_proj" in names) is vllm and ("q_proj" in names) is not vllm
    ours, again = (
        convert(copy.deepcopy(given), config(dump_stats_path=str(tmp_path / place), mode="QUANTIZE", **options))
        for place in ("ours", "inc")
    )
    assert all_scales(again) == all_scales(ours) and len(all_scales(ours)) > 20
    assert torch.equal(ours(ids).logits, again(ids).logits)


@pytest.mark.slow
@pytest.mark.parametrize("flash", [False, True])
def test_a_model_with_modules_for_operations_comes_back_as_it_was(tmp_path, flash):
    unused = {"types": [], "names": ["matmul", "softmax"] if flash else ["fused_scaled"]}
    options = {"attention": True, "kv_cache": True, "scale_method": "maxabs_pow2", "blocklist": unused}
    model = prepare(
        gaudi_model(), config(dump_stats_path=str(tmp_path / "ours"), activation_scheme="static", **options)
    )
    generate(model, torch.arange(3, 21).reshape(2, 9), 3, flash=flash)
    write_inc(tmp_path / "inc", nodes_of(finalize_calibration(model).tensors).nodes)
    ours, again = (
        convert(gaudi_model(), config(dump_stats_path=str(tmp_path / place), mode="QUANTIZE", **options))
        for place in ("ours", "inc")
    )
    assert all_scales(again) == all_scales(ours)
    found = {name.rpartition(".")[2] for name in all_scales(ours)}
    assert found == {"q_scale", "k_scale", "p_scale", "input_scale", *(("v_scale", "output_scale") if flash else ())}
