"""Native mixtures of experts against the reference, on every variant this processor runs.

Sums of products are added up in another order, so a value between the products that lies on the edge of two codes may
become either. With operands whose sums are exact both agree to the bit. On others, outputs of a token without such a
value differ by roundings; those of one with it by a part of what a code's step is.
"""

import dataclasses

import pytest
import torch
from grids import over

from optimum_fp8 import ops
from optimum_fp8.errors import FP8NotAvailableError

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
HIGH = [BF16, torch.float16, torch.float32]
FULL_SCALES = {E4M3: 448.0, E5M2: 57344.0}
BACKENDS = ops.cpu.backends()
WEIGHT_SCALES = {"expert": (1, 1), "halves": (2, 1), "channels": (None, None)}


@dataclasses.dataclass
class Data:
    """Operands of a call; random ones, or small integers whose sums of products are exact."""

    tokens: int = 40
    hidden: int = 65
    inner: int = 35
    experts: int = 5
    chosen: int = 2
    dtype: torch.dtype = BF16
    fp8: torch.dtype = E4M3
    scales: str = "channels"
    activations: str | None = "static"
    exact: bool = False

    def __post_init__(self):
        experts, hidden, inner = self.experts, self.hidden, self.inner
        self.x = self._values(4, self.tokens, hidden).to(self.dtype)
        self.gate_up = self._values(2, experts, 2 * inner, hidden).mul(1 if self.exact else 8).to(self.fp8)
        self.down = self._values(2, experts, hidden, inner).mul(1 if self.exact else 8).to(self.fp8)
        scores = torch.rand(self.tokens, experts) * torch.arange(1, experts + 1)  # some experts have far more tokens
        self.table = scores.topk(self.chosen).indices
        self.router = 2.0 ** torch.randint(-3, 0, self.table.shape) if self.exact else torch.rand(self.table.shape)
        up, down = WEIGHT_SCALES[self.scales]
        self.gate_up_scale = self._scales(experts, up or 2 * inner, 1)
        self.down_scale = self._scales(experts, down or hidden, 1)
        self.input_scale = self.intermediate_scale = None
        if self.activations == "dynamic":
            self.input_scale = self._scales(self.tokens, 1)
        elif self.activations == "static":
            self.input_scale, self.intermediate_scale = self._scales(1), self._scales(experts, 1, 1)

    def _values(self, largest, *shape):
        return torch.randint(-largest, largest + 1, shape).float() if self.exact else torch.randn(shape)

    def _scales(self, *shape):
        return 2.0 ** torch.randint(-4, -2, shape) if self.exact else (torch.rand(shape) + 0.5) / 32

    def on(self, backend, **options):
        scales = (self.gate_up_scale, self.down_scale, self.input_scale, self.intermediate_scale)
        with ops.backend(backend):
            return ops.experts(
                *(self.x, self.table, self.router, self.gate_up, self.down, *scales),
                **{"full_scale": FULL_SCALES[self.fp8], **options},
            )


def assert_near(data, most_apart=0.05, **options):
    """To the reference: roundings apart, but for a few tokens, of which values in between became other codes."""
    expected = data.on("reference", **options).float()
    largest = expected.abs().amax(1, keepdim=True)
    eps = torch.finfo(BF16 if options.get("arithmetic") == "gaudi" else data.dtype).eps
    for backend in BACKENDS:
        found = data.on(backend, **options)
        assert found.dtype == data.dtype and found.shape == data.x.shape
        apart = (found.float() - expected).abs()
        assert (apart <= 0.06 * largest).all(), backend
        beyond = (apart > 1.01 * eps * expected.abs() + (eps + 2e-6) * largest).any(1)
        allowed = most_apart if data.activations or options.get("arithmetic") == "gaudi" else 0
        assert beyond.float().mean() <= allowed, (backend, beyond.float().mean())


@over(
    dtype=HIGH,
    arithmetic=["fused", "gaudi"],
    scales=list(WEIGHT_SCALES),
    activations=["static", "dynamic", None],
    fp8=[E4M3, E5M2],
)
def test_exact_sums_give_what_the_reference_gives_to_the_bit(dtype, arithmetic, scales, activations, fp8):
    data = Data(20, dtype=dtype, fp8=fp8, scales=scales, activations=activations, exact=True)
    options = {"arithmetic": arithmetic, "activation": "relu"}
    expected = data.on("reference", **options)
    assert expected.count_nonzero() > expected.numel() // 2
    for backend in BACKENDS:
        assert torch.equal(data.on(backend, **options), expected), backend


@over(
    size=[(1, 65, 35), (7, 64, 64), (30, 17, 3), (300, 40, 130)],
    arithmetic=["fused", "gaudi"],
    activations=["static", "dynamic", None],
    activation=["silu", "gelu", "relu"],
)
def test_value(size, arithmetic, activations, activation):
    data = Data(*size, activations=activations)
    assert_near(data, 0.05 if arithmetic == "fused" else 0.3, arithmetic=arithmetic, activation=activation)


