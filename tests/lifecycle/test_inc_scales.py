"""Scale files of INC's from measurements: the very scales that INC wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config
from optimum_fp8.errors import FP8MeasurementError
from optimum_fp8.lifecycle.inc_scales import inc_scales, weights_of
from optimum_fp8.measure import read_inc
from optimum_fp8.measure.inc import SCALES, File, FileName, Node, nodes_of, write_file

DATA = Path(__file__).parents[1] / "data" / "inc"
FOLDERS = [
    "measured",
    *(f"measurements/{name}" for name in ("tiny_llama_maxabs_pow2", "with_outputs_measure_exclude_NONE")),
]


def config(method="maxabs_arbitrary", **options) -> FP8Config:
    return FP8Config(**{"scale_method": method, "target": "cpu", **options})


def node(*inputs: float, outputs=()) -> Node:
    return Node(*(tuple(torch.tensor([[float(value)]]) for value in each) or None for each in (inputs, outputs)))


@pytest.mark.core
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_files_that_inc_wrote(tmp_path, folder):
    inc = read_inc(DATA / folder)
    ((method, expected),) = inc.scales.items()
    scales = inc_scales(nodes_of(inc.tensors()).nodes, config(method))
    assert repr(scales) == repr(expected)
    name = FileName(str(tmp_path / "measure"), method=method)
    write_file(name, File(SCALES, scales))
    written = DATA / folder / f"measure_hooks_maxabs_{method}.json"
    assert Path(f"{name}.json").read_text() == written.read_text()


@pytest.mark.core
def test_scales_of_channels_need_the_weights():
    inc = read_inc(DATA / "measurements" / "pcs_weights")
    ((method, expected),) = inc.scales.items()
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).bfloat16()
    for place in (0, 2):  # weights whose channels have those scales
        channels = expected[str(place)].params["weight"][0]
        model[place].weight.data = torch.outer(channels * 224, torch.ones(model[place].in_features)).bfloat16()
    nodes = nodes_of(inc.tensors()).nodes
    assert repr(inc_scales(nodes, config(method), weights_of(model))) == repr(expected)
    with pytest.raises(FP8MeasurementError, match="0: the scale of its weight .* needs the weight: give the model"):
        inc_scales(nodes, config(method))


def test_weights_that_vllm_fuses_stand_below_each_other():
    model = nn.ModuleDict({part: nn.Linear(4, 2) for part in ("q_proj", "k_proj", "v_proj")})
    weight = weights_of(model)("qkv_proj")
    assert torch.equal(weight, torch.cat([module.weight for module in model.values()]))
    assert weights_of(model)("gate_up_proj") is None and weights_of(model)("other") is None


def test_operations_of_attention_and_experts():
    """What INC's classes of quantizers say of each type of module."""
    scales = inc_scales(
        {
            "a.matmul_qk": node(112, 224),
            "a.batch2block_matmul": node(112, 9000, outputs=[224]),
            "a.softmax": node(5, outputs=[112]),
            "a.k_cache": node(224, outputs=[300]),
            "a.fused_scaled_dot_product_attention": node(112, 224, 448, outputs=[56, 28]),
            "moe": node(112, outputs=[224, 448, 56]),
        },
        config(),
    )
    said = {
        name: [[value.item() for value in each] for each in (node.inputs, node.outputs)]
        for name, node in scales.items()
    }
    assert said == {
        "a.matmul_qk": [[1, 2], [2]],
        "a.batch2block_matmul": [[1, 2], [2]],
        "a.softmax": [[], [1]],
        "a.k_cache": [[2], [2]],
        "a.fused_scaled_dot_product_attention": [[1, 2, 4, 0.25], [0.5]],
        "moe": [[1, 4, 0.5], [2]],
    }
    assert all(node.params == {} for node in scales.values())


def test_layers_split_by_rows_scale_their_output_by_its_own_range():
    layer = Node(
        *((torch.tensor([[112.0]]), torch.tensor([[224.0]]))[:n] for n in (1, 2)), {"weight": torch.tensor([[224.0]])}
    )
    scales = inc_scales({"o_proj": layer}, config())["o_proj"]
    assert (scales.inputs[0].item(), scales.outputs[0].item(), scales.params["weight"].item()) == (1, 1, 1)


def test_overrides_and_targets_count():
    nodes = {"a": node(448), "b": node(448)}
    scales = inc_scales(nodes, config("maxabs_pow2", target="gaudi2", overrides={"^b$": {"input_backoff": 1.0}}))
    assert (scales["a"].inputs[0].item(), scales["b"].inputs[0].item()) == (8, 2)
