"""Layers that processes compute together: the same in all, and what one process computes with the whole weight."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import vllm_layers as vllm
from deepspeed_layers import Block
from ranks import succeed
from torch import nn

from optimum_fp8 import FP8Config, convert, dequantize, load, prepare, quantization_report, save
from optimum_fp8.errors import FP8ConfigError
from optimum_fp8.modules import FP8Linear, FP8LinearBase, part_of

PCS = "act_maxabs_pow2_weights_pcs_maxabs_pow2"

START = """
import copy
import torch
import torch.distributed as dist
from torch import nn
import deepspeed_layers as deepspeed
import vllm_layers as vllm
from optimum_fp8 import FP8Config, calibrate, convert, dequantize, finalize_calibration, load, prepare, save
from optimum_fp8.errors import FP8CheckpointError, FP8NotAvailableError
from optimum_fp8.formats import number_format
from optimum_fp8.modules import part_of

dist.init_process_group("gloo")
torch.set_grad_enabled(False)
torch.manual_seed(0)
PCS = "act_maxabs_pow2_weights_pcs_maxabs_pow2"
x = torch.randn(2, 3, 16)

def whole(make):
    "A model as one process makes it."
    functions = vllm.get_tensor_model_parallel_world_size, vllm.get_tensor_model_parallel_rank
    vllm.get_tensor_model_parallel_world_size, vllm.get_tensor_model_parallel_rank = lambda: 1, lambda: 0
    model = make()
    vllm.get_tensor_model_parallel_world_size, vllm.get_tensor_model_parallel_rank = functions
    return model

def converted(model, x=x, **options):
    prepare(model, FP8Config(**{"target": "cpu", **options}))
    model(x)
    return convert(model)

def same_everywhere(x):
    parts = [torch.empty_like(x) for _ in range(count)]
    dist.all_gather(parts, x.contiguous())
    return all(torch.equal(part, x) for part in parts)

def distance(x, y):
    return float((x - y).norm() / y.norm())
"""

LIKE_ONE = (
    START
    + """
