"""Recurrent layers in FP8: torch's own with the values that codes and scales stand for."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import EncodecConfig, EncodecModel

from optimum_fp8 import FP8Config, convert, dequantize, load, prepare, quantization_report, save
from optimum_fp8.modules.recurrent import FP8Recurrent

IN, HIDDEN, N, LENGTH = 6, 8, 3, 5
KINDS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
MADE = {
    "one": {},
    "deep": {"num_layers": 2, "bidirectional": True},
    "batch first": {"batch_first": True, "bias": False},
    "projected": {"proj_size": 4, "num_layers": 2},
}
CASES = [case for case in itertools.product(KINDS, MADE) if case[0] == "LSTM" or case[1] != "projected"]
PER_CHANNEL = "act_maxabs_pow2_weights_pcs_maxabs_pow2"


@pytest.fixture(autouse=True)
def no_gradients():
    """torch takes other kernels where it may have to give gradients."""
    with torch.no_grad():
        yield


class Net(nn.Module):
    def __init__(self, kind, made, **keys):
        super().__init__()
        self.rnn = KINDS[kind](IN, HIDDEN, **MADE[made], **keys)
        self.eval().requires_grad_(False)

    def forward(self, *args):
        return self.rnn(*args)


def config(**keys):
    return FP8Config(**{"target": "cpu", "activation_scheme": "weight_only", "scale_method": PER_CHANNEL, **keys})


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [] if value is None else [each for part in value for each in flat(part)]


def assert_equal(found, expected):
    found, expected = flat(found), flat(expected)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def assert_close(found, expected):
    """But for the order in which torch adds up, which depends on where tensors lie."""
    torch.testing.assert_close(flat(found), flat(expected), rtol=1e-5, atol=1e-6)


def given(net):
    """A sequence, one without a batch, and a packed one."""
    x = torch.randn(N, LENGTH, IN)
    x = x if net.rnn.batch_first else x.transpose(0, 1)
    packed = pack_padded_sequence(x, torch.tensor([3, 5, 1]), net.rnn.batch_first, enforce_sorted=False)
    return [x, torch.randn(LENGTH, IN), packed]


@pytest.mark.parametrize("kind, made", CASES)
def test_torch_computes_with_the_values(kind, made):
    net = Net(kind, made)
    inputs = given(net)
    before = net(inputs[0])
    names, plain = set(net.state_dict()), net.state_dict()
    convert(net, config())
    state = net.state_dict()
    weights = {name for name in names if "weight" in name}
    assert set(state) == names | {f"{name}_scale" for name in weights}
    for name in weights:
        out, size = plain[name].shape
        assert state[name].dtype is torch.float8_e4m3fn and state[name].shape == (1, out, size)
        assert state[f"{name}_scale"].shape == (out, 1)
        values = state[name][0].float() * state[f"{name}_scale"]
        assert torch.equal(net.get_parameter(name).float() * state[f"{name}_scale"], values)
        assert torch.equal(getattr(net.rnn, name.removeprefix("rnn.")).clone(), values)
        plain[name] = values
    oracle = Net(kind, made)
    oracle.load_state_dict(plain)
    for x in inputs:
        assert_close(net(x), oracle(x))
    hidden = net(inputs[0])[1]
    assert_close(net(inputs[0], hidden), oracle(inputs[0], hidden))
    assert ((net(inputs[0])[0] - before[0]).norm() / before[0].norm()) < 0.06
    net.rnn.flatten_parameters()
    restored = dequantize(net)
    assert type(restored.rnn) is KINDS[kind] and set(restored.state_dict()) == names
    assert_close(restored(inputs[0]), oracle(inputs[0]))
    restored.rnn.weight_ih_l0.zero_()
    assert not torch.equal(restored(inputs[0])[0], oracle(inputs[0])[0]), "it computes with its own weights"


def test_one_scale_a_weight():
    net = convert(Net("GRU", "one"), config(scale_method="maxabs_pow2"))
    assert net.rnn.weight_hh_l0_scale.shape == (1,)
    x = given(net)[0]
    assert_close(net(x), dequantize(copy.deepcopy(net))(x))


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_nothing_that_goes_in_is_rounded(scheme):
    model = nn.ModuleDict({"rnn": nn.LSTM(IN, HIDDEN, batch_first=True), "fc": nn.Linear(HIDDEN, 4)}).eval()
    x = torch.randn(N, LENGTH, IN)
    prepare(model, config(activation_scheme=scheme))
    model["fc"](model["rnn"](x)[0])
    convert(model)
    model["fc"](model["rnn"](x)[0])
    rows = {row.name: row for row in quantization_report(model).quantized}
    assert (rows["rnn"].activations, rows["fc"].activations) == ("weight_only", scheme)
    assert sum(rows["rnn"].kernels.values()) == 2 and rows["rnn"].weight_scale is not None
    assert quantization_report(model).size.in_fp8 == 4 * HIDDEN * (IN + HIDDEN) + 4 * HIDDEN


@pytest.mark.parametrize("kind, made", [("LSTM", "deep"), ("GRU", "batch first")])
def test_saved_and_loaded_to_the_bit(kind, made, tmp_path):
    net = convert(Net(kind, made), config())
    inputs = given(net)
    save(net, tmp_path / "fp8")
    for again in (load(tmp_path / "fp8", Net(kind, made)), load(tmp_path / "fp8", Net(kind, made).to("meta"))):
        for x in inputs:
            assert_equal(again(x), net(x))
    copied = copy.deepcopy(net)
    copied.load_state_dict(again.state_dict())
    assert_equal(copied(inputs[0]), net(inputs[0]))


def test_in_bfloat16_and_cast_later():
    net = convert(Net("LSTM", "one").bfloat16(), config())
    x = given(net)[0]
    assert net(x.bfloat16())[0].dtype is torch.bfloat16
    net.float()
    assert net(x)[0].dtype is torch.float32 and net.rnn.codes("weight_ih_l0").element_size() == 1
    with pytest.raises(ValueError, match="dtype"):
        net(x.bfloat16())


def test_dropout_between_layers_while_training():
    net = convert(Net("LSTM", "deep", dropout=0.5).train(), config())
    plain, x = dequantize(copy.deepcopy(net)), given(net)[0]
    torch.manual_seed(1)
    found = net(x)
    torch.manual_seed(1)
    assert_close(found, plain(x))
    assert not torch.equal(found[0], net.eval()(x)[0])


class Own(nn.LSTM):
    def forward(self, x):
        return super().forward(x)[0]


def test_what_stays_in_high_precision_and_why():
    model = nn.ModuleDict({"own": Own(4, 4), "rnn": nn.LSTM(4, 4), "fc": nn.Linear(4, 4)})
    convert(model, config(blocklist={"types": ["LSTM"]}))
    reasons = {row.name: row.reason for row in quantization_report(model).modules}
    assert reasons["own"] == "Own has a forward of its own" and reasons["rnn"] == "blocklist type 'LSTM'"
    broken = nn.Sequential(nn.LSTM(4, 4))
    broken[0].weight_hh_l0.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"0\.weight_hh_l0: .*NaN"):
        convert(broken, config())
    assert type(broken[0]) is nn.LSTM


def test_it_is_no_model_by_itself():
    with pytest.raises(ValueError, match="cannot replace itself"):
        convert(nn.LSTM(4, 4), config())
    assert isinstance(convert(nn.Sequential(nn.LSTM(4, 4)), config())[0], FP8Recurrent)


def test_from_pretrained_saved_and_loaded_to_the_bit(tmp_path):
    torch.manual_seed(0)
    sizes = {
        "num_filters": 4,
        "hidden_size": 16,
        "codebook_size": 16,
        "upsampling_ratios": [2, 2],
        "num_lstm_layers": 1,
    }
    sizes |= {"target_bandwidths": [24.0]}
    EncodecModel(EncodecConfig(**sizes)).eval().save_pretrained(tmp_path / "plain")
    model = EncodecModel.from_pretrained(tmp_path / "plain", quantization_config=config()).eval()
    x = torch.randn(1, 1, 200)
    expected = model(x).audio_values
    lstms = [row for row in quantization_report(model).quantized if row.type == "LSTM"]
    assert len(lstms) == 2 and all(sum(row.kernels.values()) for row in lstms)
    model.save_pretrained(tmp_path / "fp8")
    again = EncodecModel.from_pretrained(tmp_path / "fp8").eval()
    assert torch.equal(again(x).audio_values, expected)
    dequantize(again).save_pretrained(tmp_path / "again")
    last = EncodecModel.from_pretrained(tmp_path / "again").eval()
    torch.testing.assert_close(last(x).audio_values, expected, rtol=1e-2, atol=1e-3)


def test_padded_outputs_of_packed_sequences():
    net = convert(Net("GRU", "batch first"), config())
    packed = given(net)[2]
    found, lengths = pad_packed_sequence(net(packed)[0], batch_first=True)
    assert lengths.tolist() == [3, 5, 1] and not found[2, 1:].any()
