"""Mixtures of experts of the emulated operators, token by token in float64."""

import pytest
import torch
from grids import over

from optimum_fp8.test_utils import gaudi

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
TOKENS, HIDDEN, INNER, EXPERTS, TOP = 6, 8, 12, 4, 2
ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "relu": torch.nn.functional.relu,
    "silu": torch.nn.functional.silu,
}


def moe():
    return torch.ops.hpu.mixture_of_experts


class Data:
    """Hidden states, routing, and weights [in, out], in the dtype given, with what they stand for in float64."""

    def __init__(self, device, dtype, hidden_dtype=None):
        self.device, self.dtype = device, dtype
        self.router, self.table = torch.topk(torch.softmax(torch.randn(TOKENS, EXPERTS), -1), TOP)
        self.x, self.x64 = self.make(hidden_dtype or dtype, TOKENS, HIDDEN)
        shapes = {"w1": (HIDDEN, INNER), "w2": (HIDDEN, INNER), "w3": (INNER, HIDDEN)}
        made = {name: [self.make(dtype, *shape) for _ in range(EXPERTS)] for name, shape in shapes.items()}
        self.weights = {name: [each[0] for each in pairs] for name, pairs in made.items()}
        self.weights64 = {name: [each[1] for each in pairs] for name, pairs in made.items()}

    def make(self, dtype, *shape):
        x = torch.randn(shape)
        made = self.device.encode(x, dtype) if dtype.itemsize == 1 else x.to(dtype)
        return made, (self.device.decode(made) if dtype.itemsize == 1 else made).double()

    def given(self, fused, permuted):
        """Weights as the operator takes them: lists of w1, w2, w3 or of w12, w3, as [out, in] if permuted."""
        w1, w2, w3 = ([as_bytes(w) for w in self.weights[name]] for name in ("w1", "w2", "w3"))
        lists = [[torch.cat([a, b], 1) for a, b in zip(w1, w2, strict=True)], w3] if fused else [w1, w2, w3]
        return [[back(w.t().contiguous() if permuted else w, self.dtype) for w in each] for each in lists]

    def routed(self):
        return self.x, self.table, self.router.to(BF16)

    def expected(self, activation, scales=None, low=0, high=EXPERTS - 1):
        """The sum over experts, and maxabs of the last product's input of each expert, before any rounding."""
        scales = scales or {"w1": [1.0] * EXPERTS, "w2": [1.0] * EXPERTS, "w3": [1.0] * EXPERTS, "x": 1.0}
        total, maxima = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64), torch.zeros(EXPERTS, dtype=torch.float64)
        for token in range(TOKENS):
            x = self.x64[token] * (scales["x"][token] if torch.is_tensor(scales["x"]) else scales["x"])
            for expert, weight in zip(self.table[token].tolist(), self.router[token].to(BF16), strict=True):
                if low <= expert <= high:
                    gate, up = (x @ self.weights64[n][expert] * scales[n][expert] for n in ("w1", "w2"))
                    middle = ACTIVATIONS[activation](gate) * up
                    total[token] += weight * (middle @ self.weights64["w3"][expert] * scales["w3"][expert])
                    maxima[expert] = max(maxima[expert], middle.abs().max())
        return total, maxima


def as_bytes(x):
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def back(x, dtype):
    return x.view(dtype) if dtype.itemsize == 1 else x


def assert_near(out, exact, tolerance):
    assert out.shape == exact.shape and ((out.double() - exact).norm() / exact.norm()) < tolerance


@over(activation=list(ACTIVATIONS), fused=[False, True], permuted=[False, True], dtype=[BF16, torch.float32])
def test_without_fp8(device, activation, fused, permuted, dtype):
    data = Data(device, dtype)
    out = moe()(*data.routed(), *data.given(fused, permuted), permuted, activation, 0, EXPERTS - 1)
    assert out.dtype == dtype
    assert_near(out, data.expected(activation)[0], 0.02 if dtype == BF16 else 1e-3)
    assert device.calls[-1].overload == ("fused_weights" if fused else "default")


@over(fused=[False, True])
def test_measuring(device, fused):
    data = Data(device, BF16)
    args = (*data.routed(), *data.given(fused, True), True, "silu", 0, EXPERTS - 1)
    out, maxima = moe()(*args, True)
    assert device.calls[-1].overload == "fp8_measurement" + ("_fused_weights" if fused else "")
    exact, exact_maxima = data.expected("silu")
    assert torch.equal(out, moe()(*args)) and maxima.dtype == torch.float32
    torch.testing.assert_close(maxima.double(), exact_maxima, rtol=0.03, atol=0)
    assert (exact_maxima > 0).any() and moe()(*args, False)[1].tolist() == [0.0] * EXPERTS


