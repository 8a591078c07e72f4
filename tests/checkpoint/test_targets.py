"""Checkpoints made for one target and loaded for another, against quantizing the original for it."""

from __future__ import annotations

import itertools
import json
import logging

import pytest
import torch
from grids import slow_but
from hf.conftest import llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from unsealed import unsealed

from optimum_fp8 import FP8Config, convert, load, prepare, save
from optimum_fp8.attention import scales_of
from optimum_fp8.checkpoint.targets import target_to_load
from optimum_fp8.errors import FP8CheckpointError, FP8ConfigError, FP8NotAvailableError
from optimum_fp8.formats import number_format
from optimum_fp8.modules import fp8_modules
from optimum_fp8.modules.handler import converted_modules
from optimum_fp8.scales import SCALE_METHODS
from optimum_fp8.test_utils import gaudi

TARGETS = ("gaudi2", "gaudi3", "cpu")
PAIRS = list(itertools.permutations(TARGETS, 2))
STATIC = [name for name, method in SCALE_METHODS.items() if not method.dynamic_only]
OBSERVERS = ("maxabs", "percentile", "mse", "entropy", "moving_average")
ATTENTION = {"attention": True, "kv_cache": True}


def network() -> nn.Module:
    """Layers of both kinds, and inputs of very different ranges."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)).eval()
    with torch.no_grad():
        model[2].weight.mul_(37.0)
        model[4].weight.mul_(0.01)
    return model


def data() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 2, 6, 6, generator=generator) * torch.rand(16, 1, 1, 1, generator=generator).exp()


@torch.no_grad()
def quantized(**options) -> nn.Module:
    config = FP8Config(activation_scheme="static", **options)
    model = prepare(network(), config)
    for batch in data().split(4):
        model(batch)
    return convert(model)


def made(folder, **options):
    """The folder of a quantized network."""
    save(quantized(**options), folder)
    return folder


def run_time_scales(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": scale
        for name, (module, handler) in converted_modules(model).items()
        for key, scale in handler.run_time_scales(module).items()
    }


def assert_same_scales(found: nn.Module, expected: nn.Module) -> None:
    mine, theirs = run_time_scales(found), run_time_scales(expected)
    assert mine.keys() == theirs.keys() and mine
    for name, scale in theirs.items():
        assert torch.equal(mine[name], scale), (name, mine[name], scale)


def in_hardware_set(model: nn.Module, target: str) -> bool:
    """Whether all scales that a hardware method rounds are the target's."""
    allowed = set(number_format("E4M3", target).hardware_scales.descending())
    found = [
        *run_time_scales(model).values(),
        *(m.weight_scale for m in fp8_modules(model).values() if m.scheme.weight.rounding == "hardware"),
    ]
    return {value for scale in found for value in scale.flatten().tolist()} <= allowed


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# --- against quantizing for the target ------------------------------------------------------------------------------


@pytest.mark.parametrize("made_for, to", slow_but(PAIRS, ("cpu", "gaudi2"), ("gaudi2", "gaudi3"), ("gaudi3", "cpu")))
@pytest.mark.parametrize("method", STATIC)
@pytest.mark.parametrize("fp8", slow_but(["E4M3", "E5M2"], "E4M3"))
@torch.no_grad()
def test_loaded_for_another_target_it_is_what_quantizing_for_that_gives(tmp_path, method, made_for, to, fp8):
    options = {"scale_method": method, "fp8_config": fp8}
    folder = made(tmp_path / "fp8", target=made_for, **options)
    found, direct, before = load(folder, network(), target=to), quantized(target=to, **options), load(folder, network())
    assert_same_scales(found, direct)
    assert SCALE_METHODS[method].activation.rounding != "hardware" or in_hardware_set(found, to)
    full_scale = number_format(fp8, to).full_scale
    for name, module in fp8_modules(found).items():
        assert module.scheme == direct.get_submodule(name).scheme and module.codes.float().abs().max() <= full_scale
        source, ours = (m.dequantized_weight(torch.float32) for m in (before.get_submodule(name), module))
        smallest = float(torch.tensor([1], dtype=torch.uint8).view(module.codes.dtype).float())
        assert ((ours - source).abs() <= module.weight_scale * smallest / 2).all(), "only subnormal codes are rounded"
    plain = network()(data())
    errors = [relative(model(data()), plain) for model in (before, direct)]
    assert relative(found(data()), plain) <= 1.25 * max(errors) + 0.005


@pytest.mark.parametrize("made_for, to", [("cpu", "gaudi2"), ("gaudi2", "gaudi3"), ("gaudi3", "gaudi2")])
@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_chooses_for_the_target_it_is_loaded_for(tmp_path, observer, made_for, to):
    options = {"observer": observer, "percentile": 98.0, "scale_method": "maxabs_pow2"}
    found = load(made(tmp_path / "fp8", target=made_for, **options), network(), target=to)
    assert_same_scales(found, quantized(target=to, **options))