@over(arithmetic=["fused", "gaudi"])
def test_more_experts_than_are_summed_up_at_a_time(arithmetic):
    data = Data(9, 33, 16, experts=150, chosen=40, exact=True)
    options = {"arithmetic": arithmetic, "activation": "relu"}
    expected = data.on("reference", **options)
    for backend in BACKENDS:
        assert torch.equal(data.on(backend, **options), expected), backend


@over(backend=BACKENDS, activation=["silu", "gelu"])
def test_activations_are_those_of_torch(backend, activation):
    """The gate is the first input and up is 1, so that the first output is the activation alone."""
    data = Data(2000, 2, 1, experts=1, chosen=1, dtype=torch.float32, scales="expert", activations=None)
    data.x = torch.stack([torch.cat([torch.linspace(-100, 100, 1000), torch.randn(1000) * 3]), torch.ones(2000)], 1)
    data.x[:3, 0] = torch.tensor([torch.nan, 0.0, 1e-30])
    data.gate_up, data.down = torch.eye(2)[None].to(E4M3), torch.ones(1, 2, 1).to(E4M3)
    data.gate_up_scale, data.down_scale = torch.ones(1, 1, 1), torch.ones(1, 1, 1)
    data.router = torch.ones(2000, 1)
    found, x = data.on(backend, activation=activation)[:, 0], data.x[:, 0].double()
    expected = getattr(torch.nn.functional, activation)(x)
    assert found[0].isnan() and ((found - expected).abs()[1:] <= 4e-7 * x.abs()[1:]).all()


@over(backend=BACKENDS, arithmetic=["fused", "gaudi"])
def test_an_expert_that_occurs_twice_and_those_that_are_elsewhere(backend, arithmetic):
    data = Data(12, experts=6, chosen=3, exact=True)
    data.table[:, 2], data.table[::2, 1] = data.table[:, 0], 77
    options = {"arithmetic": arithmetic, "activation": "relu", "experts_min": 1}
    assert torch.equal(data.on(backend, **options), data.on("reference", **options))


@over(backend=BACKENDS, arithmetic=["fused", "gaudi"])
def test_any_number_of_threads_gives_the_same(backend, arithmetic):
    before = torch.get_num_threads()
    for tokens in (1, 200):
        data, found = Data(tokens, 96, 64, activations="dynamic"), []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            try:
                found.append(data.on(backend, arithmetic=arithmetic))
            finally:
                torch.set_num_threads(before)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_more_tokens_than_are_taken_at_a_time():
    """Beyond 2²⁵ values of working memory a call is done in several passes; each begins where the last ended."""
    data = Data(1700, 64, 64, experts=64, chosen=64, activations="dynamic", exact=True)
    found = data.on(BACKENDS[0], activation="relu")
    for part in (slice(0, 3), slice(1630, 1650), slice(1697, 1700)):
        own = dataclasses.replace(data)
        for name in ("gate_up", "down", "gate_up_scale", "down_scale"):
            setattr(own, name, getattr(data, name))
        for name in ("x", "table", "router", "input_scale"):
            setattr(own, name, getattr(data, name)[part])
        expected = own.on(BACKENDS[0], activation="relu")
        assert expected.any() and torch.equal(found[part], expected)


def test_nan_and_inf_stay_in_their_tokens():
    for activations in ("static", "dynamic", None):
        data = Data(10, activations=activations)
        clean = {backend: data.on(backend) for backend in BACKENDS}
        data.x[0, 3], data.x[4, 5] = torch.nan, torch.inf
        for backend in BACKENDS:
            found = data.on(backend)
            others = [token for token in range(10) if token not in (0, 4)]
            assert found[0].isnan().all() and torch.equal(found[others], clean[backend][others])


@over(
    changes=[
        {"gate_up": lambda w: w.mT.contiguous().mT},
        {"down_scale": lambda s: s.double()},
        {"router": lambda w: w.double()},
        {"x": lambda x: x.double()},
    ]
)
def test_what_the_library_does_not_take_is_left_to_the_reference(changes):
    data, record = Data(4), ops.CallRecord()
    for name, change in changes.items():
        setattr(data, name, change(getattr(data, name)))
    with pytest.raises(FP8NotAvailableError, match="cannot run 'experts'"):
        data.on(BACKENDS[0])
    scales = (data.gate_up_scale, data.down_scale, data.input_scale, data.intermediate_scale)
    ops.experts(data.x, data.table, data.router, data.gate_up, data.down, *scales, full_scale=448.0, record=record)
    assert record.kernels == {("experts", "reference"): 1} and len(record.fallbacks) == 1


def test_qdq_is_left_to_the_reference():
    with pytest.raises(FP8NotAvailableError, match="arithmetic 'qdq'"):
        Data(4).on(BACKENDS[0], arithmetic="qdq")
