"""Models with fused experts: quantized while loading and by hand, saved by the names of their checkpoints, reloaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from grids import slow_but
from moe_models import tiny_moe
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from unsealed import unsealed

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.errors import FP8CheckpointError, FP8NotAvailableError, FP8ScaleError
from optimum_fp8.modules.fused_experts import FP8FusedExperts

# family: whether its checkpoints have the weights one by one
FAMILIES = {
    "mixtral": True,
    "qwen2_moe": True,
    "qwen3_moe": True,
    "deepseek_v3": True,
    "jamba": True,
    "olmoe": True,
    "phimoe": True,
    "gpt_oss": False,
    "granitemoe": False,
    "llama4": False,
    "longcat_flash": True,
    "dbrx": False,
    "jetmoe": False,
}
IDS = torch.arange(2, 50).view(2, 24)
STATIC = {"dataset": [{"input_ids": IDS}]}
CHANNELS = {"activation_scheme": "dynamic", "scale_method": "act_maxabs_hw_weights_pcs_maxabs_pow2"}


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a family's model in bfloat16."""
    folders: dict[str, str] = {}

    def folder(family: str) -> str:
        if family not in folders:
            torch.manual_seed(0)
            folders[family] = str(tmp_path_factory.mktemp(family) / "model")
            tiny_moe(family).to(torch.bfloat16).save_pretrained(folders[family])
        return folders[family]

    return folder


def load(folder, config=None, **options):
    given = {} if config is None else {"quantization_config": config}
    return AutoModelForCausalLM.from_pretrained(folder, **given, **options)


def experts_of(model) -> FP8FusedExperts:
    return next(module for module in model.modules() if isinstance(module, FP8FusedExperts))


def by_hand(folder, **options):
    model = prepare(load(folder), FP8Config(**{key: each for key, each in options.items() if key != "dataset"}))
    model(IDS)
    return convert(model)


def shapes(folder) -> dict[str, tuple[int, ...]]:
    with safe_open(Path(folder) / "model.safetensors", framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


def rewrite(folder, change) -> None:
    """Write a checkpoint anew with other tensors, and the same metadata."""
    path = Path(folder) / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, unsealed(metadata))


@pytest.mark.parametrize("family", slow_but(FAMILIES, "mixtral", "deepseek_v3", "gpt_oss", "llama4", "dbrx"))
def test_loading_by_hand_and_reloading_are_equal_to_the_bit(checkpoint, family, tmp_path):
    for number, options in enumerate((STATIC, CHANNELS)):
        model = load(checkpoint(family), FP8Config(**options))
        # Measuring while loading sees FP8 weights, and by hand those in high precision.
        experts, hand = experts_of(model), experts_of(by_hand(checkpoint(family), **options))
        for ours, theirs in zip(
            experts.stacks() + experts.stack_scales(), hand.stacks() + hand.stack_scales(), strict=True
        ):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
        assert not any(parameter.requires_grad for parameter in (*experts.stacks(), *experts.scales().values()))
        expected = model(IDS).logits
        assert (expected - load(checkpoint(family))(IDS).logits).abs().max() < 0.1
        folder = tmp_path / str(number)
        model.save_pretrained(folder)
        again = load(folder)
        assert torch.equal(again(IDS).logits, expected)
        again.save_pretrained(tmp_path / f"{number} again")
        assert shapes(tmp_path / f"{number} again") == shapes(folder)
        assert torch.equal(copy.deepcopy(again)(IDS).logits, expected)
        dequantized = again.dequantize()(IDS).logits
        assert (dequantized - expected).abs().max() < 0.1 and not hasattr(again.config, "quantization_config")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_scales_stay_float32_in_models_of_other_dtypes(checkpoint, family, dtype, tmp_path):
    """Scales that are no powers of two, which no other dtype holds."""
    options = STATIC | {"scale_method": "maxabs_arbitrary"}
    model = load(checkpoint(family), FP8Config(**options), dtype=dtype)
    expected = model(IDS).logits
    model.save_pretrained(tmp_path / "first")
    again = load(tmp_path / "first")
    assert {scale.dtype for scale in experts_of(again).scales().values()} == {torch.float32}
    assert torch.equal(again(IDS).logits, expected)
    again.load_state_dict(model.state_dict())
    again.save_pretrained(tmp_path / "second")
    assert torch.equal(load(tmp_path / "second")(IDS).logits, expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "llama4"])
