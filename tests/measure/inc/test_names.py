"""INC's names, optimum-habana's and vLLM's, and ours: both ways."""

from __future__ import annotations

import pytest
import torch
from gaudi_models import KVCache, Matmul, ModuleFusedSDPA, Softmax
from torch import nn

from optimum_fp8.measure.inc import IncMeasurements, Node, in_names_of, nodes_of, scaling_of, weights_that_differ
from optimum_fp8.measure.observers.maxabs import MaxAbs


def node(inputs=(), outputs=(), weight=None) -> Node:
    values = [tuple(torch.tensor([[float(value)]]) for value in each) or None for each in (inputs, outputs)]
    return Node(*values, None if weight is None else {"weight": torch.tensor([[float(weight)]])})


def ranges(model: nn.Module, nodes: dict[str, Node]) -> dict[str, float]:
    """What the names of a model make of INC's."""
    found = in_names_of(model, IncMeasurements("m", nodes).tensors()).tensors
    return {f"{name}/{kind}": observer.range().item() for (name, kind), observer in found.items()}


def tree(**children: nn.Module) -> nn.Module:
    return nn.ModuleDict(children)


class Attention(nn.Module):
    """As transformers' are: projections, and no module for an operation."""

    def __init__(self, scaling=0.25):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(4, 4) for _ in range(4))
        self.scaling = scaling


VLLM = {
    "self_attn.qkv_proj": node([3], weight=5),
    "self_attn.o_proj": node([2], [6, 7], weight=1),
    "self_attn.attn.impl.matmul_qk": node([1, 900]),
    "self_attn.attn.impl.softmax": node([50], [0.75]),
    "self_attn.attn.impl.matmul_av": node([0.5, 900]),
    "self_attn.attn.impl.batch2block_matmul": node([1, 900], [4]),
    "self_attn.attn.impl.k_cache": node([10]),
    "self_attn.attn.impl.v_cache": node([20]),
    "mlp.gate_up_proj": node([8], weight=9),
    "mlp.experts.moe_op": node([4], [3, 2, 1]),
    "mlp.experts.moe_op.w13_list.0": node([0], weight=2),
    "mlp.experts.moe_op.w2_list.0": node([0], weight=3),
}


def llama() -> nn.Module:
    mlp = tree(gate_proj=nn.Linear(4, 4), up_proj=nn.Linear(4, 4))
    return tree(self_attn=Attention(), mlp=mlp)


@pytest.mark.core
def test_vllms_names_for_a_model_of_transformers():
    found = ranges(llama(), VLLM)
    for part in "qkv":
        assert (found[f"self_attn.{part}_proj/input"], found[f"self_attn.{part}_proj/weight"]) == (3, 5)
    for part in ("gate", "up"):
        assert (found[f"mlp.{part}_proj/input"], found[f"mlp.{part}_proj/weight"]) == (8, 9)
    assert found["self_attn/q"] == 4, "vLLM measures the query times 0.25"
    assert found["self_attn/k"] == found["self_attn/k_cache"] == 10, "blocks without data do not count"
    assert found["self_attn/v"] == found["self_attn/v_cache"] == 20
    assert found["self_attn/p"] == 0.75 and found["self_attn/output"] == 2, "which is the input of o_proj"
    assert not [name for name in found if "qkv_proj" in name or "impl.matmul" in name]


def test_what_a_model_does_not_have_keeps_its_name_and_its_ranges():
    renamed = in_names_of(llama(), IncMeasurements("m", VLLM).tensors())
    assert renamed.foreign == [name for name in VLLM if "experts" in name or "batch2block" in name]
    again = nodes_of(renamed.tensors, vllm=True).nodes
    for name in renamed.foreign:
        assert repr(again[name]) == repr(VLLM[name])


@pytest.mark.core
def test_there_and_back_in_vllms_names():
    model = llama()
    again = nodes_of(
        in_names_of(model, IncMeasurements("m", VLLM).tensors()).tensors, vllm=True, scaling=scaling_of(model)
    )
    for name in (
        "self_attn.qkv_proj",
        "mlp.gate_up_proj",
        "self_attn.o_proj",
        *(f"self_attn.attn.impl.{kind}_cache" for kind in "kv"),
    ):
        assert repr(again.nodes[name]) == repr(VLLM[name]), name
    assert repr(again.nodes["self_attn.attn.impl.matmul_qk"]) == repr(node([1, 10])), "as INC's script makes of it"
    assert again.nodes["self_attn.attn.impl.fused_scaled_dot_product_attention"].inputs[0].item() == 4
    assert not again.left_out and not again.without_outputs
    assert not [name for name in again.nodes if name.endswith(("q_proj", "gate_proj"))]


def test_fused_attention_of_vllm():
    fused = {"self_attn.attn.impl.fused_scaled_dot_product_attention": node([6, 9, 5], [3, 0.9])}
    found = ranges(llama(), VLLM | fused)
    assert [found[f"self_attn/{kind}"] for kind in ("q", "k", "v", "output")] == [6, 10, 20, 3]
    alone = ranges(llama(), fused)
    assert [alone[f"self_attn/{kind}"] for kind in ("q", "k", "v", "output")] == [6, 9, 5, 3]
    assert "self_attn/k_cache" not in alone


