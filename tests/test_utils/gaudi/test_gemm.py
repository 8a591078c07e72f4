"""Products of the emulated operators, against float64."""

import pytest
import torch
from grids import over

from optimum_fp8.test_utils import gaudi

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16


def gemm(*args, **kwargs):
    return torch.ops.hpu.fp8_gemm_v2(*args, **kwargs)


def random_codes(device, *shape, dtype=E4M3):
    """Codes of numbers around one, and what they stand for in float64."""
    codes = device.encode(torch.randn(shape), dtype)
    return codes, device.decode(codes).double()


SHAPES = [
    ((5, 8), False, (8, 3), False),
    ((8, 5), True, (8, 3), False),
    ((5, 8), False, (3, 8), True),
    ((8, 5), True, (3, 8), True),
    ((2, 4, 5, 8), False, (8, 3), False),
    ((2, 1, 5, 8), False, (4, 3, 8), True),
    ((8,), False, (8, 3), False),
    ((5, 8), False, (8,), False),
    ((8,), False, (8,), False),
]


def matrices(a, trans_a, b, trans_b):
    return torch.matmul(a.transpose(-1, -2) if trans_a else a, b.transpose(-1, -2) if trans_b else b)


@over(shapes=SHAPES, out_dtype=[BF16, torch.float32])
def test_products_of_all_shapes(device, shapes, out_dtype):
    (A, a), (B, b) = random_codes(device, *shapes[0]), random_codes(device, *shapes[2], dtype=E5M2)
    exact = matrices(a, shapes[1], b, shapes[3])
    out = gemm(A, shapes[1], B, shapes[3], None, out_dtype, torch.tensor(0.5), torch.tensor(0.25))
    assert out.shape == exact.shape and out.dtype == out_dtype
    # The sums of so few products are exact in float32: what is left is one rounding.
    assert torch.equal(out, (exact * 0.125).to(torch.float32).to(out_dtype))


@pytest.mark.core
def test_the_scales_multiply_in_spite_of_their_names(gaudi2):
    A, B = (gaudi2.encode(torch.tensor([[value]]), E4M3) for value in (3.0, 5.0))
    assert gemm(A, False, B, False, None, BF16, 16.0, 1 / 16).item() == 15.0
    assert gemm(A, False, B, False, None, BF16, torch.tensor([16.0]), None).item() == 240.0
    keywords = {"A": A, "trans_A": False, "B": B, "trans_B": False, "D": None, "out_dtype": BF16}
    assert gemm(**keywords, A_scale_inv=[4.0], B_scale_inv=[1.0]).item() == 60.0
    assert [call.overload for call in gaudi2.calls] == ["scalar", "default", "scalar_list"]


SCALES = [((5, 1), (3,)), ((1,), (1, 3)), ((2, 5, 1), (1, 1)), ((2, 1, 1), (2, 1, 3)), ((), (3,))]


@over(shapes=SCALES)
def test_scales_of_rows_and_columns(device, shapes):
    (A, a), (B, b) = random_codes(device, 2, 5, 8), random_codes(device, 2, 8, 3)
    scales = [torch.rand(shape) + 0.5 for shape in shapes]
    out = gemm(A, False, B, False, None, torch.float32, *scales)
    expected = torch.matmul(a, b) * scales[0].double() * scales[1].double()
    torch.testing.assert_close(out.double(), expected, rtol=3e-7, atol=1e-6)


def test_a_list_of_scales_takes_its_shape(device):
    (A, a), (B, b) = random_codes(device, 5, 8), random_codes(device, 3, 8)
    out = gemm(A, False, B, True, None, torch.float32, [1.0], [1.0, 2.0, 4.0], B_scale_shape=[1, 3])
    assert torch.equal(out.double(), a @ b.t() * torch.tensor([1.0, 2.0, 4.0]))


BLOCKS = [((4, 2), (2, 3)), ((2, 2), (2, 12)), ((2, 2), (2, 3))]  # 1xN @ NxN, NxN @ Nx1, NxN @ NxN with N = 4


