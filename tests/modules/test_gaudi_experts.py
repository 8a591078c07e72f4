"""Models with experts in the manner of optimum-habana and of vLLM: measured, quantized, run, saved and put back.

The oracle is Gaudi's emulated operator, called with the arguments that INC gives it.
"""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from expert_operands import ulps_apart
from gaudi_expert_models import (
    CONFIG,
    IDS,
    FusedMoE,
    GaudiDeepseek,
    GaudiMixtral,
    GaudiMixtralSparseMoeBlock,
    VllmMixtral,
    VllmMixtureOfExpertsOpFP8PerChannel,
    expert_model,
)
from grids import over, slow_but
from torch import nn

from optimum_fp8 import (
    FP8Config,
    convert,
    dequantize,
    finalize_calibration,
    load,
    ops,
    prepare,
    quantization_report,
    save,
)
from optimum_fp8.errors import FP8MeasurementError, FP8SelectionError
from optimum_fp8.measure.inc import nodes_of, write_inc
from optimum_fp8.measure.inc.names import INTERMEDIATE
from optimum_fp8.modules.experts import FP8Experts
from optimum_fp8.scales import activation_scale, weight_scale
from optimum_fp8.test_utils import gaudi

pytestmark = pytest.mark.core
MODELS = (GaudiMixtral, GaudiDeepseek, VllmMixtral)
CHIPS = ("gaudi2", "gaudi3")
EXPERTS = CONFIG.num_local_experts
# The modules of a model's first mixture: the one that INC patches.
NAMES = {
    GaudiMixtral: "layers.0.block_sparse_moe",
    GaudiDeepseek: "layers.0.block_sparse_moe",
    VllmMixtral: "layers.0.block_sparse_moe.experts.moe_op",
}
ONLY_EXPERTS = {"types": ["Linear"]}


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        yield


def measured(model, chip="gaudi2", ids=IDS, **options):
    config = FP8Config(target=chip, **({"blocklist": ONLY_EXPERTS} | options))
    with gaudi.emulated(chip):
        prepare(model, config)
        model(ids)
    return model


def converted(model_class, chip="gaudi2", **options):
    return convert(measured(expert_model(model_class), chip, **options))


def inputs_of(model, name, ids=IDS):
    """What the first mixture of a model in high precision is called with: hidden states, routing table and weights."""
    module, seen = model.get_submodule(name), []
    called = "forward" if "moe_op" in name else "call_dynamic_moe_op"
    original = getattr(module, called)

    def look(*args, **kwargs):
        seen.append((*args, *kwargs.values())[:3])
        return original(*args, **kwargs)

    module.__dict__[called] = look
    model(ids)
    del module.__dict__[called]
    return seen[0]


def weights_of(model, name):
    """Gate, up and down projection of each expert in high precision, by the names of the classes' own forward."""
    module, found = model.get_submodule(name), []
    for i in range(EXPERTS):
        if "moe_op" in name:
            found.append((*module.w13_list[i].weight.chunk(2), module.w2_list[i].weight))
        else:
            names = ("w1", "w3", "w2") if hasattr(module.experts[i], "w1") else ("gate_proj", "up_proj", "down_proj")
            found.append(tuple(getattr(module.experts[i], each).weight for each in names))
    return found


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("model_class", MODELS)
def test_computes_what_inc_computes(model_class, chip):
    """Codes by Gaudi's casts, weights transposed, INC's scales as numbers, INC's order of arguments."""
    original, name = expert_model(model_class), NAMES[model_class]
    with gaudi.emulated(chip):
        x, table, router = inputs_of(original, name)
    weights, method = weights_of(original, name), {"method": "maxabs_hw", "target": chip}
    is_fused = "moe_op" in name
    with gaudi.emulated(chip):
        lists = [[each[i] for each in weights] for i in range(3)]
        measure = torch.ops.hpu.mixture_of_experts.fp8_measurement
        _, maxima = measure(x, table, router, *lists, True, "silu", 0, EXPERTS - 1, True)
        s_x = activation_scale(x.abs().max(), **method).item()
        s_mid = [activation_scale(each, **method).item() for each in maxima]
        if is_fused:
            lists = [[torch.cat([gate, up]) for gate, up, _ in weights], lists[2]]
        s_w = [[weight_scale(weight, **method).item() for weight in each] for each in lists]

        def cast(w, s):
            return torch.ops.hpu.cast_to_fp8_v2(w, 1 / s, False, False, torch.float8_e4m3fn)[0]

        codes = [
            [cast(w, s).t().contiguous() for w, s in zip(*pair, strict=True)] for pair in zip(lists, s_w, strict=True)
        ]
        overload = "fp8_fused_weights_scalars" if is_fused else "fp8_scalars"
        arguments = (cast(x, s_x), table, router, *codes, s_x, s_mid, *s_w, False, "silu", 0, EXPERTS - 1)
        expected = getattr(torch.ops.hpu.mixture_of_experts, overload)(*arguments)

    model = convert(measured(original, chip))
    module = model.get_submodule(name)
    call = module.forward if is_fused else module.call_dynamic_moe_op
    found = call(x, table, router)  # the reference, on a CPU
    assert ulps_apart(found, expected) <= 1
    with gaudi.emulated(chip), ops.backend("hpu"):
        again = call(x, table, router)
    assert ulps_apart(again, expected) <= 1
    scales = module.experts.scales()
    assert scales["input_scale"].tolist() == [s_x]
    assert scales["intermediate_scale"].flatten().tolist() == s_mid
    flat = [s for pair in zip(*s_w[:-1], strict=True) for s in pair]
    assert scales["gate_up_proj_scale"].flatten().tolist() == flat
    assert scales["down_proj_scale"].flatten().tolist() == s_w[-1]