# With one scale for all, nothing but the order of sums in float32 differs from one process.
fixed = {"scale_method": "unit_scale", "activation_scheme": "static"}
for options in ({}, {"bias": False}, {"skip_bias_add": True}, {"return_bias": False}):
    make = lambda: vllm.MLP(**options)
    one, many = converted(whole(make), **fixed), converted(make(), **fixed)
    vllm.CALLS.clear()
    found, expected = many(x), one(x)
    assert vllm.CALLS == [("all_reduce", (2, 3, 16))], vllm.CALLS
    if options.get("return_bias", True):
        (found, returned), (expected, expected_bias) = found, expected
        assert (returned is None) is (expected_bias is None) is ("skip_bias_add" not in options)
        assert returned is None or torch.equal(returned, expected_bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert same_everywhere(found)

# Calibrated scales: as near to high precision as one process, by tensor and by channel, dynamic as well.
for options in ({}, {"scale_method": PCS}, {"activation_scheme": "dynamic", "scale_method": "maxabs_pow2"}):
    expected = vllm.MLP()(x)[0]
    one, many = converted(whole(vllm.MLP), **options), converted(vllm.MLP(), **options)
    assert 0 < distance(many(x)[0], expected) < 1.2 * distance(one(x)[0], expected) < 0.08
    assert same_everywhere(many(x)[0]) and part_of(many) == (rank, count) and part_of(one) is None
    if options.get("scale_method") == PCS:
        assert many.up.weight_scale.shape == (64 // count, 1) and many.down.weight_scale.shape == (16, 1)
    if not options.get("activation_scheme"):
        assert torch.equal(many.up.input_scale, one.up.input_scale)
        assert same_everywhere(many.down.input_scale) and many.down.partial_scale is None

# An input that is not split yet, outputs side by side, and results that others add up.
weight, bias, wide = torch.randn(16, 32), torch.randn(16), torch.randn(2, 3, 32)

def single(make, x):
    return converted(nn.Sequential(make()), x, **fixed)

for make in (
    lambda: vllm.RowParallelLinear(weight, bias, input_is_parallel=False, return_bias=False),
    lambda: vllm.HPURowParallelLinear(weight, bias, input_is_parallel=False, return_bias=False),
    lambda: vllm.ColumnParallelLinear(weight, bias, gather_output=True, return_bias=False),
    lambda: vllm.ReplicatedLinear(weight, bias, return_bias=False),
):
    found, expected = single(make, wide)(wide), single(lambda: whole(make), wide)(wide)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert same_everywhere(found)
make = lambda: vllm.RowParallelLinear(
    weight, bias, input_is_parallel=False, reduce_results=False, return_bias=False
)
found = single(make, wide)(wide)
dist.all_reduce(found)
torch.testing.assert_close(found, single(lambda: whole(make), wide)(wide), rtol=1e-5, atol=1e-4)

for mlp_bias in (None, torch.randn(24)):  # of the head
    head = vllm.ParallelLMHead(torch.randn(24, 16, generator=torch.Generator().manual_seed(1)))
    model = nn.ModuleDict({"lm_head": head})
    prepare(model, FP8Config(target="cpu", **fixed))
    part = None if mlp_bias is None else mlp_bias.chunk(count)[rank]
    vllm.LogitsProcessor()(model.lm_head, x, part)
    logits = vllm.tensor_model_parallel_all_gather(vllm.LogitsProcessor()(convert(model).lm_head, x, part))
    alone = nn.ModuleDict({"lm_head": whole(lambda: vllm.ParallelLMHead(
        torch.randn(24, 16, generator=torch.Generator().manual_seed(1))))})
    convert(alone, FP8Config(target="cpu", **fixed))
    torch.testing.assert_close(logits, vllm.LogitsProcessor()(alone.lm_head, x, mlp_bias), rtol=1e-5, atol=1e-5)

group = dist.new_group()
assert part_of(deepspeed.Block(group)) == (rank, count)
one, many = converted(deepspeed.Block(), **fixed), converted(deepspeed.Block(group), **fixed)
deepspeed.CALLS.clear()
torch.testing.assert_close(many(x), one(x), rtol=1e-5, atol=1e-4)
assert deepspeed.CALLS == [(2, 3, 16), (2, 3, 16), (2, 3, 12)] and same_everywhere(many(x))
assert torch.equal(copy.deepcopy(many)(x), many(x))
assert many.down.weight_shape == (16, 13)
"""
)


@pytest.mark.slow
def test_processes_compute_what_one_does(tmp_path):
    succeed(LIKE_ONE, 2, tmp_path)


IN_FP8 = (
    START
    + """
def decoded(model, x):
    return torch.cat([model(x[:, step : step + 1])[0] for step in range(x.shape[1])], dim=1)

key = {"row_parallel_linear_allreduce_quantization": True}
for options in (
    {}, {"fp8_config": "E5M2", "target": "gaudi2", "dtype": torch.bfloat16}, {"scale_method": "maxabs_arbitrary"}
):
    dtype = options.pop("dtype", torch.float32)
    given = x.to(dtype)
    model = vllm.MLP(dtype=dtype)
    expected = model(given)[0]
    prepare(model, FP8Config(**{"target": "cpu", "dump_stats_path": "measure", **key, **options}))
    seen = model(given)[0]
    assert distance(seen.float(), expected.float()) < 4 * torch.finfo(dtype).eps
    hidden = torch.nn.functional.silu(model.up(given)[0].chunk(2, -1)[0]) * model.up(given)[0].chunk(2, -1)[1]
    partial = hidden @ model.down.weight.T
    total = vllm.tensor_model_parallel_all_reduce(partial)
    largest = partial.abs().amax().float()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    measured = finalize_calibration(model)
    assert same_everywhere(torch.frombuffer(bytearray(measured.encoded()), dtype=torch.uint8))
    assert measured.range("down", "output").item() == largest.item()
    assert measured.range("down", "output2").item() == total.abs().amax().float().item()
    weight = model.down.weight.abs().amax().float()
    dist.all_reduce(weight, dist.ReduceOp.MAX)
    assert measured.range("down", "weight").item() == weight.item()
    convert(model)
    down, fmt = model.down, number_format(options.get("fp8_config", "E4M3"), options.get("target", "cpu"))
    for scale, kind in ((down.partial_scale, "output"), (down.output_scale, "output2")):
        target = down.scheme.static_scale(measured.range("down", kind))
        assert torch.equal(scale, target) and same_everywhere(scale) and scale.dtype == torch.float32
    if "scale_method" in options:
        assert not torch.equal(down.partial_scale, down.output_scale), "the data must tell them apart"
    vllm.CALLS.clear()
    prefill = model(given)[0]
    assert vllm.CALLS == [("all_reduce", (2, 3, 16))]
    vllm.CALLS.clear()
    steps = decoded(model, given)
    assert vllm.CALLS == [] and same_everywhere(steps) and steps.dtype == dtype
    step = 2.0 ** (-4 if fmt.name == "E4M3" else -3)
    assert 0 < distance(steps, prefill) < 2 * step
    bias = model.down.bias.clone()
    model.down.bias.data.zero_()
    sums = decoded(model, given)
    torch.testing.assert_close(sums + bias, steps)
    codes = (sums.float() / down.output_scale).to(fmt.dtype).float()
    torch.testing.assert_close(codes * down.output_scale, sums.float(), rtol=1e-6, atol=0)
    model.down.bias.data.copy_(bias)
    flat = model(given[:, :1].reshape(2, 16))[0]
    assert vllm.CALLS == [("all_reduce", (2, 16))], "two dimensions tell no length"
    folder = f"checkpoint{rank}_{dtype}_{options.get('scale_method', fmt.name)}"
    save(model, folder)
    again = load(folder, vllm.MLP(dtype=dtype, seed=1))
    assert torch.equal(decoded(again, given), steps) and again.down.partial_scale.equal(down.partial_scale)
    if dtype == torch.bfloat16:
        try:
            load(folder.replace(f"checkpoint{rank}", f"checkpoint{1 - rank}"), vllm.MLP(dtype=dtype))
        except FP8CheckpointError as error:
            assert f"rank {1 - rank} of 2" in str(error) and f"rank {rank} of 2" in str(error), error
        else:
            raise AssertionError("of another rank")
        dist.barrier()
        try:
            load(folder, whole(lambda: vllm.MLP(dtype=dtype)))
        except FP8CheckpointError as error:
            assert "a process that holds it all" in str(error), error
        else:
            raise AssertionError("of a part")
    if not options and dtype == torch.float32:  # what one run has measured serves another
        stored = convert(vllm.MLP(), FP8Config(target="cpu", mode="QUANTIZE", dump_stats_path="measure", **key))
        assert torch.equal(decoded(stored, given), steps)
        for chip in ("gaudi2", "gaudi3"):
            on_card = load(folder, vllm.MLP(seed=1), target=chip)
            for scale, kind in ((on_card.down.partial_scale, "output"), (on_card.down.output_scale, "output2")):
                assert torch.equal(scale, on_card.down.scheme.static_scale(measured.range("down", kind))), (chip, kind)
            assert not torch.equal(on_card.down.partial_scale, down.partial_scale) or chip == "gaudi3"
            assert distance(decoded(on_card, given), prefill) < 2 * step
        other = load(folder, vllm.MLP(seed=1))
        assert other.load_state_dict(model.state_dict()) and torch.equal(decoded(other, given), steps)
    dequantize(model)
    assert type(model.down) is vllm.RowParallelLinear and distance(model(given)[0], expected) < 0.1

group = dist.new_group()
model = converted(deepspeed.Block(group), target="cpu", **key)
assert model.down.partial_scale is not None and not hasattr(model.scoped, "partial_scale")
assert model.head.partial_scale is None
deepspeed.CALLS.clear()
assert same_everywhere(model(x[:, :1]))
assert deepspeed.CALLS == [(2, 1, 16), (2, 1, 12)], "all but LinearAllreduce in high precision"

model = prepare(vllm.MLP(), FP8Config(target="cpu", dataset=[{"x": x}] * 3))
try:
    calibrate(model)
except FP8NotAvailableError as error:
    assert "split over processes" in str(error), error
else:
    raise AssertionError("shares of the data")
"""
)


def test_an_all_reduce_in_fp8_of_new_tokens(tmp_path):
    succeed(IN_FP8, 2, tmp_path)


def test_a_model_that_is_not_split_has_no_such_scales():
    model = prepare(vllm.MLP(), FP8Config(target="cpu", row_parallel_linear_allreduce_quantization=True))
    x = torch.randn(2, 1, 16)
    expected = model(x)[0]
    convert(model)
    assert model.down.partial_scale is None and set(model.down.scales()) == {"weight_scale", "input_scale"}
    assert (model(x)[0] - expected).norm() < 0.08 * expected.norm() and part_of(model) is None
    assert "all-reduce" not in str(quantization_report(model))


@pytest.mark.parametrize("scheme", ["dynamic", "weight_only"])
def test_sums_in_fp8_need_ranges(scheme):
    with pytest.raises(FP8ConfigError, match=f"needs calibrated ranges, but activations are {scheme!r}"):
        FP8Config(row_parallel_linear_allreduce_quantization=True, activation_scheme=scheme)
    with pytest.raises(FP8ConfigError, match="needs calibrated ranges"):
        FP8Config(
            row_parallel_linear_allreduce_quantization=True, dynamic_quantization=True, scale_method="maxabs_pow2"
        )


def test_without_data_a_sum_in_fp8_is_refused():
    with pytest.raises(FP8ConfigError, match="needs calibrated ranges"):
        convert(vllm.MLP(), FP8Config(target="cpu", row_parallel_linear_allreduce_quantization=True))


@torch.no_grad()
@pytest.mark.parametrize("make", [vllm.MLP, Block])
@pytest.mark.parametrize("method", ["maxabs_hw", PCS])
@pytest.mark.parametrize("scheme", ["static", "dynamic", "weight_only"])
@pytest.mark.parametrize("target", ["cpu", "gaudi2"])
def test_alone_they_compute_what_linear_layers_do(make, method, scheme, target, tmp_path):
    method = "maxabs_pow2" if (scheme, method) == ("dynamic", "maxabs_hw") else method
    options = {"target": target, "scale_method": method, "activation_scheme": scheme}
    model, x = make(), torch.randn(2, 3, 16)
    layers = {name: module for name, module in model.named_modules() if not module._modules}
    seen: dict[str, torch.Tensor] = {}

    def keep(layer, args, name):
        seen[name] = args[0]

    hooks = [layer.register_forward_pre_hook(partial(keep, name=name)) for name, layer in layers.items()]
    model(x)
    for hook in hooks:
        hook.remove()
    twins = {}
    for name, layer in layers.items():
        twin = nn.Linear(layer.weight.shape[1], layer.weight.shape[0])
        twin.weight = nn.Parameter(layer.weight.clone())
        scoped = type(layer).__name__ == "ScopedLinearAllReduce"
        twin.bias = None if layer.bias is None or scoped else nn.Parameter(layer.bias.clone())
        twins[name] = prepare(nn.Sequential(twin), FP8Config(**options))
        twins[name](seen[name])
        convert(twins[name])
    convert_measured(model, x, options)
    for name, twin in twins.items():
        layer, given = model.get_submodule(name), seen[name]
        output = layer(given)
        assert torch.equal(output[0] if isinstance(output, tuple) else output, twin(given)), name
        assert isinstance(layer, FP8LinearBase) and torch.equal(layer.codes, twin[0].codes)
    report = quantization_report(model)
    assert all(row.quantized for row in report.modules) and len(report.modules) == len(twins)
    before = model(x)
    save(model, tmp_path / "saved")
    loaded = load(tmp_path / "saved", make(seed=1))
    torch.testing.assert_close(loaded(x), before, rtol=0, atol=0)
    dequantize(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in make().modules()]


def convert_measured(model, x, options):
    prepare(model, FP8Config(**options))
    model(x)
    return convert(model)


def test_measuring_leaves_no_trace():
    model, x = vllm.MLP(), torch.randn(2, 3, 16)
    expected = model(x)[0]
    prepare(model, FP8Config(target="cpu", measure_exclude="NONE"))
    assert torch.equal(model(x)[0], expected) and "forward" in vars(model.down)
    dequantize(model)
    assert "forward" not in vars(model.down) and torch.equal(model(x)[0], expected)


def test_outputs_of_layers_split_by_rows_are_always_measured():
    for exclude in ("OUTPUT", "NONE"):
        model, x = vllm.MLP(), torch.randn(2, 3, 16)
        prepare(model, FP8Config(target="cpu", measure_exclude=exclude))
        measurements = model._optimum_fp8_state.measurements
        output = model(x)[0]
        product = (output - model.down.bias).abs().amax()
        for kind in ("output", "output2"):
            torch.testing.assert_close(measurements.range("down", kind), product)
        up = measurements.range("up", "output")
        assert (up is None) is (exclude == "OUTPUT")
        assert up is None or torch.equal(up, model.up(x)[0].abs().amax())


class LinearLayer(nn.Module):
    """Of nobody's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, input):
        return input * self.weight[0]


class RowParallelLinear(nn.Module):
    """Of some other library's."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, input_):
        return input_ @ self.weight


class OwnForward(vllm.RowParallelLinear):
    def forward(self, input_):
        return super().forward(input_ * 2)


class SeveralArguments(vllm.LinearBase):
    def forward(self, input_, skip_all_reduce=False):
        return self.quant_method.apply(self, input_)


SeveralArguments.__name__ = "RowParallelLinear"
WEIGHT = torch.randn(4, 4)


@pytest.mark.parametrize(
    "layer, reason",
    [
        (LinearLayer(), "it has no mp_group"),
        (RowParallelLinear(), "it has no quant_method"),
        (OwnForward(WEIGHT), "has a forward of its own"),
        (SeveralArguments(WEIGHT), "other arguments than an input: self, input_, skip_all_reduce"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_only_has_the_name_stays_in_high_precision(layer, reason):
    model = nn.Sequential(layer, nn.Linear(4, 4))
    x = torch.randn(2, 4)
    expected = layer(x)
    convert(model, FP8Config(target="cpu", activation_scheme="dynamic", scale_method="maxabs_pow2"))
    assert model[0] is layer and torch.equal(model[0](x)[0], expected[0])
    assert reason in quantization_report(model).modules[0].reason


def test_a_linear_of_such_a_name_is_a_linear():
    class LinearLayer(nn.Linear):
        pass

    model = convert(nn.Sequential(LinearLayer(4, 4)), FP8Config(target="cpu", activation_scheme="weight_only"))
    assert type(model[0]) is FP8Linear


@pytest.mark.parametrize("key", ["allowlist", "blocklist"])
def test_lists_name_them(key):
    model = vllm.MLP()
    config = FP8Config(target="cpu", activation_scheme="weight_only", **{key: {"types": ["RowParallelLinear"]}})
    convert(model, config)
    assert isinstance(model.down, FP8LinearBase) is (key == "allowlist")
    assert isinstance(model.up, FP8LinearBase) is (key == "blocklist")