@over(shapes=BLOCKS, transposed=[False, True])
def test_scales_of_blocks(device, shapes, transposed):
    rows = 4 if shapes[0][0] == 4 else 8
    (A, a), (B, b) = random_codes(device, rows, 8), random_codes(device, 8, 12)
    a_scale, b_scale = (torch.rand(shape) + 0.5 for shape in shapes)
    given = B.view(torch.uint8).t().contiguous().view(E4M3) if transposed else B
    out = gemm(A, False, given, transposed, None, torch.float32, a_scale, b_scale)
    spread = [
        scale.repeat_interleave(m.shape[0] // scale.shape[0], 0).repeat_interleave(m.shape[1] // scale.shape[1], 1)
        for scale, m in ((a_scale, a), (b_scale, b))
    ]
    torch.testing.assert_close(out.double(), (a * spread[0]) @ (b * spread[1]), rtol=1e-6, atol=1e-5)


def test_output_is_rounded_before_the_bias_and_before_d(gaudi2):
    A, B = gaudi2.encode(torch.ones(1, 1), E4M3), gaudi2.encode(torch.ones(1, 1), E4M3)
    bias, d = torch.tensor([1.0], dtype=BF16), torch.tensor([[2.0**-8]], dtype=BF16)
    product = 1 + 2.0**-8  # halfway between two numbers of bf16: rounded down to 1
    assert gemm(A, False, B, False, None, BF16, product, 1.0, bias).item() == 2.0
    assert gemm(A, False, B, False, None, BF16, product, 1.0).item() == 1.0
    assert gemm(A, False, B, False, None, torch.float32, product, 1.0, bias.float()).item() == 1 + product
    # bias + D = 2 + 2^-8 would be 2 + 2^-7 + … if one of them were lost; each addition rounds: 2 + 2^-8 -> 2
    assert gemm(A, False, B, False, d, BF16, 1.0, 1.0, bias, True).item() == 2.0
    assert gemm(A, False, B, False, d, BF16, 1.0, 1.0, None, False).item() == 1.0


def test_codes_above_240_poison_products_on_gaudi2_only(device):
    A = torch.tensor([[0x78, 0x38]], dtype=torch.uint8).view(E4M3)
    B = torch.tensor([[0x38], [0x38]], dtype=torch.uint8).view(E4M3)
    out = gemm(A, False, B, False, None, BF16, 1.0, 1.0).item()
    assert out == (float("inf") if device.chip.name == "GAUDI2" else 256.0)


def test_the_older_form_writes_into_its_output(device):
    (A, a), (B, b) = random_codes(device, 5, 8), random_codes(device, 8, 3)
    out = torch.empty(5, 3)
    args = (A, False, B, False, out, torch.float32, torch.tensor(2.0), None, None, False)
    assert torch.ops.hpu.fp8_gemm(*args, out).data_ptr() == out.data_ptr()
    assert torch.equal(out.double(), 2 * a @ b)
    with pytest.raises(RuntimeError, match="out must be torch.float32 of shape"):
        torch.ops.hpu.fp8_gemm(*args, torch.empty(3, 5))


A, B = torch.ones(4, 8).to(E4M3), torch.ones(8, 6).to(E4M3)


@pytest.mark.parametrize(
    "args, message",
    [
        ((A.float(), False, B, False, None, BF16), "dtype of A must be one of"),
        ((A, False, B.float(), False, None, BF16), "dtype of B must be one of"),
        ((A, False, B, False, None, E4M3), "out_dtype must be one of"),
        ((A, False, B, True, None, BF16), "cannot multiply"),
        ((A[0], True, B, False, None, BF16), "at least 2 dimensions to perform transpose"),
        ((A, False, B, False, None, BF16, torch.ones(5, 1), None), "must be divisible by"),
        ((A, False, B, False, None, BF16, torch.ones(1, 8), None), "supported blocks configurations"),
        ((A, False, B, False, None, BF16, torch.ones(2, 2), torch.ones(2, 6)), "2x4 @ 4x1"),
        ((A, False, B, False, None, BF16, torch.ones(4, 2), torch.ones(2, 3)), "1x4 @ 4x2"),
        ((A, False, B, False, None, BF16, None, torch.ones(8, 1)), "supported blocks configurations"),
        ((A, False, B, False, None, BF16, None, None, torch.ones(5)), "bias of shape"),
        ((A, False, B, False, None, BF16, None, None, torch.ones(6).half()), "dtype of bias"),
        ((A, False, B, False, None, BF16, None, None, None, True), "Accumulation tensor must be provided at index 4"),
        ((A, False, B, False, torch.ones(6), BF16, None, None, None, True), "D has shape"),
        ((A, False, B, False, None, BF16, [1.0], [1.0, 2.0], None, False, [3]), "Number of scale elements"),
    ],
)
def test_refused(gaudi2, args, message):
    with pytest.raises(RuntimeError, match=message):
        gemm(*args)
    assert gaudi2.calls == []


def test_the_older_bridge_has_no_scales_of_blocks():
    blocks = (torch.ones(4, 2), torch.ones(2, 6))
    with gaudi.emulated("gaudi2", bridge="1.19"):
        with pytest.raises(RuntimeError, match="along the contracted dimension a scale has size one"):
            gemm(A, False, B, False, None, BF16, *blocks)
        assert gemm(A, False, B, False, None, BF16, torch.ones(4, 1), torch.ones(6)).shape == (4, 6)
    with gaudi.emulated("gaudi2", bridge="1.24"), pytest.raises(RuntimeError, match="1x4 @ 4x1"):
        gemm(A, False, B, False, None, BF16, *blocks)