SCALES = {"x": 0.5, "w1": [0.25, 0.5, 1.0, 2.0], "w2": [1.0, 2.0, 0.25, 0.5], "w3": [2.0, 0.5, 0.25, 1.0]}
MIDDLE = [0.25, 0.5, 0.125, 1.0]


@pytest.mark.core
@over(dtype=[E4M3, E5M2], scalars=[False, True], permuted=[False, True], activation=["silu", "gelu"])
def test_static_scales(device, dtype, scalars, permuted, activation):
    data = Data(device, dtype)
    make = (lambda value: value) if scalars else torch.tensor
    scales = [make(SCALES["x"]), [make(s) for s in MIDDLE]]
    scales += [[make(s) for s in SCALES[name]] for name in ("w1", "w2", "w3")]
    out = moe()(*data.routed(), *data.given(False, permuted), *scales, permuted, activation, 0, EXPERTS - 1)
    assert out.dtype == BF16 and device.calls[-1].overload == ("fp8_scalars" if scalars else "fp8")
    assert_near(out, data.expected(activation, SCALES)[0], 0.06 if dtype == E4M3 else 0.12)


def by_keyword(data, fused=True, permuted=False, **scales):
    """As Intel Neural Compressor calls the operator: by keywords, and with weights stored as [in, out]."""
    names = ("w12", "w3") if fused else ("w1", "w2", "w3")
    x, table, router = data.routed()
    return {
        "hidden_states": x,
        "expert_routing_table": table,
        "router_weights": router,
        **dict(zip(names, data.given(fused, permuted), strict=True)),
        **scales,
        "permuted_weights": permuted,
        "activation": "silu",
        "experts_min": 0,
        "experts_max": EXPERTS - 1,
    }


@over(scalars=[False, True], permuted=[False, True])
def test_fused_weights_share_a_scale(device, scalars, permuted):
    data, make = Data(device, E4M3), (lambda value: value) if scalars else torch.tensor
    common = [make(s) for s in SCALES["w1"]]
    scales = {"d_scale_hidden_states": make(0.5), "d_scale_intermediate_hidden_states": [make(s) for s in MIDDLE]}
    scales |= {"d_scale_w12": common, "d_scale_w3": [make(s) for s in SCALES["w3"]]}
    overload = moe().fp8_fused_weights_scalars if scalars else moe().fp8_fused_weights
    out = overload(**by_keyword(data, permuted=permuted, **scales))
    assert_near(out, data.expected("silu", SCALES | {"w2": SCALES["w1"]})[0], 0.06)


@over(fused=[False, True], per_channel=[False, True], flat=[False, True])
def test_dynamic_scales_of_tokens_and_columns(device, fused, per_channel, flat):
    data = Data(device, E4M3)
    tokens = torch.rand(TOKENS) + 0.5
    columns = {"w1": INNER, "w2": INNER, "w3": HIDDEN}
    scales = {name: [torch.rand(n if per_channel else 1) + 0.5 for _ in range(EXPERTS)] for name, n in columns.items()}
    if fused and not per_channel:
        scales["w2"] = scales["w1"]
    given = {name: [s if flat else s[None] for s in each] for name, each in scales.items()}
    if fused:
        w12 = [torch.cat(pair, -1) if per_channel else pair[0] for pair in zip(given["w1"], given["w2"], strict=True)]
        given = {"w12": w12, "w3": given["w3"]}
    named = {f"d_scale_{name}": each for name, each in given.items()}
    named["d_scale_hidden_states"] = tokens if flat else tokens[:, None]
    overload = moe().fp8_fused_weights_dynamic if fused else moe().fp8_dynamic
    out = overload(**by_keyword(data, fused, **named))
    assert_near(out, data.expected("silu", scales | {"x": tokens})[0], 0.06)


def test_dynamic_scalars(device):
    data = Data(device, E4M3)
    common = {"d_scale_hidden_states": 0.5, "d_scale_w3": SCALES["w3"]}
    out = moe().fp8_scalars_dynamic(
        **by_keyword(data, False, **common, d_scale_w1=SCALES["w1"], d_scale_w2=SCALES["w2"])
    )
    assert_near(out, data.expected("silu", SCALES)[0], 0.06)
    fused = moe().fp8_fused_weights_scalars_dynamic(**by_keyword(data, **common, d_scale_w12=SCALES["w1"]))
    assert_near(fused, data.expected("silu", SCALES | {"w2": SCALES["w1"]})[0], 0.06)


