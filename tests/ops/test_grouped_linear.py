"""`ops.grouped_linear` row by row against `ops.linear` with the weight of the row's expert."""

import dataclasses

import pytest
import torch
from grids import over

from optimum_fp8 import ops
from optimum_fp8.errors import FP8ConfigError, FP8OperandError, FP8ScaleError

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
HIGH = [BF16, torch.float16, torch.float32]
ROWS, EXPERTS, OUT, IN = 11, 5, 134, 150
WEIGHT_SCALES = {
    "expert": (EXPERTS, 1, 1),
    "halves": (EXPERTS, 2, 1),
    "channels": (EXPERTS, OUT, 1),
    "blocks": (EXPERTS, 2, 2),
}
INPUT_SCALES = {
    "weight-only": None,
    "tensor": (1,),
    "expert": (EXPERTS, 1, 1),
    "row": (ROWS, 1),
    "groups": (ROWS, 2),
}


@dataclasses.dataclass
class Data:
    """The operands of one call; two experts have no rows, and some rows are of no expert that is here."""

    dtype: torch.dtype = BF16
    fp8: torch.dtype = E4M3
    weight_scale: str | torch.Tensor = "channels"
    input_scale: str | torch.Tensor | None = "row"
    bias: bool | torch.Tensor | None = True

    def __post_init__(self):
        self.x = torch.randn(ROWS, IN).to(self.dtype)
        self.experts = torch.tensor([4, 1, -1, 0, 4, 5, 1, 1, 4, 1, 99])
        self.weight = (torch.randn(EXPERTS, OUT, IN) * 20).clamp(-240, 240).to(self.fp8)
        self.weight_scale = torch.rand(WEIGHT_SCALES[self.weight_scale]) * 0.01 + 1e-3
        shape = INPUT_SCALES[self.input_scale]
        self.input_scale = None if shape is None else torch.rand(shape) * 0.05 + 0.005
        self.bias = torch.randn(EXPERTS, OUT).to(self.dtype) if self.bias else None

    def run(self, **options):
        operands = (self.x, self.experts, self.weight, self.weight_scale, self.input_scale, self.bias)
        return ops.grouped_linear(*operands, **{"full_scale": 240.0, **options})

    def row_by_row(self, arithmetic="fused"):
        """Each row by `ops.linear`, with scales looked up by hand."""
        y = torch.zeros(len(self.x), OUT, dtype=self.dtype)
        for row, expert in enumerate(self.experts.tolist()):
            if not 0 <= expert < EXPERTS:
                continue
            scale, input_scale = self.weight_scale[expert], self.input_scale
            if scale.shape == (2, 1):
                scale = torch.where((torch.arange(OUT) < OUT // 2)[:, None], scale[0, 0], scale[1, 0])
            if input_scale is not None and input_scale.ndim == 3:
                input_scale = input_scale[expert, 0]
            elif input_scale is not None and input_scale.ndim == 2:
                input_scale = input_scale[row : row + 1]
            bias = None if self.bias is None else self.bias[expert]
            operands = (self.x[row : row + 1], self.weight[expert], scale, input_scale, bias)
            y[row] = ops.linear(*operands, full_scale=240.0, arithmetic=arithmetic)[0]
        return y


def assert_close(found, expected):
    """Apart by a rounding of the output, and of float32 sums in another order."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    apart = (found.double() - expected.double()).abs()
    largest = expected.double().abs().amax(-1, keepdim=True)
    assert (apart <= 2 * torch.finfo(found.dtype).eps * largest.clamp(max=8) + 2e-6 * largest).all()


@pytest.mark.core
@over(
    dtype=HIGH,
    arithmetic=ops.ARITHMETICS,
    weight_scale=list(WEIGHT_SCALES),
    input_scale=list(INPUT_SCALES),
)
def test_value(dtype, arithmetic, weight_scale, input_scale):
    data = Data(dtype, weight_scale=weight_scale, input_scale=input_scale)
    assert_close(data.run(arithmetic=arithmetic), data.row_by_row(arithmetic))


@over(fp8=[E4M3, E5M2], input_scale=["weight-only", "row"], bias=[False, True])
def test_formats(fp8, input_scale, bias):
    data = Data(torch.float32, fp8=fp8, input_scale=input_scale, bias=bias)
    assert_close(data.run(), data.row_by_row())


@over(index=[torch.int32, torch.int64, torch.int16, torch.uint8])
def test_numbers_of_experts_of_any_integer(index):
    data = Data()
    expected = data.run()
    data.experts = data.experts.to(index)
    assert torch.equal(data.run(), expected)


@over(arithmetic=ops.ARITHMETICS)
def test_rows_of_experts_that_are_not_here_are_zeros(arithmetic):
    data = Data()
    elsewhere = (data.experts < 0) | (data.experts >= EXPERTS)
    found = data.run(arithmetic=arithmetic)
    assert elsewhere.any() and not found[elsewhere].any() and found[~elsewhere].any(dim=1).all()
    data.experts = torch.full((ROWS,), EXPERTS)
    data.x.fill_(torch.nan)
    assert torch.equal(data.run(arithmetic=arithmetic), torch.zeros(ROWS, OUT, dtype=BF16))


@over(arithmetic=ops.ARITHMETICS, input_scale=list(INPUT_SCALES))
def test_no_rows(arithmetic, input_scale):
    data = Data(input_scale=input_scale)
    data.x, data.experts = data.x[:0], data.experts[:0]
    if input_scale in ("row", "groups"):
        data.input_scale = data.input_scale[:0]
    assert data.run(arithmetic=arithmetic).shape == (0, OUT)


def test_two_rows_of_scales_are_those_of_halves():
    """(E, 2, 1) could be blocks, where a weight has 129 to 256 outputs and up to 128 inputs."""
    data = Data(torch.float32, weight_scale="halves", input_scale="weight-only", bias=False)
    data.x, data.weight = data.x[:, :100].contiguous(), data.weight[:, :, :100].contiguous()
    assert_close(data.run(), data.row_by_row())


def test_nan_stays_in_its_row():
    data = Data()
    clean = data.run()
    data.x[1, 3] = torch.nan
    found = data.run()
    assert found[1].isnan().all() and torch.equal(found[2:], clean[2:]) and torch.equal(found[0], clean[0])


def test_operands_of_any_layout():
    data = Data()
    expected = data.run()
    data.x = torch.empty(IN, ROWS, dtype=BF16).t().copy_(data.x)
    data.weight = torch.empty(EXPERTS, IN, OUT).to(E4M3).mT.copy_(data.weight)
    data.input_scale, data.weight_scale = (
        torch.stack([each, each + 1], -1)[..., 0] for each in (data.input_scale, data.weight_scale)
    )
    data.bias, data.experts = torch.stack([data.bias] * 3, -1)[..., 1], data.experts.repeat_interleave(2)[::2]
    assert not any(each.is_contiguous() for each in (data.x, data.weight, data.bias, data.experts))
    assert_close(data.run(), expected)


@pytest.mark.parametrize(
    "changes, error, text",
    [
        ({"weight": torch.zeros(EXPERTS, OUT, IN)}, FP8OperandError, "weights in FP8"),
        ({"weight": torch.zeros(EXPERTS, OUT, IN).to(E4M3).view(torch.uint8)}, FP8OperandError, "view"),
        ({"x": torch.zeros(ROWS, IN).to(E4M3)}, FP8OperandError, "high precision"),
        ({"x": torch.zeros(ROWS, IN + 1)}, FP8OperandError, r"expected \[rows, in\]"),
        ({"x": torch.zeros(1, ROWS, IN)}, FP8OperandError, r"expected \[rows, in\]"),
        ({"weight": torch.zeros(OUT, IN).to(E4M3)}, FP8OperandError, r"\[experts, out, in\]"),
        ({"experts": torch.zeros(ROWS)}, FP8OperandError, "in torch.float32: expected integers"),
        ({"experts": torch.zeros(ROWS, dtype=torch.bool)}, FP8OperandError, "expected integers"),
        ({"experts": torch.zeros(ROWS, 1, dtype=torch.int64)}, FP8OperandError, r"expected \(11,\), one for each row"),
        ({"bias": torch.zeros(OUT)}, FP8OperandError, r"a bias of shape \(134,\).*expected \(5, 134\)"),
        ({"weight_scale": torch.ones(1)}, FP8ScaleError, r"weight scales of shape \(1,\).*halves|each half"),
        ({"weight_scale": torch.ones(EXPERTS, OUT)}, FP8ScaleError, "weight scales of shape"),
        ({"weight_scale": torch.ones(EXPERTS, 2, 3)}, FP8ScaleError, r"by blocks of 128 \(5, 2, 2\)"),
        ({"input_scale": torch.ones(EXPERTS, 1)}, FP8ScaleError, r"one for each expert \(5, 1, 1\)"),
        ({"input_scale": torch.ones(ROWS)}, FP8ScaleError, r"each row \(11, 1\)"),
    ],
)
def test_refuses_what_does_not_fit(changes, error, text):
    data = Data()
    for name, value in changes.items():
        setattr(data, name, value)
    with pytest.raises(error, match=text):
        data.run()


def test_refuses_halves_of_an_odd_number_of_outputs():
    data = Data(bias=False)
    data.weight, data.weight_scale = data.weight[:, :3], torch.ones(EXPERTS, 2, 1)
    with pytest.raises(FP8ScaleError, match=r"for each output \(5, 3, 1\)") as error:
        data.run()
    assert "half" not in str(error.value)


def test_refuses_unknown_words_and_a_full_scale_beyond_the_format():
    data = Data()
    data.x, data.experts, data.input_scale = data.x[:0], data.experts[:0], data.input_scale[:0]
    with pytest.raises(FP8ConfigError, match="arithmetic='gaudi2' is unknown"):
        data.run(arithmetic="gaudi2")
    with pytest.raises(FP8ConfigError, match="full_scale=57344.0"):
        Data().run(full_scale=57344.0)


def test_counts_its_calls():
    record, data = ops.CallRecord(), Data()
    data.run(record=record)
    record.watch(data.weight)
    operands = (data.x, data.experts, data.weight, data.weight_scale, data.input_scale, data.bias)
    torch.ops.optimum_fp8.grouped_linear(*operands, 240.0, "gaudi")
    assert sum(record.kernels.values()) == 2 and {op for op, _ in record.kernels} == {"grouped_linear"}
