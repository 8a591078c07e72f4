"""The schemas that the PyTorch bridge registers as `torch.ops.hpu`, in the generations that are emulated.

Bridge 1.19 is what was published with that release. 1.24 has what came since: attention with a sliding window and
sinks, experts in FP8, scales that are computed by an operator.
"""

from __future__ import annotations

from .device import BRIDGES

_CAST = "bool stochastic_rounding=False, bool is_amax=False, ScalarType dtype=None, int[]? scale_shape=None"
_GEMM = "Tensor A, bool trans_A, Tensor B, bool trans_B"
_GEMM_V2 = f"{_GEMM}, Tensor? D, ScalarType out_dtype"
_GEMM_REST = "Tensor? bias=None, bool accumulate=False, int[]? B_scale_shape=None"
_CONV = (
    "Tensor input, Tensor weight, Tensor? bias=None, SymInt[2] stride=1, SymInt[2] padding=0, SymInt[2] dilation=1, "
    "int groups=1, ScalarType? out_dtype=None"
)
_CACHE = "Tensor start, Tensor end, Tensor beam_idx"


def _sdpa_scales(kind: str) -> str:
    names = ("d_scale_q", "d_scale_k", "d_scale_v", "q_scale_s", "q_scale_o", "d_scale_s")
    return ", ".join(f"{kind} {name}" for name in names)


_QKV = "Tensor q, Tensor k, Tensor v, Tensor? attention_mask, float p, float scale, bool is_causal"
_LENGTHS = "Tensor? valid_seq_len, str seq_padding_type"
_SIX, _FOUR = f"({', '.join(['Tensor'] * 6)})", f"({', '.join(['Tensor'] * 4)})"

_ALWAYS = (
    f"cast_to_fp8_v2(Tensor input, Tensor? scale=None, {_CAST}) -> (Tensor, Tensor)",
    f"cast_to_fp8_v2.scalar(Tensor input, float scale, {_CAST}) -> (Tensor, Tensor)",
    f"cast_to_fp8_v2.scalar_list(Tensor input, float[] scale, {_CAST}) -> (Tensor, Tensor)",
    "cast_to_fp8_hybrid(Tensor input, Tensor? scale_152=None, Tensor? scale_143=None, bool stochastic_rounding=False, "
    "bool is_amax=False) -> (Tensor, Tensor, Tensor)",
    "cast_from_fp8(Tensor input, Tensor? scale, ScalarType out_dtype, int[]? scale_shape=None) -> Tensor",
    "cast_from_fp8.scalar(Tensor input, float scale, ScalarType out_dtype, int[]? scale_shape=None) -> Tensor",
    "cast_from_fp8.scalar_list(Tensor input, float[] scale, ScalarType out_dtype, int[]? scale_shape=None) -> Tensor",
    f"fp8_gemm({_GEMM}, Tensor D, ScalarType out_dtype, Tensor? A_scale_inv, Tensor? B_scale_inv, Tensor? bias, "
    "bool accumulate, Tensor(a!) out) -> Tensor(a!)",
    f"fp8_gemm_v2({_GEMM_V2}, Tensor? A_scale_inv=None, Tensor? B_scale_inv=None, {_GEMM_REST}) -> Tensor",
    f"fp8_gemm_v2.scalar({_GEMM_V2}, float A_scale_inv, float B_scale_inv, {_GEMM_REST}) -> Tensor",
    f"fp8_gemm_v2.scalar_list({_GEMM_V2}, float[] A_scale_inv, float[] B_scale_inv, {_GEMM_REST}) -> Tensor",
    f"conv2d_fp8({_CONV}, Tensor? scale_input=None, Tensor? scale_weight=None) -> Tensor",
    f"conv2d_fp8.scalar({_CONV}, float scale_input=1.0, float scale_weight=1.0) -> Tensor",
    "softmax_fp8(Tensor input, int dim, Tensor? input_scale=None, Tensor? output_scale=None, "
    "Tensor? inv_attn_heads=None, Tensor? fused_add=None) -> Tensor",
    "softmax_fp8.Scalar_scales(Tensor input, int dim, float input_scale, float output_scale, "
    "Tensor? inv_attn_heads=None, Tensor? fused_add=None) -> Tensor",
    "softmax_fp8.Scalar(Tensor input, int dim, float input_scale, float output_scale, float inv_attn_heads, "
    "Tensor? fused_add=None) -> Tensor",
    "sum_fp8(Tensor self, int[1]? dim=None, bool keepdim=False, ScalarType? out_dtype=None) -> Tensor",
    f"kv_reorder(Tensor self, {_CACHE}) -> Tensor",
    f"kv_reorder_(Tensor(a!) self, {_CACHE}) -> Tensor(a!)",
    "in_place_interleave(Tensor self) -> Tensor",
    "in_place_interleave_(Tensor(a!) self) -> Tensor(a!)",
    f"fp8_sdpa_fwd({_QKV}, str softmax_mode, {_sdpa_scales('Tensor?')}, bool is_amax_s, {_LENGTHS}) -> {_FOUR}",
)