@pytest.mark.parametrize("made_for, to", slow_but([("cpu", "gaudi2"), ("gaudi2", "gaudi3")], ("cpu", "gaudi2")))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"attention_granularity": "head", "scale_method": "maxabs_arbitrary"},
        {"attention_dataflow": "unfused", "observer": "mse"},
        {"attention": False, "overrides": {"q_proj": {"activation_scheme": "dynamic"}}},
    ],
    ids=str,
)
@torch.no_grad()
def test_attention_and_caches(save, batches, ids, tmp_path, made_for, to, options):
    folder, options = save(llama()), {"activation_scheme": "static", **ATTENTION, **options}
    # Calibrated while loading, ranges would be those of a model with weights that are rounded for one target.
    measure = FP8Config(mode="MEASURE", dataset=batches, dump_stats_path=str(tmp_path / "m"), **options)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=measure)
    options |= {"mode": "QUANTIZE", "dump_stats_path": str(tmp_path / "m")}
    first = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FP8Config(target=made_for, **options))
    first.save_pretrained(tmp_path / "fp8")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=FP8Config(target=to))
    direct = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FP8Config(target=to, **options))
    assert_same_scales(found, direct)
    assert scales_of(found.model.layers[1].self_attn).keys() >= {"k_scale", "v_scale"}
    assert options.get("scale_method") or in_hardware_set(found, to)
    plain = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
    assert relative(found(ids).logits, plain) < 1.25 * relative(direct(ids).logits, plain)
    generated = found.generate(ids, max_new_tokens=4, do_sample=False)
    assert generated.shape[1] == ids.shape[1] + 4


@pytest.mark.parametrize("method", ["unit_scale", "hw_aligned_single_scale"])
def test_fixed_scales_need_no_ranges(tmp_path, method):
    folder = made(tmp_path / "fp8", target="cpu", scale_method=method)
    assert "ranges" not in record_of(folder)
    assert_same_scales(load(folder, network(), target="gaudi2"), quantized(target="gaudi2", scale_method=method))


def test_what_is_tied_stays_tied(tmp_path):
    def tied() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        model[1].weight = model[0].weight
        return model

    config = FP8Config(activation_scheme="dynamic", target="cpu", weight_backoff=1.0, scale_method="maxabs_pow2")
    save(convert(tied(), config), tmp_path / "fp8")
    model = load(tmp_path / "fp8", tied(), target="gaudi2")
    assert model[0].codes is model[1].codes and model[0].weight_scale is model[1].weight_scale


# --- there and back -------------------------------------------------------------------------------------------------


def record_of(folder) -> dict:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["optimum_fp8"])


@pytest.mark.parametrize("observer", OBSERVERS)
def test_saved_again_it_knows_its_ranges_and_goes_to_every_target(tmp_path, observer):
    options = {"observer": observer, "scale_method": "maxabs_hw"}
    folder = made(tmp_path / "cpu", target="cpu", **options)
    save(load(folder, network()), tmp_path / "again")
    assert record_of(tmp_path / "again") == record_of(folder)
    save(load(folder, network(), target="gaudi2"), tmp_path / "gaudi2")
    assert record_of(tmp_path / "gaudi2")["ranges"] == record_of(folder)["ranges"]
    assert_same_scales(load(tmp_path / "gaudi2", network(), target="gaudi3"), quantized(target="gaudi3", **options))
    back = load(tmp_path / "gaudi2", network(), target="cpu")
    assert_same_scales(back, load(folder, network()))


# --- without ranges -------------------------------------------------------------------------------------------------


def forget(folder) -> None:
    """What a version before, or a tool that copies tensors alone, leaves of a checkpoint."""
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})


@pytest.mark.parametrize("made_for, to, factor", [("cpu", "gaudi2", 2), ("gaudi3", "cpu", 1), ("gaudi2", "gaudi3", 1)])
def test_without_ranges_scales_are_adapted_by_a_power_of_two_with_a_warning(tmp_path, caplog, made_for, to, factor):
    folder = made(tmp_path / "fp8", target=made_for)
    before = run_time_scales(load(folder, network()))
    forget(folder)
    found = run_time_scales(load(folder, network(), target=to))
    assert {name: scale.tolist() for name, scale in found.items()} == {
        name: (scale * factor).tolist() for name, scale in before.items()
    }
    assert "does not hold the ranges that scales of 3 modules follow from (0, 2, 4): they are adapted" in caplog.text
    assert f"may lie outside of the hardware scales of {to}" in caplog.text


def test_scales_that_were_changed_by_hand_are_not_derived_anew(tmp_path, caplog):
    folder = made(tmp_path / "fp8", target="cpu")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / "model.safetensors")
    tensors["2.input_scale"] = torch.tensor([0.375])
    save_file(tensors, folder / "model.safetensors", metadata=unsealed(metadata))
    found, direct = load(folder, network(), target="gaudi2"), quantized(target="gaudi2")
    assert found[2].input_scale.item() == 0.75 and torch.equal(found[4].input_scale, direct[4].input_scale)
    assert "scales of 1 modules follow from (2)" in caplog.text