def test_one_token_with_dynamic_scales(checkpoint, family):
    model = load(checkpoint(family), FP8Config(activation_scheme="dynamic", target="cpu"))
    assert torch.isfinite(model(IDS[:1, :1]).logits).all()
    assert model.generate(IDS[:1, :3], max_new_tokens=3, do_sample=False).shape == (1, 6)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_stacks_on_disk_are_refused(checkpoint, family, tmp_path):
    model = load(checkpoint(family), FP8Config(**STATIC))
    model.save_pretrained(tmp_path / "fp8")
    device_map = {name: "cpu" for name, _ in model.named_children()} | {"model": "disk"}
    with pytest.raises(FP8NotAvailableError, match=r"modules of experts in FP8 on disk .*leave them on a device"):
        load(tmp_path / "fp8", device_map=device_map, offload_folder=tmp_path / "offloaded")


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_the_architecture(checkpoint, family, tmp_path):
    by_hand(checkpoint(family), **STATIC).save_pretrained(tmp_path)
    plain, ours = shapes(checkpoint(family)), shapes(tmp_path)
    never_computed = {name for name in plain if any(f".experts.{number}." in name for number in (4, 5))}
    assert plain.keys() - never_computed <= ours.keys(), "every tensor has the name it has in high precision"
    one_by_one = {name for name in plain if ".experts.3." in name}
    assert bool(one_by_one) == FAMILIES[family]
    for name in one_by_one:
        assert ours[name] == (1, *plain[name]) and ours[f"{name}_scale"] == (1,)
    flat = [name for name in plain if ".experts.mlp." in name]
    stacks = flat + [name for name, shape in plain.items() if len(shape) == 3 and "conv" not in name]
    assert all(len(ours[name]) == 4 and ours[name][0] == 1 for name in stacks)
    assert bool(stacks) != FAMILIES[family]
    found = sum(name.endswith("experts.intermediate_scale") for name in ours)
    assert found == (0 if family == "jetmoe" else 1)  # whose stacks have inputs of their own


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_generates_with_attention_and_cache_in_fp8(checkpoint, family, tmp_path):
    config = FP8Config(**STATIC, attention=True, kv_cache=True, decode_steps=2)
    model = load(checkpoint(family), config)
    tokens = model.generate(IDS[:, :6], max_new_tokens=5, do_sample=False)
    assert tokens.shape == (2, 11) and experts_of(model).record.kernels
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path).generate(IDS[:, :6], max_new_tokens=5, do_sample=False), tokens)


def test_routers_stay_in_high_precision_unless_asked_for(checkpoint):
    for options, expected in ({}, {"mlp.shared_expert_gate"}), ({"quantize_routers": True}, set()):
        report = quantization_report(load(checkpoint("qwen2_moe"), FP8Config(**CHANNELS, **options)))
        kept = {row.name: row.reason for row in report.modules if not row.quantized}
        assert {name.partition("layers.0.")[2] for name in kept} - {""} == expected
        quantized = {row.name.partition("layers.0.")[2] for row in report.quantized}
        assert {"mlp.experts", "mlp.shared_expert.up_proj"} <= quantized


def test_a_weight_that_is_not_finite_is_refused(checkpoint, tmp_path):
    load(checkpoint("mixtral")).save_pretrained(tmp_path)

    def damage(tensors):
        tensors["model.layers.0.block_sparse_moe.experts.2.w1.weight"][0, 0] = torch.inf

    rewrite(tmp_path, damage)
    with pytest.raises(FP8ScaleError, match=r"experts\.gate_up_proj.*NaN or Inf"):
        load(tmp_path, FP8Config(**CHANNELS))


DAMAGES = {
    "missing codes": (lambda tensors, name: tensors.pop(name), "lacks 1 tensors"),
    "missing scale": (lambda tensors, name: tensors.pop(scale(name)), "lacks 1 tensors"),
    "missing static scale": (lambda tensors, name: tensors.pop(static(tensors)), "lacks 1 tensors"),
    "codes that are NaN": (lambda tensors, name: tensors[name].view(torch.uint8).fill_(127), "NaN"),
    "a scale of zero": (lambda tensors, name: tensors[scale(name)].zero_(), "finite values above 0"),
    "a scale of another shape": (
        lambda tensors, name: tensors.update({scale(name): torch.ones(7)}),
        "shape",
    ),
    "a scale of another dtype": (
        lambda tensors, name: tensors.update({scale(name): tensors[scale(name)].bfloat16()}),
        "BF16",
    ),
    "values": (lambda tensors, name: tensors.update({name: tensors[name].float()}), "float32|expected"),
}


def scale(name: str) -> str:
    return f"{name}_scale"


def static(tensors) -> str:
    return next(name for name in tensors if name.endswith("experts.intermediate_scale"))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "family, name", [("qwen3_moe", ".experts.1.up_proj.weight"), ("gpt_oss", ".experts.down_proj")]
)
def test_a_damaged_checkpoint_is_refused(checkpoint, family, name, damage, tmp_path):
    by_hand(checkpoint(family), **STATIC).save_pretrained(tmp_path)
    change, message = DAMAGES[damage]
    rewrite(tmp_path, lambda tensors: change(tensors, next(key for key in tensors if key.endswith(name))))
    with pytest.raises(FP8CheckpointError, match=message):
        load(tmp_path)