@pytest.mark.parametrize("model_class", slow_but(MODELS, GaudiMixtral))
@over(chip=CHIPS, constant=["scalar", "const"])
def test_the_whole_model_runs_on_gaudis_operator(model_class, chip, constant):
    model = converted(model_class, chip, scale_format=constant)
    expected = model(IDS)
    with gaudi.emulated(chip) as device, ops.backend("hpu"):
        packed = copy.deepcopy(model).to(torch.device("cpu"))  # as a move to the device packs
        found = packed(IDS)
    assert (found - expected).float().norm() / expected.float().norm() < 0.02
    overloads = {call.overload for call in device.calls if call.name == "mixture_of_experts"}
    fused = "_fused_weights" if model_class is VllmMixtral else ""
    assert overloads == {f"fp8{fused}" + ("_scalars" if constant == "scalar" else "")}


@pytest.mark.parametrize("model_class", MODELS)
def test_measuring_changes_nothing_and_sees_each_expert(model_class):
    original = expert_model(model_class)
    with gaudi.emulated("gaudi2"):
        exact = original(IDS)
        model = prepare(copy.deepcopy(original), FP8Config(target="gaudi2"))
        assert torch.equal(model(IDS), exact)
        measurements = finalize_calibration(model)
        assert torch.equal(model(IDS), exact)
        name = NAMES[model_class]
        x, table, router = inputs_of(original, name)
        lists = [[each[i] for each in weights_of(original, name)] for i in range(3)]
        measure = torch.ops.hpu.mixture_of_experts.fp8_measurement
        _, maxima = measure(x, table, router, *lists, True, "silu", 0, EXPERTS - 1, True)
    assert measurements.range(name) == x.abs().max()
    found = [measurements.range(name, f"{INTERMEDIATE}{i}").item() for i in range(EXPERTS)]
    assert found == maxima.tolist()
    assert (
        measurements.tokens_of_experts()[name].tolist() == torch.bincount(table.flatten(), minlength=EXPERTS).tolist()
    )
    held = [each for each, _ in measurements.tensors if ".w1" in each or "_proj" in each and "shared" not in each]
    assert held == []


# --- what may go wrong, or be chosen ----------------------------------------------------------------------------------


def only_to(model, allowed):
    """Have the routers of a model send tokens to some of the experts alone."""
    for name, module in model.named_modules():
        if name.endswith(".gate") and isinstance(module, nn.Linear):
            module.bias = nn.Parameter(torch.tensor([0.0 if i in allowed else -1e4 for i in range(EXPERTS)]).bfloat16())
    return model


@pytest.mark.parametrize("model_class", MODELS)
def test_an_expert_that_was_never_reached_is_scaled_as_the_largest(model_class, caplog):
    model = measured(only_to(expert_model(model_class), (1, 2)))
    with caplog.at_level(logging.WARNING):
        convert(model)
    name = NAMES[model_class]
    assert f"{name}: 2 of 4 experts were never reached by calibration (0, 3)" in caplog.text
    scales = model.get_submodule(name).experts.intermediate_scale.flatten()
    assert scales[0] == scales[3] == scales[1:3].max() and scales.isfinite().all()


