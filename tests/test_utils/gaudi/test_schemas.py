"""The schemas of the emulated operators, against the catalogue of the bridge's operators."""

import pytest
import torch

from optimum_fp8.test_utils import gaudi
from optimum_fp8.test_utils.gaudi.schemas import SCHEMAS

CAST = "bool stochastic_rounding=False, bool is_amax=False, ScalarType dtype=None, int[]? scale_shape=None"
GEMM = "Tensor A, bool trans_A, Tensor B, bool trans_B, Tensor? D, ScalarType out_dtype"
GEMM_END = "Tensor? bias=None, bool accumulate=False, int[]? B_scale_shape=None"
CONV = (
    "Tensor input, Tensor weight, Tensor? bias=None, SymInt[2] stride=[1, 1], SymInt[2] padding=[0, 0], "
    "SymInt[2] dilation=[1, 1], int groups=1, ScalarType? out_dtype=None"
)
COMMON = {
    "cast_to_fp8_v2": f"Tensor input, Tensor? scale=None, {CAST}",
    "cast_to_fp8_v2.scalar": f"Tensor input, float scale, {CAST}",
    "cast_to_fp8_v2.scalar_list": f"Tensor input, float[] scale, {CAST}",
    "cast_from_fp8": "Tensor input, Tensor? scale, ScalarType out_dtype, int[]? scale_shape=None",
    "cast_from_fp8.scalar": "Tensor input, float scale, ScalarType out_dtype, int[]? scale_shape=None",
    "cast_from_fp8.scalar_list": "Tensor input, float[] scale, ScalarType out_dtype, int[]? scale_shape=None",
    "cast_to_fp8_hybrid": "Tensor input, Tensor? scale_152=None, Tensor? scale_143=None, "
    "bool stochastic_rounding=False, bool is_amax=False",
    "fp8_gemm_v2": f"{GEMM}, Tensor? A_scale_inv=None, Tensor? B_scale_inv=None, {GEMM_END}",
    "fp8_gemm_v2.scalar": f"{GEMM}, float A_scale_inv, float B_scale_inv, {GEMM_END}",
    "fp8_gemm_v2.scalar_list": f"{GEMM}, float[] A_scale_inv, float[] B_scale_inv, {GEMM_END}",
    "fp8_gemm": "Tensor A, bool trans_A, Tensor B, bool trans_B, Tensor D, ScalarType out_dtype, Tensor? A_scale_inv, "
    "Tensor? B_scale_inv, Tensor? bias, bool accumulate, Tensor(a!) out",
    "conv2d_fp8": f"{CONV}, Tensor? scale_input=None, Tensor? scale_weight=None",
    "conv2d_fp8.scalar": f"{CONV}, float scale_input=1., float scale_weight=1.",
    "softmax_fp8": "Tensor input, int dim, Tensor? input_scale=None, Tensor? output_scale=None, "
    "Tensor? inv_attn_heads=None, Tensor? fused_add=None",
    "softmax_fp8.Scalar_scales": "Tensor input, int dim, float input_scale, float output_scale, "
    "Tensor? inv_attn_heads=None, Tensor? fused_add=None",
    "softmax_fp8.Scalar": "Tensor input, int dim, float input_scale, float output_scale, float inv_attn_heads, "
    "Tensor? fused_add=None",
    "sum_fp8": "Tensor self, int[1]? dim=None, bool keepdim=False, ScalarType? out_dtype=None",
    "kv_reorder_": "Tensor(a!) self, Tensor start, Tensor end, Tensor beam_idx",
    "kv_reorder": "Tensor self, Tensor start, Tensor end, Tensor beam_idx",
    "in_place_interleave_": "Tensor(a!) self",
    "in_place_interleave": "Tensor self",
    "fp8_sdpa_fwd": "Tensor q, Tensor k, Tensor v, Tensor? attention_mask, float p, float scale, bool is_causal, "
    "str softmax_mode, Tensor? d_scale_q, Tensor? d_scale_k, Tensor? d_scale_v, Tensor? q_scale_s, Tensor? q_scale_o, "
    "Tensor? d_scale_s, bool is_amax_s, Tensor? valid_seq_len, str seq_padding_type",
}
RECOMPUTE = (
    "Tensor q, Tensor k, Tensor v, Tensor? attention_mask, float p, float scale, bool is_causal, "
    "bool requires_backward, str softmax_mode, {0} d_scale_q, {0} d_scale_k, {0} d_scale_v, {0} q_scale_s, "
    "{0} q_scale_o, {0} d_scale_s, bool is_amax_s, bool {1}, Tensor? valid_seq_len, str seq_padding_type"
)
SDPA = (
    "Tensor q, Tensor k, Tensor v, Tensor? attention_mask, float p, float scale, bool is_causal, "
    "bool requires_backward, str softmax_mode, Tensor? valid_seq_len, str seq_padding_type"
)
WINDOW = ", int[] window_size, Tensor? sinks"
ROUTED = "Tensor hidden_states, Tensor expert_routing_table, Tensor router_weights"
APART, FUSED = "Tensor[] w1, Tensor[] w2, Tensor[] w3", "Tensor[] w12, Tensor[] w3"
EXPERTS = "bool permuted_weights, str activation, int experts_min, int experts_max"
CHUNKS = "int chunk_size=0, int total_experts=0"
HIDDEN = "{0} d_scale_hidden_states"
MIDDLE = "{0}[] d_scale_intermediate_hidden_states"
SCALES_APART = "{0}[] d_scale_w1, {0}[] d_scale_w2, {0}[] d_scale_w3"
SCALES_FUSED = "{0}[] d_scale_w12, {0}[] d_scale_w3"
BIASED = f"{ROUTED}, {FUSED}, Tensor[] w12_bias, Tensor[] w3_bias"
BIAS_EXPERTS = "bool permuted_weights, int experts_min, int experts_max"
BIAS_END = f"{CHUNKS}, float alpha=1.702, float limit=7."