def test_a_configuration_that_leaves_out_experts_of_the_checkpoint_is_refused(checkpoint, tmp_path):
    by_hand(checkpoint("gpt_oss"), **STATIC).save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said["quantization_config"]["modules_to_not_convert"].append("model.layers.0.mlp.experts")
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(FP8CheckpointError, match="modules_to_not_convert"):
        load(tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_checkpoints_of_versions_that_left_experts_as_they_were(checkpoint, family, tmp_path):
    model = by_hand(checkpoint(family), **CHANNELS, blocklist={"names": ["experts$"]})
    model.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    path = tmp_path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["optimum_fp8"])
    for config in (said["quantization_config"], record["config"]):  # they did not list them
        config["modules_to_not_convert"].remove("model.layers.0.mlp.experts")
    (tmp_path / "config.json").write_text(json.dumps(said))
    save_file(load_file(path), path, unsealed({"format": "pt", "optimum_fp8": json.dumps(record)}))
    again = load(tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    kept = {row.name: row.reason for row in quantization_report(again).modules if not row.quantized}
    assert kept["model.layers.0.mlp.experts"] == "not FP8 in the checkpoint"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("made_for, target", [("cpu", "gaudi2"), ("gaudi2", "gaudi3"), ("gaudi2", "cpu")])
def test_another_target_keeps_the_values(checkpoint, family, made_for, target, tmp_path):
    model = by_hand(checkpoint(family), **STATIC, target=made_for, scale_method="maxabs_pow2")
    model.save_pretrained(tmp_path)
    again = load(tmp_path, FP8Config(target=target))
    expected = experts_of(by_hand(checkpoint(family), **STATIC, target=target, scale_method="maxabs_pow2"))
    for name, wanted in expected.scales().items():
        if name in ("input_scale", "intermediate_scale"):
            assert torch.equal(experts_of(again).scales()[name], wanted)
    pairs = [dict(enumerate(experts_of(each).pieces())) for each in (model, again)]
    for number, pieces in pairs[0].items():
        for (codes, factor), (other, new) in zip(pieces, pairs[1][number], strict=True):
            values = [x.float() * s for x, s in ((codes, factor), (other, new))]
            torch.testing.assert_close(*values, atol=2e-3, rtol=0)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_block_by_block_is_the_same(checkpoint, family):
    whole = load(checkpoint(family), FP8Config(**STATIC))
    model = load(checkpoint(family), FP8Config(**STATIC, calibration="sequential"))
    assert isinstance(experts_of(model), FP8FusedExperts) and torch.equal(model(IDS).logits, whole(IDS).logits)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_compiles(checkpoint, family):
    model = by_hand(checkpoint(family), **STATIC)
    assert torch.equal(torch.compile(model, backend="eager")(IDS).logits, model(IDS).logits)


def test_stored_measurements_are_of_the_same_model(checkpoint):
    config = FP8Config(mode="MEASURE", dump_stats_path="ranges/moe", **STATIC)
    load(checkpoint("gpt_oss"), config)
    model = load(checkpoint("gpt_oss"), FP8Config(mode="QUANTIZE", dump_stats_path="ranges/moe"))
    hand = by_hand(checkpoint("gpt_oss"))
    assert torch.equal(model(IDS).logits, hand(IDS).logits)


@pytest.mark.parametrize("plan", ["tp_plan", "enable_expert_parallel"])
def test_parallel_plans_are_refused(checkpoint, plan, monkeypatch):
    arguments = {"tp_plan": {"tp_plan": "auto"}, "enable_expert_parallel": {
        "distributed_config": DistributedConfig(enable_expert_parallel=True)}}[plan]  # fmt: skip
    with pytest.raises(FP8NotAvailableError, match="cannot be spread over processes"):
        load(checkpoint("mixtral"), FP8Config(**CHANNELS), **arguments)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_dequantizes_while_loading(checkpoint, family, tmp_path):
    model = by_hand(checkpoint(family), **STATIC)
    model.save_pretrained(tmp_path)
    plain = load(tmp_path, FP8Config(dequantize=True))
    assert not any(isinstance(module, FP8FusedExperts) for module in plain.modules())
    assert torch.equal(plain(IDS).logits, model.dequantize()(IDS).logits)
    for number, each in enumerate((plain, model, load(tmp_path).dequantize())):
        each.save_pretrained(tmp_path / str(number))
        assert shapes(tmp_path / str(number)) == shapes(checkpoint(family)), "of the names it had"