def test_a_query_whose_factor_is_not_known_is_the_fused_kernels_where_there_is_one():
    model = tree(self_attn=Attention(scaling=None))
    fused = {"self_attn.attn.impl.fused_scaled_dot_product_attention": node([6, 9, 5], [3, 0.9])}
    assert ranges(model, VLLM | fused)["self_attn/q"] == 6
    assert ranges(model, VLLM)["self_attn/q"] == 1


def test_optimum_habanas_names_for_a_model_of_transformers():
    habana = {name.replace(".attn.impl", ""): said for name, said in VLLM.items() if ".attn.impl" in name}
    found = ranges(llama(), habana)
    assert found["self_attn/q"] == 1, "the query as it is"
    assert (found["self_attn/k"], found["self_attn/v"], found["self_attn/output"]) == (10, 20, 20), "at most the values"


@pytest.mark.core
def test_a_model_with_those_modules_has_them_measured_one_by_one():
    modules = {"matmul_qk": Matmul(), "matmul_av": Matmul(), "softmax": Softmax(), "k_cache": KVCache()}
    modules["fused_scaled_dot_product_attention"] = ModuleFusedSDPA(None)
    nodes = {
        "self_attn.matmul_qk": node([1, 2]),
        "self_attn.matmul_av": node([3, 4]),
        "self_attn.softmax": node([], [0.5]),
        "self_attn.k_cache": node([5]),
        "self_attn.fused_scaled_dot_product_attention": node([6, 7, 8], [9, 0.25]),
    }
    model = tree(self_attn=tree(**modules))
    assert ranges(model, nodes) == {
        "self_attn.matmul_qk/q": 1,
        "self_attn.matmul_qk/k": 2,
        "self_attn.matmul_av/q": 3,
        "self_attn.matmul_av/k": 4,
        "self_attn.softmax/p": 0.5,
        "self_attn.k_cache/input": 5,
        **{
            f"self_attn.fused_scaled_dot_product_attention/{kind}": value
            for kind, value in zip("qkv", (6, 7, 8), strict=True)
        },
        "self_attn.fused_scaled_dot_product_attention/output": 9,
        "self_attn.fused_scaled_dot_product_attention/p": 0.25,
    }
    found = in_names_of(model, IncMeasurements("m", nodes).tensors())
    again = nodes_of(found.tensors).nodes
    assert {name: [value.item() for value in said.inputs or ()] for name, said in again.items()} == {
        name: [value.item() for value in said.inputs or ()] for name, said in nodes.items()
    }
    assert again["self_attn.softmax"].outputs[0].item() == 0.5
    assert "self_attn.attn.impl.matmul_qk" in nodes_of(found.tensors, vllm=True).nodes


def test_a_model_that_has_fused_layers_itself_keeps_them():
    model = tree(self_attn=tree(qkv_proj=nn.Linear(4, 12)), mlp=tree(gate_up_proj=nn.Linear(4, 8)))
    found = ranges(model, VLLM)
    assert found["self_attn.qkv_proj/input"] == 3 and found["mlp.gate_up_proj/weight"] == 9
    assert not [name for name in found if "q_proj" in name.replace("qkv_proj", "") or "gate_proj" in name]


def test_the_parts_of_a_fused_layer_have_its_weight_together():
    model = llama()
    tensors = in_names_of(model, IncMeasurements("m", VLLM).tensors()).tensors
    there = {f"self_attn.{part}_proj": torch.tensor(value) for part, value in zip("qkv", (1.0, 5.0, 2.0), strict=True)}
    assert weights_that_differ(tensors, there.get) == {}
    there["self_attn.k_proj"] = torch.tensor(4.0)
    assert weights_that_differ(tensors, there.get) == {
        f"self_attn.{part}_proj": (5.0, there[f"self_attn.{part}_proj"].item()) for part in "qkv"
    }


def test_fused_layers_need_nothing_around_them():
    model = tree(q_proj=nn.Linear(4, 4), k_proj=nn.Linear(4, 4), v_proj=nn.Linear(4, 4))
    nodes = {"qkv_proj": node([3], weight=5)}
    tensors = in_names_of(model, IncMeasurements("m", nodes).tensors()).tensors
    assert {name for name, _ in tensors} == {"q_proj", "k_proj", "v_proj"}
    assert repr(nodes_of(tensors, vllm=True).nodes) == repr(nodes)
    assert weights_that_differ(tensors, {f"{part}_proj": torch.tensor(5.0) for part in "qkv"}.get) == {}


def test_what_has_no_place_in_incs_files_is_named():
    observed = MaxAbs.from_range(torch.tensor([[2.0]]), 0)
    tensors = {("attention", kind): observed for kind in ("q", "k", "v", "q2", "unseen")}
    made = nodes_of(tensors)
    assert made.left_out == ["attention/q2"] and set(made.nodes) == {
        f"attention.{op}" for op in ("matmul_qk", "matmul_av", "softmax", "k_cache", "v_cache")
    }


def test_layers_that_vllm_splits_by_rows_need_their_outputs():
    linear = {("o_proj", kind): MaxAbs.from_range(torch.tensor([[2.0]]), 0) for kind in ("input", "weight")}
    assert nodes_of(linear, vllm=True).without_outputs == ["o_proj"] and not nodes_of(linear).without_outputs
