"""Products on torch's matrix product of decoded panels, against float64 products of the same rounded operands, on every
variant, in both dtypes of panels."""

import itertools

import pytest
import torch
from grids import over
from product_bounds import codes_like, excess, products, scale_for

from optimum_fp8 import ops
from optimum_fp8.ops.arguments import LinearCall
from optimum_fp8.ops.cpu import library, torch_panels
from optimum_fp8.ops.cpu.casts import Casts
from optimum_fp8.ops.cpu.linear import Linear
from optimum_fp8.ops.cpu.torch_panels import TorchPanels
from optimum_fp8.ops.cpu.torch_products import FROM_ROWS, NEVER, FromRows

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FULL_SCALES = {E4M3: (240.0, 448.0), E5M2: (57344.0,)}
KINDS = ["tensor", "channel", "blocks", "groups of 128", "groups of 32"]
VARIANTS = [backend.removeprefix("cpu_") for backend in ops.cpu.backends() if backend.removeprefix("cpu_") in FROM_ROWS]
ALWAYS, IN_FLOAT32 = FromRows(0, 0, 0), FromRows(in_float32=0)


def panels_of(variant, from_rows=ALWAYS):
    panels = TorchPanels(Casts(library.load(), variant), variant)
    panels.from_rows, panels.least_rows = from_rows, min(from_rows)
    return panels


def powers_of_two(shape):
    return torch.exp2(torch.randint(-12, 4, shape).float())


def assert_right(panels, call):
    y, x = panels.run(call), call.x
    assert y.shape == (*x.shape[:-1], len(call.weight)) and y.dtype == x.dtype and y.is_contiguous()
    exact, bound = products(*call[:4], call.full_scale, pairs=x.dtype == torch.bfloat16)
    beyond = excess(y, exact, bound, call.bias, call.arithmetic)
    assert beyond.numel() == 0 or beyond.max() <= 0
    return y


def calls(kind, fp8, scales):
    """Of each dtype of the input and kind of its scale, with biases and arithmetics in turn; `scales` makes scales of a
    shape."""
    weight = codes_like((150, 256), fp8)
    shape = scale_for(weight, kind).shape
    input_scales = [None, (1,), (21, 1), (21, 2), (21, 8)]
    options = itertools.cycle(
        itertools.product((None, torch.randn(150), torch.randn(150).bfloat16()), ("fused", "gaudi"), FULL_SCALES[fp8])
    )
    for dtype, of_input in itertools.product(
        (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32), input_scales
    ):
        bias, arithmetic, full_scale = next(options)
        input_scale = None if of_input is None else scales(of_input)
        x = (torch.randn(21, 256) / 16).to(dtype)
        yield LinearCall(x, weight, scales(shape) / 64, input_scale, bias, full_scale, arithmetic)


@over(variant=[variant for variant in VARIANTS if variant in ("portable", "avx2")], kind=KINDS)
def test_all_kinds_of_calls(variant, kind):
    for fp8, from_rows in ((E4M3, ALWAYS), (E5M2, ALWAYS), (E4M3, IN_FLOAT32)):
        panels = panels_of(variant, from_rows)
        for scales in (powers_of_two, lambda shape: torch.rand(shape) * 0.05 + 1e-3):
            for call in calls(kind, fp8, scales):
                assert_right(panels, call)


@over(variant=VARIANTS, fp8=[E4M3, E5M2])
def test_every_code(variant, fp8):
    """Row n of the weight is full of code n: NaN and Inf come out of its own column alone."""
    weight, halves = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 128).view(fp8), torch.full((24, 1), 0.5)
    for full_scale, from_rows in itertools.product(FULL_SCALES[fp8], (ALWAYS, IN_FLOAT32)):
        for scale, of_input in ((0.011, None), (2.0**-7, None), (0.011, torch.tensor([0.02])), (2.0**-7, halves)):
            x = torch.randn(24, 128).abs().bfloat16()
            for weight_scale in (torch.tensor([scale]), torch.full((256, 1), scale), torch.full((2, 1), scale)):
                y = assert_right(
                    panels_of(variant, from_rows),
                    LinearCall(x, weight, weight_scale, of_input, None, full_scale, "fused"),
                )
                assert torch.equal(y.isnan(), weight.float().isnan()[:, 0].expand_as(y))
                assert torch.equal(y.isinf(), weight.float().isinf()[:, 0].expand_as(y))


