"""Layers that processes compute together on an emulated Gaudi: what each is asked to compute, and in which order."""

from __future__ import annotations

import pytest
from ranks import succeed

ON_GAUDI = """
import torch
import torch.distributed as dist
import vllm_layers as vllm
from optimum_fp8 import FP8Config, convert, ops, prepare
from optimum_fp8.test_utils import gaudi

chip = {chip!r}
dist.init_process_group("gloo")
torch.set_grad_enabled(False)
torch.manual_seed(0)
x = torch.randn(2, 3, 16).bfloat16()
key = {{"row_parallel_linear_allreduce_quantization": True}}

def converted():
    model = prepare(vllm.MLP(dtype=torch.bfloat16), FP8Config(target=chip, **key))
    model(x)
    return convert(model)

def distance(x, y):
    return float((x.float() - y.float()).norm() / y.float().norm())

model = converted()
prefill, token = model(x)[0], model(x[:, :1])[0]
order = []
reduce = vllm.tensor_model_parallel_all_reduce

def watched(y):
    order.append(("sum", y.dtype, len(device.calls)))
    return reduce(y)

with gaudi.emulated(chip) as device, ops.backend("hpu"):
    packed = converted()
    vllm.tensor_model_parallel_all_reduce = watched
    device.calls.clear()
    found = packed(x)[0]
    calls = list(device.calls)
    device.calls.clear()
    new = packed(x[:, :1])[0]
    decoding = list(device.calls)

# The product of the last layer has no bias, and is added up in bfloat16 after it was taken.
gemms = [call for call in calls if call.name == "fp8_gemm_v2"]
assert len(gemms) == 2 and all(call.arguments["bias"] is None for call in gemms)
assert all(call.arguments["out_dtype"] == torch.bfloat16 and call.free_scales for call in gemms)
assert order == [("sum", torch.bfloat16, len(calls))] and calls[-1].name == "fp8_gemm_v2"

# Of a new token: product, codes of the result; codes of all to values, their sum to codes, codes to the output.
after = decoding[[call.name for call in decoding].index("fp8_gemm_v2") + 1 :]
names = [call.name for call in after]
last = names.index("fp8_gemm_v2")
assert names[last + 1 :] == ["cast_to_fp8_v2", "cast_from_fp8", "cast_to_fp8_v2", "cast_from_fp8"], names
assert all(call.overload == "scalar" and call.free_scales for call in after[last + 1 :]), "constants, at no cost"
partial, total = packed.down.partial_scale.item(), packed.down.output_scale.item()
values = [next(iter(call.scales.values()))[0].values[0] for call in after[last + 1 :]]
assert values == [1 / partial, partial, 1 / total, total], "1/s to quantize, s to dequantize"
assert len(order) == 1, "no sum in high precision"

# What the reference computes, up to one unit in the last place of bfloat16 where sums end elsewhere.
for mine, theirs in ((found, prefill), (new, token)):
    assert mine.dtype == torch.bfloat16 and distance(mine, theirs) < 2.0 ** -8
    everywhere = [torch.empty_like(mine) for _ in range(count)]
    dist.all_gather(everywhere, mine)
    assert all(torch.equal(other, mine) for other in everywhere)
assert torch.equal(packed.down.codes.float(), model.down.codes.float())
assert all("scale" in name for name, tensor in packed.state_dict().items() if tensor.dtype == torch.float32)
"""


@pytest.mark.parametrize("chip", ["gaudi2", pytest.param("gaudi3", marks=pytest.mark.slow)])
def test_two_processes_on_an_emulated_gaudi(chip, tmp_path):
    succeed(ON_GAUDI.format(chip=chip), 2, tmp_path)