def test_a_mixture_that_was_never_reached_is_an_error():
    model = prepare(expert_model(GaudiMixtral), FP8Config(target="gaudi2"))
    model.layers[0].mixer(torch.randn(1, 32).bfloat16())
    with pytest.raises(FP8MeasurementError, match="layers.0.block_sparse_moe"):
        convert(model)
    assert not any(isinstance(each, FP8Experts) for each in model.modules())


def test_lists_by_incs_names():
    def in_fp8(model_class, **lists):
        report = quantization_report(convert(measured(expert_model(model_class), **lists)))
        return {row.type for row in report.quantized}

    both = {"Linear", "GaudiMixtralSparseMoeBlock"}
    assert in_fp8(GaudiMixtral, blocklist=None) == both
    assert in_fp8(GaudiMixtral, blocklist={"types": ["GaudiMixtralSparseMoeBlock"]}) == {"Linear"}
    assert in_fp8(GaudiMixtral, blocklist={"names": ["block_sparse_moe$"]}) == {"Linear"}
    assert in_fp8(GaudiMixtral, blocklist=None, allowlist={"types": ["GaudiMixtralSparseMoeBlock"]}) == both - {
        "Linear"
    }
    assert in_fp8(GaudiMixtral, blocklist=None, allowlist={"types": ["Linear"]}) == {"Linear"}
    types = ["Linear", "FusedMoE", "MoeMatmul", "VllmMixtureOfExpertsOp"]
    assert in_fp8(VllmMixtral, blocklist=None, allowlist={"types": types}) == {"Linear", "VllmMixtureOfExpertsOp"}


def test_layers_that_only_hold_weights_are_no_candidates():
    """Whether their block is in FP8 or not: its code multiplies by their weights, and never calls them."""
    for blocklist in (None, {"types": ["GaudiMixtralSparseMoeBlock"]}):
        report = quantization_report(prepare(expert_model(GaudiMixtral), FP8Config(blocklist=blocklist)))
        assert not [row.name for row in report.modules if ".experts." in row.name]


@pytest.mark.parametrize("model_class", MODELS)
@over(dtype=[None, torch.float32])
def test_dequantizing_puts_back_what_was_there(model_class, dtype):
    original = expert_model(model_class)
    model = convert(measured(copy.deepcopy(original)))
    quantized = model(IDS)
    dequantize(model, dtype)
    before, after = original.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name].float() - tensor.float()).norm() <= 0.04 * tensor.float().norm(), name
    assert dict(model.named_modules()).keys() == dict(original.named_modules()).keys()
    if dtype is None:
        with gaudi.emulated("gaudi2"):
            again = model(IDS)
        assert (again - quantized).float().norm() / quantized.float().norm() < 0.15


def test_vllms_layer_gives_up_its_stacks():
    model = expert_model(VllmMixtral)
    layer, held = model.layers[0].block_sparse_moe.experts, []
    measured(model)
    convert(model)
    assert layer.w13_weight is None and layer.w2_weight is None and not hasattr(layer.moe_op, "w13_list")
    held = [p for p in layer.parameters() if p.dtype == torch.bfloat16]
    assert held == []
    dequantize(model)
    for i in range(EXPERTS):
        assert layer.moe_op.w13_list[i].weight.data_ptr() == layer.w13_weight[i].data_ptr()
        assert layer.moe_op.w2_list[i].weight.data_ptr() == layer.w2_weight[i].data_ptr()


def test_an_error_leaves_the_model_as_it_was(monkeypatch):
    original = expert_model(VllmMixtral)
    model = measured(copy.deepcopy(original))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("optimum_fp8.lifecycle.state.FP8State.change_around", lambda *args: 1 / 0)
        convert(model)
    assert model.state_dict().keys() == original.state_dict().keys()
    with gaudi.emulated("gaudi2"):
        assert torch.equal(model(IDS), original(IDS))
    convert(model)
    assert model(IDS).isfinite().all()


