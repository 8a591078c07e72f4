"""nn.MultiheadAttention in FP8: what torch's own computes with the values that FP8 leaves, under all its options."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from fake_quantization import FULL_SCALE
from grids import over
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from optimum_fp8 import (
    FP8Config,
    convert,
    dequantize,
    finalize_calibration,
    load,
    prepare,
    quantization_report,
    quantize_files,
    save,
)
from optimum_fp8.errors import FP8MeasurementError, FP8NotAvailableError
from optimum_fp8.modules.multihead_attention import FP8MultiheadAttention
from optimum_fp8.scales import PerBlock, PerGroup, ScaleMethod, ScaleRule, register_method

E, HEADS, N, L, S = 16, 4, 3, 5, 7
ALIKE = ("key and value", "all")
MADE = {
    "packed": {},
    "separate": {"kdim": 12, "vdim": 20},
    "bias_kv": {"add_bias_kv": True, "add_zero_attn": True},
    "no bias": {"bias": False},
}
WEIGHT_ONLY = FP8Config(target="cpu", activation_scheme="weight_only")


class Net(nn.Module):
    def __init__(self, **keys):
        super().__init__()
        self.attn = nn.MultiheadAttention(E, HEADS, **keys)
        for bias in (self.attn.in_proj_bias, self.attn.out_proj.bias):
            if bias is not None:
                nn.init.normal_(bias)
        self.eval().requires_grad_(False)

    def forward(self, *args, **keys):
        return self.attn(*args, **keys)


def inputs(net, *, batched=True, alike=""):
    """Query, key and value, of which some are one tensor."""
    sizes = [E, net.attn.kdim, net.attn.vdim]
    lengths = [S if alike == "all" else L, S, S]
    q, k, v = (torch.randn(N, length, size) for length, size in zip(lengths, sizes, strict=True))
    if not batched:
        q, k, v = q[0], k[0], v[0]
    elif not net.attn.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return {"": (q, k, v), "key and value": (q, k, k), "all": (q, q, q)}[alike]


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    assert (found[1] is None) == (expected[1] is None)
    if found[1] is not None:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("made", MADE)
@over(batch_first=[True, False])
def test_options_of_torch(made, batch_first):
    net = convert(Net(**MADE[made], batch_first=batch_first), WEIGHT_ONLY)
    plain = dequantize(copy.deepcopy(net))
    assert type(net.attn) is FP8MultiheadAttention and quantization_report(net).quantized[1].name == "attn.out_proj"
    for batched, alike in itertools.product([True, False], ["", *ALIKE] if made != "separate" else [""]):
        given = inputs(net, batched=batched, alike=alike)
        for keys in ({}, {"need_weights": False}, {"average_attn_weights": False}):
            assert_same(net(*given, **keys), plain(*given, **keys))


MASKS = {
    "bool": torch.rand(L, S, generator=torch.Generator().manual_seed(0)) < 0.3,
    "added": torch.randn(L, S, generator=torch.Generator().manual_seed(1)),
    "of heads": torch.randn(N * HEADS, L, S, generator=torch.Generator().manual_seed(2)),
    "none": None,
}
PADDING = torch.arange(S) >= torch.tensor([[7], [4], [2]])


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@over(made=["packed", "bias_kv"], batch_first=[True, False])
def test_masks_of_torch(made, batch_first):
    net = convert(Net(**MADE[made], batch_first=batch_first), WEIGHT_ONLY)
    plain, given = dequantize(copy.deepcopy(net)), inputs(net)
    paddings = [None, PADDING, torch.zeros(N, S).masked_fill(PADDING, -5.0)]
    for mask, padding, need_weights in itertools.product(MASKS.values(), paddings, [True, False]):
        keys = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights}
        assert_same(net(*given, **keys), plain(*given, **keys))


@over(need_weights=[True, False], padding=[None, PADDING])
def test_causal_hints(need_weights, padding):
    net = Net(batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(S)
    given = inputs(net, alike="all")
    keys = {"attn_mask": mask, "is_causal": True, "need_weights": need_weights, "key_padding_mask": padding}
    convert(net, WEIGHT_ONLY)
    with pytest.warns(UserWarning, match="mismatched") if padding is not None else torch.no_grad():
        expected = dequantize(copy.deepcopy(net))(*given, **keys)
    assert_same(net(*given, **keys), expected)
    with pytest.raises(RuntimeError, match="attn_mask"):
        net(*given, is_causal=True)


def test_dropout_while_training():
    net = Net(batch_first=True, dropout=0.5).train()
    given = inputs(net, alike="all")
    convert(net, WEIGHT_ONLY)
    plain = dequantize(copy.deepcopy(net))
    assert net.training and plain.training
    for _ in range(2):
        torch.manual_seed(1)
        weights = net(*given)[1]
        torch.manual_seed(1)
        assert_same((weights, None), (plain(*given)[1], None))
    assert (net(*given)[1] - net.eval()(*given)[1]).abs().max() > 0.01


def on_grid(x, scale):
    return (x / scale).clamp(-FULL_SCALE, FULL_SCALE).to(torch.float8_e4m3fn).float() * scale


@pytest.mark.parametrize("method", ["maxabs_pow2", "act_maxabs_pow2_weights_pcs_maxabs_pow2"])
@over(made=["packed", "separate"], alike=["", "key and value", "all"])
def test_static_inputs_are_rounded_by_their_own_ranges(method, made, alike):
    if alike and made == "separate":
        return
    net = Net(**MADE[made], batch_first=True)
    q, k, v = given = inputs(net, alike=alike)
    if not alike:
        given = q, 3 * k, 20 * v
    expected = net(*given)
    prepare(net, FP8Config(target="cpu", scale_method=method, blocklist={"names": ["out_proj"]}))
    assert_same(net(*given), expected)
    convert(net)
    attn = net.attn
    scales = [attn.input_scale, attn.input_key_scale, attn.input_value_scale]
    for x, scale in zip(given, scales, strict=True):
        assert scale == torch.exp2(torch.log2(x.abs().max() / (FULL_SCALE / 4)).ceil())
    rounded = [on_grid(x, scale) for x, scale in zip(given, scales, strict=True)]
    assert_same(net(*given), dequantize(copy.deepcopy(net))(*rounded))
    assert [row.activations for row in quantization_report(net).quantized] == ["static"]


@over(made=MADE, scheme=["static", "dynamic"])
def test_close_to_high_precision(made, scheme):
    net = Net(**MADE[made])
    given = inputs(net)
    expected = net(*given)[0]
    prepare(net, FP8Config(target="cpu", activation_scheme=scheme))
    net(*given)
    convert(net)
    error = (net(*given)[0] - expected).norm() / expected.norm()
    assert 0.005 < error < 0.08
    report = quantization_report(net)
    assert [row.activations for row in report.quantized] == [scheme] * 2
    assert all(sum(row.kernels.values()) for row in report.quantized) and not report.fallbacks


def test_by_blocks_only_where_projections_end_with_them():
    rules = (ScaleRule(each, "maxabs", "identity") for each in (PerBlock(128, 128), PerGroup(128)))
    register_method(ScaleMethod("blocks", *rules, dynamic_only=True))
    config = FP8Config(target="cpu", activation_scheme="weight_only", scale_method="blocks")
    with pytest.raises(ValueError, match="end within a block: they have 16 rows each"):
        convert(Net(), config.replace(allowlist={"types": ["MultiheadAttention"]}))
    net = nn.Sequential(nn.MultiheadAttention(128, 4, batch_first=True)).requires_grad_(False)
    convert(net, config)
    assert net[0].in_proj_weight_scale.shape == (3, 1)
    q, k = torch.randn(2, 3, 128), torch.randn(2, 3, 128)
    assert_same(net[0](q, k, k), dequantize(copy.deepcopy(net))[0](q, k, k))


@over(made=MADE)
def test_state_is_saved_and_loaded_to_the_bit(made, tmp_path):
    net = Net(**MADE[made])
    given, names = inputs(net), set(net.state_dict())
    prepare(net, FP8Config(target="cpu", dump_stats_path=str(tmp_path / made / "ranges")))
    net(*given)
    finalize_calibration(net)
    convert(net)
    expected, state = net(*given)[0], net.state_dict()
    weights = {name for name in names if name.endswith("_weight") or name == "attn.out_proj.weight"}
    assert names < set(state) and {f"{name}_scale" for name in weights} < set(state)
    assert all(state[name].dtype is torch.float8_e4m3fn and state[name].shape[0] == 1 for name in weights)
    save(net, tmp_path / made / "fp8")
    again = load(tmp_path / made / "fp8", Net(**MADE[made]).to("meta"))
    assert torch.equal(again(*given)[0], expected)
    again = load(tmp_path / made / "fp8", Net(**MADE[made]))
    other = convert(Net(**MADE[made]), FP8Config(target="cpu", dump_stats_path=str(tmp_path / made / "none"),
                                                   activation_scheme="dynamic"))  # fmt: skip
    with pytest.raises(RuntimeError, match="input_scale"):
        other.load_state_dict(state)
    again.load_state_dict(copy.deepcopy(state))
    assert torch.equal(again(*given)[0], expected)
    plain = dequantize(again)
    assert set(plain.state_dict()) == names and type(plain.attn) is nn.MultiheadAttention
    for name in weights:
        codes, scale = state[name].squeeze(0), state[f"{name}_scale"]
        assert torch.equal(plain.state_dict()[name], codes.float() * scale)


def test_loaded_for_another_target(tmp_path):
    torch.manual_seed(0)
    net = Net()
    given = inputs(net)
    prepare(net, FP8Config(target="gaudi3", scale_method="maxabs_hw"))
    net(*given)
    convert(net)
    save(net, tmp_path / "fp8")
    there = load(tmp_path / "fp8", Net(), target="gaudi2")
    codes = there.state_dict()["attn.in_proj_weight"].float()
    assert codes.abs().max() <= 240 and there.attn.input_scale in torch.tensor([16.0, 1.0, 2.0**-4, 2.0**-8])
    expected = net(*given)[0]
    assert ((there(*given)[0] - expected).norm() / expected.norm()) < 0.06


def test_damaged_codes_are_refused():
    net = convert(Net(), WEIGHT_ONLY)
    state = copy.deepcopy(net.state_dict())
    state["attn.in_proj_weight"].view(torch.uint8)[0, 0, 0] = 0x7F
    with pytest.raises(RuntimeError, match=r"attn\.in_proj_weight holds codes that are NaN"):
        net.load_state_dict(state)
    state = net.state_dict()
    state["attn.in_proj_weight_scale"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"attn\.in_proj_weight_scale"):
        net.load_state_dict(state)


def test_code_around_it_sees_values():
    net = Net()
    plain = net.attn.in_proj_weight.clone()
    convert(net.bfloat16(), WEIGHT_ONLY)
    weight = net.attn.in_proj_weight
    assert weight.dtype is torch.bfloat16 and weight.shape == plain.shape
    assert ((weight.float() - plain).norm() / plain.norm()) < 0.05
    assert net.get_parameter("attn.in_proj_weight").dtype is torch.float8_e4m3fn
    net.float()
    assert net.attn.in_proj_weight.dtype is torch.float32 and net.attn.codes("in_proj_weight").element_size() == 1
    with pytest.raises(FP8NotAvailableError, match="in_proj_weight"):
        del net.attn.in_proj_weight


@torch.no_grad()
def test_layers_of_torch_leave_their_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, HEADS, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(N, S, E)
    expected = model(x, src_key_padding_mask=PADDING)
    prepare(model, FP8Config(target="cpu"))
    model(x)
    convert(model)
    report = quantization_report(model)
    assert len(report.quantized) == 8 and all(row.activations == "static" for row in report.quantized)
    found = model(x, src_key_padding_mask=PADDING)
    assert ((found - expected)[~PADDING].norm() / expected[~PADDING].norm()) < 0.08
    assert all(sum(row.kernels.values()) for row in quantization_report(model).quantized)


class Own(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)[0]


class Around(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.attn, self.fc = attn, nn.Linear(E, E)

    def forward(self, x):
        return self.fc(self.attn(x, x, x)[0])


def reasons(model, **keys):
    convert(model, FP8Config(target="cpu", activation_scheme="dynamic", **keys))
    return {row.name: row.reason for row in quantization_report(model).modules}


def test_what_stays_in_high_precision_and_why():
    never_called = "nn.MultiheadAttention reads its weight and never calls it"
    own = reasons(Around(Own(E, HEADS)))
    assert own == {"attn": "Own has a forward of its own", "attn.out_proj": never_called, "fc": "selected"}
    listed = reasons(Around(nn.MultiheadAttention(E, HEADS)), blocklist={"types": ["MultiheadAttention"]})
    assert listed["attn"] == "blocklist type 'MultiheadAttention'" and listed["attn.out_proj"] == never_called
    partly = reasons(Around(nn.MultiheadAttention(E, HEADS)), blocklist={"names": ["out_proj"]})
    assert partly["attn"] == "selected" and partly["attn.out_proj"] == "blocklist name 'out_proj'"
    nested = torch.nested.nested_tensor([torch.randn(2, E), torch.randn(3, E)])
    with pytest.raises(FP8NotAvailableError, match="nested"):
        convert(Net(batch_first=True), WEIGHT_ONLY)(nested, nested, nested)


def test_never_reached_by_calibration():
    model = prepare(
        nn.ModuleDict({"a": nn.Linear(E, E), "b": nn.MultiheadAttention(E, HEADS)}), FP8Config(target="cpu")
    )
    model["a"](torch.randn(2, E))
    with pytest.raises(FP8MeasurementError, match=r"2 selected modules were never reached by calibration: b, b\.out"):
        convert(model)
    assert type(dequantize(model)["b"]) is nn.MultiheadAttention and "forward" not in vars(model["b"])


def test_an_error_leaves_the_model_as_it_was():
    net = Around(nn.MultiheadAttention(E, HEADS))
    attn, out = net.attn, net.attn.out_proj
    net.fc.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        convert(net, WEIGHT_ONLY)
    assert net.attn is attn and attn.out_proj is out


@torch.no_grad()
def test_from_pretrained_saved_and_loaded_to_the_bit(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=8, patch_size=4)).eval()
    plain.save_pretrained(tmp_path / "plain")
    batch = {"pixel_values": torch.randn(2, 3, 8, 8)}
    config = FP8Config(target="cpu", dataset=[batch], attention=True, dump_stats_path=str(tmp_path / "ranges"))
    model = SiglipVisionModel.from_pretrained(tmp_path / "plain", quantization_config=config)
    expected = model(**batch).pooler_output
    found = {row.name: row for row in quantization_report(model).quantized}
    head = next(name for name in found if name.endswith("head.attention"))
    assert found[head].activations == found[f"{head}.out_proj"].activations == "static"
    assert "attention's own products in high precision" in found[head].scheme
    assert model.dtype is torch.float32
    model.save_pretrained(tmp_path / "fp8")
    again = SiglipVisionModel.from_pretrained(tmp_path / "fp8").eval()
    assert torch.equal(again(**batch).pooler_output, expected)
    dequantize(again).save_pretrained(tmp_path / "again")
    last = SiglipVisionModel.from_pretrained(tmp_path / "again").eval()
    assert set(last.state_dict()) == set(plain.state_dict())
    assert (last(**batch).pooler_output - expected).norm() / expected.norm() < 0.1


@torch.no_grad()
def test_scales_are_not_cast_to_the_dtype_of_the_model_when_loaded(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=8, patch_size=4)).bfloat16()
    plain.save_pretrained(tmp_path / "plain")
    config = FP8Config.preset("FP8_DYNAMIC", target="cpu")
    model = SiglipVisionModel.from_pretrained(tmp_path / "plain", quantization_config=config)
    model.save_pretrained(tmp_path / "fp8")
    again, expected = SiglipVisionModel.from_pretrained(tmp_path / "fp8").state_dict(), model.state_dict()
    scales = [name for name in expected if name.endswith("_scale")]
    assert any("in_proj_weight_scale" in name for name in scales)
    assert all(again[name].dtype == torch.float32 and torch.equal(again[name], expected[name]) for name in scales)


def test_without_the_model_it_stays_in_high_precision(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    plain = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=8, patch_size=4)).eval()
    plain.save_pretrained(tmp_path / "plain")
    report = quantize_files(tmp_path / "plain", tmp_path / "fp8", FP8Config(target="cpu", activation_scheme="dynamic"))
    assert report.layers and not any("head.attention" in name for name in report.layers)
    again = SiglipVisionModel.from_pretrained(tmp_path / "fp8").eval()
    head = next(module for module in again.modules() if isinstance(module, nn.MultiheadAttention))
    before = next(module for module in plain.modules() if isinstance(module, nn.MultiheadAttention))
    assert torch.equal(head.in_proj_weight, before.in_proj_weight)