def static(weights, scales, tensor):
    return f"{ROUTED}, {weights}, {HIDDEN}, {MIDDLE}, {scales}, {EXPERTS}, *, {CHUNKS}".format(tensor)


def dynamic(weights, scales, tensor):
    return f"{ROUTED}, {weights}, {HIDDEN}, {scales}, {EXPERTS}, *, {CHUNKS}".format(tensor)


MOE = "mixture_of_experts"
CATALOGUE = {
    "1.19": COMMON
    | {
        "fp8_sdpa_recomp_fwd": RECOMPUTE.format("Tensor?", "is_amax_0"),
        "fp8_sdpa_recomp_fwd.scalar": RECOMPUTE.format("float", "is_amax_0"),
        "sdpa_recomp_fwd": SDPA,
        MOE: f"{ROUTED}, {APART}, {EXPERTS}",
        f"{MOE}.fused_weights": f"{ROUTED}, {FUSED}, {EXPERTS}",
    },
    "1.24": COMMON
    | {
        "fp8_sdpa_recomp_fwd": RECOMPUTE.format("Tensor?", "is_amax_o") + WINDOW,
        "fp8_sdpa_recomp_fwd.scalar": RECOMPUTE.format("float", "is_amax_o") + WINDOW,
        "sdpa_recomp_fwd": SDPA + WINDOW,
        "calculate_scale_for_cast": "Tensor input, int maxMode, int scaleMode, int reduceAxis=0, "
        "bool reduceKeepdim=False, float fullscale=1., float backoff=1.",
        "cast_to_fp8_just_in_time": "Tensor input, int[2] block_shape, *, ScalarType? out_dtype=None, "
        "ScalarType? scale_dtype=None",
        MOE: f"{ROUTED}, {APART}, {EXPERTS}, *, bool? recomp=True, {CHUNKS}",
        f"{MOE}.fused_weights": f"{ROUTED}, {FUSED}, {EXPERTS}, *, bool? recomp=True, {CHUNKS}",
        f"{MOE}.fp8_measurement": f"{ROUTED}, {APART}, {EXPERTS}, bool measurement_mode, *, {CHUNKS}",
        f"{MOE}.fp8_measurement_fused_weights": f"{ROUTED}, {FUSED}, {EXPERTS}, bool measurement_mode, *, {CHUNKS}",
        f"{MOE}.fp8": static(APART, SCALES_APART, "Tensor"),
        f"{MOE}.fp8_scalars": static(APART, SCALES_APART, "float"),
        f"{MOE}.fp8_fused_weights": static(FUSED, SCALES_FUSED, "Tensor"),
        f"{MOE}.fp8_fused_weights_scalars": static(FUSED, SCALES_FUSED, "float"),
        f"{MOE}.fp8_dynamic": dynamic(APART, SCALES_APART, "Tensor"),
        f"{MOE}.fp8_scalars_dynamic": dynamic(APART, SCALES_APART, "float"),
        f"{MOE}.fp8_fused_weights_dynamic": dynamic(FUSED, SCALES_FUSED, "Tensor"),
        f"{MOE}.fp8_fused_weights_scalars_dynamic": dynamic(FUSED, SCALES_FUSED, "float"),
        f"{MOE}.fp8_blockwise": f"{ROUTED}, {APART}, {SCALES_APART}, int block_size, {EXPERTS}, *, {CHUNKS}".format(
            "Tensor"
        ),
        f"{MOE}.fp8_fused_weights_blockwise": (
            f"{ROUTED}, {FUSED}, {SCALES_FUSED}, int block_size, {EXPERTS}, *, {CHUNKS}"
        ).format("Tensor"),
        f"{MOE}.bias_fused_weights": f"{BIASED}, *, {BIAS_EXPERTS}, {BIAS_END}",
        f"{MOE}.measurement_bias_fused_weights": f"{BIASED}, *, {BIAS_EXPERTS}, bool measure_per_token, {BIAS_END}",
        **{
            f"{MOE}.bias_fp8_fused_weights{suffix}": (
                f"{BIASED}, {HIDDEN}, {MIDDLE}, {SCALES_FUSED}, *, {BIAS_EXPERTS}, {BIAS_END}"
            ).format(tensor)
            for suffix, tensor in (("", "Tensor"), ("_scalars", "float"))
        },
    },
}
RETURNS = {
    "cast_to_fp8_v2": 2,
    "cast_to_fp8_hybrid": 3,
    "cast_to_fp8_just_in_time": 2,
    "fp8_sdpa_fwd": 4,
    "sdpa_recomp_fwd": 4,
    "fp8_sdpa_recomp_fwd": 6,
}