@over(variant=VARIANTS, kind=KINDS)
def test_panels_and_parts_of_the_input_lie_side_by_side(variant, kind, monkeypatch):
    """Of which the last ones are smaller."""
    monkeypatch.setattr(torch_panels, "_PANEL", 128 * 96)
    monkeypatch.setattr(torch_panels, "_INPUT", 0)
    monkeypatch.setattr(torch_panels, "_ROWS", 16)
    for out, rows, group, from_rows in itertools.product((257, 384), (16, 37), (32,), (ALWAYS, IN_FLOAT32)):
        weight = codes_like((out, 128), E4M3)
        for scales in (powers_of_two, lambda shape: torch.rand(shape) * 0.05 + 1e-3):
            scale = scales(scale_for(weight, kind).shape) / 64
            input_scale = scales((rows, 128 // group))
            call = LinearCall(
                torch.randn(rows, 128).bfloat16(),
                weight,
                scale,
                input_scale,
                torch.randn(out).bfloat16(),
                448.0,
                "fused",
            )
            assert_right(panels_of(variant, from_rows), call)


@over(variant=VARIANTS)
def test_inputs_of_any_layout(variant):
    weight, bias = codes_like((150, 128), E4M3), torch.randn(300).bfloat16()[::2]
    rows = torch.randn(2, 5, 3, 128).bfloat16()
    layouts = [rows, torch.randn(128, 30).bfloat16().t(), torch.randn(30, 140).bfloat16()[:, 7:135]]
    layouts += [torch.randn(1, 128).bfloat16().expand(30, 128), torch.randn(0, 128).bfloat16()]
    for x, scale, from_rows in itertools.product(layouts, (0.01, 2.0**-6), (ALWAYS, IN_FLOAT32)):
        panels = panels_of(variant, from_rows)
        for weight_scale in (torch.tensor([scale]).expand(150, 1), torch.full((150, 2), scale)[:, :1]):
            of_rows = torch.full((*x.shape[:-1], 2), scale)[..., :1]
            for input_scale in (None, of_rows):
                assert_right(panels, LinearCall(x, weight, weight_scale, input_scale, bias, 448.0, "fused"))


def test_no_more_than_a_panel_is_decoded_at_a_time(monkeypatch):
    casts, sizes = Casts(library.load(), "portable"), []
    decode = casts.decode
    monkeypatch.setattr(casts, "decode", lambda codes, scale, into: sizes.append(into) or decode(codes, scale, into))
    panels = TorchPanels(casts, "portable")
    weight = torch.zeros(4096, 2048).to(E4M3)
    panels.run(LinearCall(torch.ones(64, 2048), weight, torch.ones(1), None, None, 448.0, "fused"))
    assert len(sizes) > 1 and len({panel.data_ptr() for panel in sizes}) == 1
    assert max(panel.numel() for panel in sizes) <= torch_panels._PANEL * torch.get_num_threads()


def call_of(rows, **other):
    call = LinearCall(
        torch.randn(rows, 96).bfloat16(), codes_like((40, 96), E4M3), torch.ones(1), None, None, 448.0, "fused"
    )
    return call._replace(**other)


def test_no_fewer_rows_are_taken_than_the_table_says():
    panels = panels_of("portable", FromRows(9, 20, 13))
    assert panels.run(call_of(8)) is None and panels.run(call_of(9)) is not None
    assert (
        panels.run(call_of(12, bias=torch.randn(40))) is None
        and panels.run(call_of(13, bias=torch.randn(40))) is not None
    )
    assert panels_of("portable", FromRows(9, 20)).run(call_of(19, weight_scale=torch.ones(40, 3))) is None


def test_groups_of_which_the_last_is_smaller_are_left():
    panels = panels_of("portable")
    whole, part = codes_like((40, 96), E4M3), codes_like((40, 100), E4M3)
    assert panels.run(call_of(30, weight=whole, weight_scale=torch.ones(40, 3))) is not None
    x = torch.randn(30, 100).bfloat16()
    assert panels.run(call_of(30, x=x, weight=part, weight_scale=torch.ones(40, 4))) is None
    assert panels.run(call_of(30, x=x, weight=part, input_scale=torch.ones(30, 4))) is None


def test_a_forked_child_keeps_to_its_thread(monkeypatch):
    """torch's product would wait there for threads that are gone."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(library._Threads, "forked", True)
        assert panels_of("portable").run(call_of(30)) is None
        torch.set_num_threads(1)
        assert panels_of("portable").run(call_of(30)) is not None
    finally:
        torch.set_num_threads(threads)


def test_prepared_calls_leave_many_rows_to_panels():
    linear = Linear(Casts(library.load(), "portable"), "portable")
    call = call_of(4)
    prepared = linear.prepare(call)
    assert torch.equal(prepared(call), linear.run(call))
    assert prepared(call._replace(x=torch.randn(2, linear.panels.least_rows, 96).bfloat16())) is None
    assert Linear(linear.casts, "tiles").panels.least_rows == NEVER


@pytest.mark.parametrize("requires_grad", [False, True])
def test_gradients_are_what_they_are_elsewhere(requires_grad):
    x, weight = torch.randn(40, 96, dtype=torch.bfloat16, requires_grad=requires_grad), codes_like((40, 96), E4M3)
    found = {}
    for backend in ("cpu_portable", "reference"):
        with ops.backend(backend):
            y = ops.linear(x, weight, torch.full((1,), 2.0**-9), None, None, full_scale=448.0)
        assert y.requires_grad == requires_grad
        found[backend] = torch.autograd.grad(y.sum(), x)[0] if requires_grad else y
    torch.testing.assert_close(found["cpu_portable"], found["reference"], rtol=2**-7, atol=1e-3)