def test_expert_parallelism():
    """Each process has half of the experts, under the numbers that they have in the whole."""
    whole = GaudiMixtralSparseMoeBlock(CONFIG).bfloat16().eval()
    nn.init.normal_(whole.gate.weight)
    x, parts = torch.randn(1, 40, CONFIG.hidden_size).bfloat16(), []
    for low, high in ((0, 1), (2, 3)):
        part = GaudiMixtralSparseMoeBlock(CONFIG, low, high).bfloat16().eval()
        own = {name: value for name, value in whole.state_dict().items() if name in part.state_dict()}
        part.load_state_dict(own)
        parts.append(part)
    config = FP8Config(target="gaudi2", blocklist=ONLY_EXPERTS)
    outputs, names = [], []
    with gaudi.emulated("gaudi2"):
        for block in (whole, *parts):
            model = prepare(nn.Sequential(block), config)
            model(x)
            convert(model)
            outputs.append(model(x)[0])
            held = [name for name in model.state_dict() if name.endswith("w1.weight")]
            names.append({name.split(".")[2] for name in held})
    torch.testing.assert_close(outputs[1] + outputs[2], outputs[0], rtol=0.02, atol=0.02)
    assert names == [{"0", "1", "2", "3"}, {"0", "1"}, {"2", "3"}]


class FP8Layer(FusedMoE):
    operation = VllmMixtureOfExpertsOpFP8PerChannel


def test_weights_that_are_codes_already():
    """They are dequantized, measured, and rounded anew with our scales."""
    torch.manual_seed(0)
    layer = FP8Layer(CONFIG)
    values = {}
    for name in ("w13", "w2"):
        shape = getattr(layer, f"{name}_weight").shape
        codes, scales = torch.randn(shape).mul(50).to(torch.float8_e4m3fn), torch.rand(*shape[:2], 1) * 0.01 + 1e-3
        setattr(layer, f"{name}_weight", nn.Parameter(codes, requires_grad=False))
        values[name] = (codes.float() * scales).bfloat16()
        for i, matrix in enumerate(getattr(layer.moe_op, f"{name}_list")):
            matrix.set_scale_inv_fp8(scales[i])
    layer.hand_out()
    x, logits = torch.randn(30, CONFIG.hidden_size).bfloat16(), torch.randn(30, EXPERTS)
    layer.__class__.__name__ = "FusedMoE"
    model = nn.ModuleDict({"moe": layer})
    with gaudi.emulated("gaudi3"):
        exact = layer(x, logits)
        prepare(model, FP8Config(target="gaudi3"))
        layer(x, logits)
        convert(model)
    assert (layer(x, logits) - exact).float().norm() / exact.float().norm() < 0.08
    dequantize(model)
    assert layer.moe_op.w13_list[0].get_dequant_weight().dtype == torch.bfloat16
    for i in range(EXPERTS):
        found = layer.moe_op.w2_list[i].get_dequant_weight().float()
        assert (found - values["w2"][i].float()).norm() <= 0.04 * values["w2"][i].float().norm()


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda op: setattr(op, "bias", True), "its experts have biases"),
        (lambda op: setattr(op, "dispatch_func", len), "to other processes"),
        (lambda op: delattr(op.w2_list[1], "weight"), "not all of its experts have a weight"),
        (
            lambda op: op.w2_list[1].set_weight(torch.zeros(32, 48).to(torch.float8_e4m3fn)),
            "codes in torch.float8_e4m3fn",
        ),
    ],
)
def test_refuses_what_it_cannot_convert(change, text):
    model = nn.ModuleDict({"moe": FusedMoE(CONFIG)})
    change(model["moe"].moe_op)
    with pytest.raises(FP8SelectionError, match=text):
        prepare(model, FP8Config(target="gaudi2"))


@pytest.mark.parametrize("model_class", MODELS)
def test_measurements_of_incs_are_as_our_own(model_class):
    """What INC's files say of a mixture, read back, gives the same model."""
    model = measured(expert_model(model_class), dump_stats_path="ours/measure")
    measurements = finalize_calibration(model)
    name = NAMES[model_class]
    node = nodes_of(measurements.tensors).nodes[name]
    assert [float(value) for value in node.inputs] == [measurements.range(name).item()]
    expected = [measurements.range(name, f"{INTERMEDIATE}{i}").item() for i in range(EXPERTS)]
    assert [float(value) for value in node.outputs] == [measurements.range(name, "output").item(), *expected]
    write_inc("inc/measure", nodes_of(measurements.tensors).nodes)
    config = FP8Config(target="gaudi2", blocklist=ONLY_EXPERTS, dump_stats_path="inc/measure", mode="QUANTIZE")
    again = convert(expert_model(model_class), config)
    assert torch.equal(again(IDS), convert(model)(IDS))