def registered():
    """The schemas of all overloads there are, by name."""
    packets = [name for name in torch.ops.hpu._dir]
    overloads = [getattr(getattr(torch.ops.hpu, p), o) for p in packets for o in getattr(torch.ops.hpu, p).overloads()]
    schemas = [str(overload._schema).removeprefix("hpu::").partition(" -> ") for overload in overloads]
    return {schema.partition("(")[0]: (schema.partition("(")[2][:-1], returns) for schema, _, returns in schemas}


@pytest.mark.core
@pytest.mark.parametrize("bridge", gaudi.BRIDGES)
def test_schemas_are_those_of_the_catalogue(bridge):
    with gaudi.emulated("gaudi2", bridge=bridge):
        for schema in SCHEMAS[bridge]:
            getattr(torch.ops.hpu, schema.partition("(")[0].partition(".")[0])
        found = registered()
    assert {name: arguments for name, (arguments, _) in found.items()} == CATALOGUE[bridge]
    for name, (_, returns) in found.items():
        measuring = "measurement" in name
        count = 2 if measuring else RETURNS.get(name.partition(".")[0], 1)
        assert returns.count("Tensor") == count, name


def test_newer_operators_can_be_told_by_asking():
    for bridge, has in (("1.19", False), ("1.24", True)):
        with gaudi.emulated("gaudi3", bridge=bridge):
            assert hasattr(torch.ops.hpu, "calculate_scale_for_cast") == has
            assert hasattr(torch.ops.hpu, "cast_to_fp8_just_in_time") == has
            assert hasattr(torch.ops.hpu.mixture_of_experts, "fp8_fused_weights") == has
            assert hasattr(torch.ops.hpu, "fp8_gemm_v2")