@over(fused=[False, True], permuted=[False, True])
def test_scales_of_blocks_of_weights(device, fused, permuted):
    data, block = Data(device, E4M3, hidden_dtype=BF16), 4
    names = ("w12", "w3") if fused else ("w1", "w2", "w3")
    lists = dict(zip(names, data.given(fused, permuted), strict=True))
    shapes = [[[-(-size // block) for size in weight.shape] for weight in each] for each in lists.values()]
    blocks = [[torch.rand(shape) + 0.5 for shape in each] for each in shapes]
    for name, each in zip(names, blocks, strict=True):
        for i, scale in enumerate(each):
            spread = scale.double().repeat_interleave(block, 0).repeat_interleave(block, 1)
            spread = spread.t() if permuted else spread
            parts = dict(zip(("w1", "w2"), spread.chunk(2, 1), strict=True)) if name == "w12" else {name: spread}
            for part, scales in parts.items():
                data.weights64[part][i] = data.weights64[part][i] * scales
    out = moe()(*data.routed(), *lists.values(), *blocks, block, permuted, "silu", 0, EXPERTS - 1)
    assert out.dtype == BF16 and "blockwise" in device.calls[-1].overload
    assert_near(out, data.expected("silu")[0], 0.02)


def test_slices_of_the_experts_add_up(device):
    data = Data(device, BF16)
    w12, w3 = data.given(True, False)
    whole = moe()(*data.routed(), w12, w3, False, "silu", 0, EXPERTS - 1)
    low = moe()(*data.routed(), w12[:1], w3[:1], False, "silu", 0, 0)
    high = moe()(*data.routed(), w12[1:], w3[1:], False, "silu", 1, EXPERTS - 1)
    assert_near(low, data.expected("silu", high=0)[0], 0.02)
    torch.testing.assert_close(low + high, whole, rtol=0.02, atol=0.1)


def test_experts_that_get_no_token_do_not_count(gaudi2):
    data = Data(gaudi2, torch.float32)
    data.weights["w3"][2].fill_(torch.nan)
    table = torch.tensor([[0, 1]] * TOKENS)
    out, maxima = moe()(data.x, table, data.router, *data.given(False, False), False, "silu", 0, EXPERTS - 1, True)
    assert out.isfinite().all() and maxima[2:].tolist() == [0.0, 0.0]


def biased(data, biases, alpha=1.702, limit=7.0):
    """In float64: gate and up projection take turns in the columns of w12."""
    total, maxima = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64), torch.zeros(EXPERTS, TOKENS).double()
    for token in range(TOKENS):
        for expert, weight in zip(data.table[token].tolist(), data.router[token].to(BF16), strict=True):
            both = torch.cat([data.weights64["w1"][expert], data.weights64["w2"][expert]], 1)
            both = data.x64[token] @ both + biases[0][expert].double()
            gate, up = both[::2].clamp(max=limit), both[1::2].clamp(-limit, limit)
            middle = (up + 1) * gate * torch.sigmoid(alpha * gate)
            total[token] += weight * (middle @ data.weights64["w3"][expert] + biases[1][expert].double())
            maxima[expert, token] = middle.abs().max()
    return total, maxima


@over(dtype=[BF16, E4M3], scalars=[False, True])
def test_biases(device, dtype, scalars):
    data = Data(device, dtype)
    biases = [[torch.randn(size).to(BF16) for _ in range(EXPERTS)] for size in (2 * INNER, HIDDEN)]
    named = by_keyword(data, w12_bias=biases[0], w3_bias=biases[1])
    del named["activation"]
    exact, maxima = biased(data, biases)
    if dtype == BF16:
        assert_near(moe().bias_fused_weights(**named), exact, 0.02)
        for per_token, expected in ((True, maxima), (False, maxima.amax(1))):
            out, measured = moe().measurement_bias_fused_weights(**named, measure_per_token=per_token)
            assert_near(out, exact, 0.02)
            torch.testing.assert_close(measured.double(), expected, rtol=0.03, atol=0)
    else:
        make = (lambda value: value) if scalars else torch.tensor
        ones = [make(1.0)] * EXPERTS
        scales = {"d_scale_hidden_states": make(1.0), "d_scale_w12": ones, "d_scale_w3": ones}
        middle = {"d_scale_intermediate_hidden_states": [make(0.5)] * EXPERTS}
        overload = moe().bias_fp8_fused_weights_scalars if scalars else moe().bias_fp8_fused_weights
        assert_near(overload(**named, **scales, **middle), exact, 0.06)


ROUNDED = [
    (1.0625 + 2.0**-10, 1.0),  # the gate becomes 1.0625 in bf16, halfway between two codes: the even one is 1
    (1 + 2.0**-7, 1 + 7 * 2.0**-7),  # so does the product of gate and up projection, which is a little more
]


@pytest.mark.parametrize("gate, up", ROUNDED)
def test_products_are_rounded_in_between(gaudi2, gate, up):
    one = gaudi2.encode(torch.ones(1, 1), E4M3)
    routing = (torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).to(BF16))
    out = moe()(one, *routing, [one], [one], [one], 1.0, [1.0], [gate], [up], [1.0], False, "relu", 0, 0)
    assert out.item() == 1.0
    assert gaudi2.decode(gaudi2.encode(torch.tensor(gate * up), E4M3)).item() == 1.125


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_states": torch.ones(TOKENS, HIDDEN, 1)}, "hidden_states is"),
        ({"hidden_states": torch.ones(TOKENS, HIDDEN)}, "hidden_states must be one of"),
        ({"expert_routing_table": torch.zeros(TOKENS, 1, dtype=torch.int64)}, "are both"),
        ({"router_weights": torch.ones(TOKENS, TOP, dtype=torch.float64)}, "router_weights must be one of"),
        ({"experts_max": EXPERTS}, "experts 0 to 4 are 5, but w12 has 4"),
        ({"d_scale_w3": [torch.ones(1)]}, "but d_scale_w3 has 1"),
        ({"permuted_weights": True}, r"does not fit a hidden size of 8 .* \(permuted_weights=True\)"),
        ({"w12": [torch.ones(HIDDEN, INNER).to(E4M3)] * EXPERTS}, "and an inner size of 12"),
        ({"activation": "tanh"}, "Unsupported activation"),
        ({"w3": [torch.ones(INNER, HIDDEN)] * EXPERTS}, "w3 must be one of"),
        ({"w3": [torch.ones(INNER, HIDDEN, 1).to(E4M3)] * EXPERTS}, "w3 must be matrices"),
        ({"d_scale_hidden_states": torch.ones(5)}, "5 elements for 6 tokens"),
        ({"d_scale_intermediate_hidden_states": [torch.ones(2)] * EXPERTS}, "Multi-element"),
        ({"d_scale_w3": [torch.ones(1).half()] * EXPERTS}, "scales must be one of"),
        ({"d_scale_w12": [torch.ones(3)] * EXPERTS}, "d_scale_w12 has 3 elements for 24 columns"),
    ],
)
def test_refused(gaudi2, change, message):
    ones = [torch.ones(1)] * EXPERTS
    scales = {"d_scale_hidden_states": torch.ones(1), "d_scale_intermediate_hidden_states": ones}
    named = by_keyword(Data(gaudi2, E4M3), **scales, d_scale_w12=ones, d_scale_w3=ones)
    with pytest.raises(RuntimeError, match=message):
        moe().fp8_fused_weights(**named | change)
    assert gaudi2.calls == []