# --- checkpoints ------------------------------------------------------------------------------------------------------

WAYS = (
    {},
    {"scale_method": "act_maxabs_pow2_weights_pcs_maxabs_pow2"},
    {"activation_scheme": "dynamic", "scale_method": "maxabs_pow2"},
    {"activation_scheme": "weight_only"},
)


@pytest.mark.parametrize("model_class", [GaudiMixtral, GaudiDeepseek])
@over(way=range(len(WAYS)))
def test_save_pretrained(model_class, way):
    folder = f"{model_class.__name__}{way}"
    model = converted(model_class, blocklist=None, **WAYS[way])
    expected = model(IDS)
    model.save_pretrained(folder)
    again = model_class.from_pretrained(folder)
    assert torch.equal(again(IDS), expected)
    first = next(name for name in again.state_dict() if name.endswith(".weight") and ".experts." in name)
    assert again.state_dict()[first].shape[0] == 1  # as all FP8 weights: what does not know them refuses them
    again.dequantize()
    assert again.state_dict().keys() == expert_model(model_class).state_dict().keys()


@over(way=range(len(WAYS)), device=["cpu", "meta"])
def test_save_and_load(way, device):
    folder = f"{device}{way}"
    model = converted(VllmMixtral, blocklist=None, **WAYS[way])
    save(model, folder)
    with torch.device(device):
        fresh = VllmMixtral(copy.deepcopy(CONFIG)).bfloat16().eval()
    assert torch.equal(load(folder, fresh)(IDS), model(IDS))


def test_an_error_while_loading_leaves_the_model_as_it_was(monkeypatch):
    save(converted(VllmMixtral), "saved")
    model = expert_model(VllmMixtral)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("optimum_fp8.checkpoint.fill.check_scales", lambda *args: 1 / 0)
        load("saved", model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    with gaudi.emulated("gaudi2"):
        model(IDS)


def test_quantized_while_loading():
    expert_model(GaudiMixtral).save_pretrained("original")
    config = FP8Config(target="gaudi2", dataset=[{"input_ids": IDS}])
    with gaudi.emulated("gaudi2"):
        model = GaudiMixtral.from_pretrained("original", dtype=torch.bfloat16, quantization_config=config)
    rows = {row.type: row for row in quantization_report(model).quantized}
    assert rows["GaudiMixtralSparseMoeBlock"].activations == "static"
    assert model(IDS).isfinite().all()


def test_a_checkpoint_for_448_is_brought_to_gaudi2():
    model = converted(GaudiMixtral, "gaudi3")
    model.save_pretrained("saved")
    again = GaudiMixtral.from_pretrained("saved", quantization_config=FP8Config(target="gaudi2"))
    for module in again.modules():
        if isinstance(module, FP8Experts):
            assert max(module.gate_up_proj.float().abs().max(), module.down_proj.float().abs().max()) <= 240
    expected, found = model(IDS), again(IDS)
    assert (found - expected).float().norm() / expected.float().norm() < 0.1


def test_state_dicts_are_checked():
    model = converted(GaudiMixtral)
    state, expected = model.state_dict(), model(IDS)
    key = "layers.0.block_sparse_moe.experts.2.w3.weight"
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, FP8Experts):
            module.down_proj.data.zero_()
    assert not torch.equal(twin(IDS), expected)
    twin.load_state_dict(state)
    assert torch.equal(twin(IDS), expected)
    for changed, text in (
        ({f"{key}_scale": torch.zeros(1)}, "w3.weight_scale is"),
        ({key: state[key].float()}, "expected"),
        ({key: torch.full((1, 48, 32), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)}, "NaN or Inf"),
    ):
        with pytest.raises(RuntimeError, match=text):
            twin.load_state_dict({**state, **changed})
    with pytest.raises(RuntimeError, match="Missing key"):
        twin.load_state_dict({name: value for name, value in state.items() if name != key})


def test_moves_and_casts():
    model = converted(VllmMixtral)
    expected = model(IDS)
    model.float()
    experts = model.layers[0].block_sparse_moe.experts.moe_op.experts
    assert experts.gate_up_proj.dtype == torch.float8_e4m3fn and experts.high_precision == torch.float32
    assert experts.input_scale.dtype == torch.float32
    model.bfloat16()
    assert torch.equal(model(IDS), expected)