@pytest.mark.parametrize("said", ["many", None, -1.0, [1.0], {}, {"range": {"cpu": "x"}}, {"range": 1.0, "odd": 2.0}])
def test_ranges_that_cannot_be_read(tmp_path, said):
    folder = made(tmp_path / "fp8", target="cpu")
    told = record_of(folder)
    told["ranges"]["2"]["input"] = said
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata=unsealed({"format": "pt", "optimum_fp8": json.dumps(told)}))
    with pytest.raises(FP8CheckpointError, match=r"the ranges of 2 in the record of the checkpoint cannot be read"):
        load(folder, network())


# --- the log --------------------------------------------------------------------------------------------------------


def test_one_line_says_how_many_weights_were_rounded_again(tmp_path, caplog):
    folder = made(tmp_path / "fp8", target="gaudi3", scale_method="maxabs_hw")
    before = load(folder, network())
    with caplog.at_level(logging.INFO):
        model = load(folder, network(), target="gaudi2")
    pairs = [(before.get_submodule(name), module) for name, module in fp8_modules(model).items()]
    changed = sum(m.codes.numel() for b, m in pairs if not torch.equal(b.weight_scale, m.weight_scale))
    values = [[m.dequantized_weight(torch.float32) for m in pair] for pair in pairs]
    rounded = sum(int((one != other).sum()) for one, other in values)
    expected = f"made for gaudi3, loaded for gaudi2: {rounded} weights were rounded again, of {changed} in tensors"
    assert [expected in record.message for record in caplog.records] == [True]
    assert 0 < rounded < 0.02 * changed


def test_for_its_own_target_nothing_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        load(made(tmp_path / "fp8", target="gaudi2"), network(), target="gaudi2")
    assert "loaded for" not in caplog.text


# --- which target ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chip, made_for, expected",
    [
        (None, "gaudi2", "gaudi2"),
        (None, "cpu", "cpu"),
        ("gaudi2", "gaudi2", "gaudi2"),
        ("gaudi2", "gaudi3", "gaudi2"),
        ("gaudi2", "cpu", "gaudi2"),
        ("gaudi3", "gaudi2", "gaudi2"),
        ("gaudi3", "gaudi3", "gaudi3"),
        ("gaudi3", "cuda", "gaudi3"),
    ],
)
@pytest.mark.parametrize("asked", [None, "auto"])
def test_on_a_gaudi_that_cannot_compute_as_it_was_made_for_it_is_loaded_for_that(chip, made_for, expected, asked):
    if chip is None:
        assert target_to_load(made_for, asked) == expected
        return
    with gaudi.emulated(chip):
        assert target_to_load(made_for, asked) == expected
        assert target_to_load(made_for, "cpu") == "cpu"


@pytest.mark.parametrize("chip", ["gaudi2", "gaudi3"])
def test_the_device_is_what_auto_means_while_quantizing_and_loading(tmp_path, chip):
    with gaudi.emulated(chip):
        on_the_device = quantized()
        assert {module.scheme.fmt.target for module in fp8_modules(on_the_device).values()} == {chip}
        loaded = load(made(tmp_path / "fp8", target="cpu"), network())
    assert_same_scales(loaded, on_the_device)


def test_from_pretrained_on_a_gaudi(save, batches, tmp_path):
    folder, config = save(llama()), FP8Config(dataset=batches, target="cpu")
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(tmp_path / "fp8")
    with gaudi.emulated("gaudi2"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
        asked = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=FP8Config(target="cpu"))
    assert model.config.quantization_config.target == "gaudi2" and in_hardware_set(model, "gaudi2")
    assert asked.config.quantization_config.target == "cpu"
    model.save_pretrained(tmp_path / "gaudi2")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "gaudi2")
    assert again.config.quantization_config.target == "gaudi2"
    assert_same_scales(again, model)


def test_a_target_that_does_not_exist(tmp_path):
    with pytest.raises(FP8ConfigError, match="target='gaudi4'"):
        load(made(tmp_path / "fp8", target="cpu"), network(), target="gaudi4")


def test_a_kind_of_module_that_cannot_be_brought_to_another_target_says_so(tmp_path, monkeypatch):
    from optimum_fp8.modules.handler import ModuleHandler

    folder, model = made(tmp_path / "fp8", target="cpu"), network()
    handler = type(converted_modules(load(folder, network()))["2"][1])
    monkeypatch.setattr(handler, "run_time_scales", ModuleHandler.run_time_scales)
    with pytest.raises(FP8NotAvailableError, match="modules cannot be loaded for another target: load it for its own"):
        load(folder, model, target="gaudi2")
    assert not fp8_modules(model)