def test_biases_that_do_not_fit_are_refused(gaudi2):
    data = Data(gaudi2, BF16)
    biases = {"w12_bias": [torch.ones(INNER)] * EXPERTS, "w3_bias": [torch.ones(HIDDEN)] * EXPERTS}
    named = by_keyword(data, **biases)
    del named["activation"]
    with pytest.raises(RuntimeError, match=r"w12_bias of shape \(12,\) does not fit 24 columns"):
        moe().bias_fused_weights(**named)


def test_blocks_that_do_not_cover_a_weight_are_refused(gaudi2):
    data = Data(gaudi2, E4M3, hidden_dtype=BF16)
    blocks = [[torch.ones(2, 6)] * EXPERTS, [torch.ones(2, 2)] * EXPERTS]
    args = (*data.routed(), *data.given(True, False), *blocks, 4, False, "silu", 0, EXPERTS - 1)
    with pytest.raises(RuntimeError, match=r"d_scale_w3 of shape \(2, 2\) does not cover a weight of \(12, 8\)"):
        moe()(*args)


def test_the_older_bridge_has_no_experts_in_fp8():
    with gaudi.emulated("gaudi2", bridge="1.19") as device:
        data = Data(device, BF16)
        assert moe()(*data.routed(), *data.given(True, False), False, "silu", 0, EXPERTS - 1).shape == data.x.shape
        assert moe().overloads() == ["default", "fused_weights"]
        with pytest.raises(AttributeError, match="fp8_fused_weights"):
            moe().fp8_fused_weights  # noqa: B018