def _recompute(amax_o: str, newer: str = "") -> tuple[str, ...]:
    """Attention with recompute; `amax_o` is the name of an argument, `newer` what follows the arguments."""
    start, end = f"{_QKV}, bool requires_backward, str softmax_mode", f"{_LENGTHS}{newer}"
    flags = f"bool is_amax_s, bool {amax_o}"
    return (
        f"fp8_sdpa_recomp_fwd({start}, {_sdpa_scales('Tensor?')}, {flags}, {end}) -> {_SIX}",
        f"fp8_sdpa_recomp_fwd.scalar({start}, {_sdpa_scales('float')}, {flags}, {end}) -> {_SIX}",
        f"sdpa_recomp_fwd({start}, {end}) -> {_FOUR}",
    )


_ROUTED = "Tensor hidden_states, Tensor expert_routing_table, Tensor router_weights"
_WEIGHTS = {"": "Tensor[] w1, Tensor[] w2, Tensor[] w3", "fused_weights": "Tensor[] w12, Tensor[] w3"}
_RANGE = "int experts_min, int experts_max"
_EXPERTS = f"bool permuted_weights, str activation, {_RANGE}"
_CHUNKS = "int chunk_size=0, int total_experts=0"


def _moe(overload: str, arguments: str, returns: str = "Tensor") -> str:
    name = "mixture_of_experts" + (f".{overload}" if overload else "")
    return f"{name}({_ROUTED}, {arguments}) -> {returns}"


def _moe_fp8(fused: str, tensor: str, suffix: str) -> tuple[str, str]:
    """An FP8 overload with static scales, and its dynamic one; `tensor` is "Tensor" or "float"."""
    weights = _WEIGHTS[fused]
    names = [argument.split()[-1] for argument in weights.split(", ")]
    scales = ", ".join(f"{tensor}[] d_scale_{name}" for name in names)
    static = f"{tensor} d_scale_hidden_states, {tensor}[] d_scale_intermediate_hidden_states"
    name = "_".join(filter(None, ["fp8", fused, suffix]))
    return (
        _moe(name, f"{weights}, {static}, {scales}, {_EXPERTS}, *, {_CHUNKS}"),
        _moe(f"{name}_dynamic", f"{weights}, {tensor} d_scale_hidden_states, {scales}, {_EXPERTS}, *, {_CHUNKS}"),
    )


def _moe_newer() -> tuple[str, ...]:
    schemas: list[str] = []
    for fused, weights in _WEIGHTS.items():
        named = f"_{fused}" if fused else ""
        names = [argument.split()[-1] for argument in weights.split(", ")]
        scales = ", ".join(f"Tensor[] d_scale_{name}" for name in names)
        measuring = f"{weights}, {_EXPERTS}, bool measurement_mode, *, {_CHUNKS}"
        schemas += [
            _moe(fused, f"{weights}, {_EXPERTS}, *, bool? recomp=True, {_CHUNKS}"),
            _moe(f"fp8_measurement{named}", measuring, "(Tensor, Tensor)"),
            *_moe_fp8(fused, "Tensor", ""),
            *_moe_fp8(fused, "float", "scalars"),
            _moe(f"fp8{named}_blockwise", f"{weights}, {scales}, int block_size, {_EXPERTS}, *, {_CHUNKS}"),
        ]
    return (*schemas, *_moe_biased())


def _moe_biased() -> tuple[str, ...]:
    """Experts with biases: clamped, and with an activation of their own."""
    weights = f"{_WEIGHTS['fused_weights']}, Tensor[] w12_bias, Tensor[] w3_bias"
    experts, last = f"bool permuted_weights, {_RANGE}", f"{_CHUNKS}, float alpha=1.702, float limit=7.0"
    schemas = [
        _moe("bias_fused_weights", f"{weights}, *, {experts}, {last}"),
        _moe(
            "measurement_bias_fused_weights",
            f"{weights}, *, {experts}, bool measure_per_token, {last}",
            "(Tensor, Tensor)",
        ),
    ]
    for suffix, tensor in (("", "Tensor"), ("_scalars", "float")):
        scales = (
            f"{tensor} d_scale_hidden_states, {tensor}[] d_scale_intermediate_hidden_states, "
            f"{tensor}[] d_scale_w12, {tensor}[] d_scale_w3"
        )
        schemas.append(_moe(f"bias_fp8_fused_weights{suffix}", f"{weights}, {scales}, *, {experts}, {last}"))
    return tuple(schemas)


_DYNAMIC = (
    "calculate_scale_for_cast(Tensor input, int maxMode, int scaleMode, int reduceAxis=0, bool reduceKeepdim=False, "
    "float fullscale=1.0, float backoff=1.0) -> Tensor",
    "cast_to_fp8_just_in_time(Tensor input, int[2] block_shape, *, ScalarType? out_dtype=None, "
    "ScalarType? scale_dtype=None) -> (Tensor, Tensor)",
)
_OLDER, _NEWER = BRIDGES
SCHEMAS: dict[str, tuple[str, ...]] = {
    _OLDER: (
        *_ALWAYS,
        *_recompute("is_amax_0"),
        *(_moe(fused, f"{weights}, {_EXPERTS}") for fused, weights in _WEIGHTS.items()),
    ),
    _NEWER: (
        *_ALWAYS,
        *_recompute("is_amax_o", ", int[] window_size, Tensor? sinks"),
        *_moe_newer(),
        *_DYNAMIC,
    ),
}
