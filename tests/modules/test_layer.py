"""LayerHandler: what it refuses, what it keeps on disk, what it expects of a checkpoint, other targets, report rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from optimum_fp8 import FP8Config, convert, prepare
from optimum_fp8.errors import FP8CheckpointError, FP8NotAvailableError, FP8ScaleError
from optimum_fp8.formats import number_format
from optimum_fp8.measure import KnownRange, Measurements
from optimum_fp8.modules import FP8Linear, LayerHandler, frozen
from optimum_fp8.modules.handler import Reason, Surroundings, Target
from optimum_fp8.modules.linear import FP8OwnLinear
from optimum_fp8.scales import fit_weight
from optimum_fp8.selection import scheme_for

HANDLER = LayerHandler("mine", (nn.Linear,), FP8Linear, FP8OwnLinear)


class Other(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight) + 1


class PassesOn(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def scheme(**options):
    return scheme_for(FP8Config(**{"target": "cpu", **options}))


def target(module, measurements=None, **options):
    ranges = (measurements or Measurements("")).at("a.b")
    return Target("a.b", module, HANDLER, scheme(**options), ranges)


def replaced(module):
    module.forward = lambda x: x
    return module


def parametrized(module):
    return nn.utils.parametrizations.spectral_norm(module)


def empty(module):
    module.weight = nn.Parameter(torch.empty(3, 0))
    return module


@pytest.mark.core
@pytest.mark.parametrize(
    "module, text",
    [
        (nn.Linear(4, 3), None),
        (PassesOn(4, 3), None),
        (Other(4, 3), "Other has a forward of its own"),
        (replaced(nn.Linear(4, 3)), "its forward was replaced"),
        (parametrized(nn.Linear(4, 3)), "its weight is parametrized"),
        (empty(nn.Linear(4, 3)), r"its weight is not a floating-point matrix ((3, 0), torch.float32)"),
    ],
)
def test_what_it_refuses(module, text):
    why = HANDLER.refusal(module, scheme(), Surroundings(nn.Sequential(module)))
    assert (None if why is None else (why.reason, str(why))) == (text and (Reason.UNFIT, text))


def in_codes(dtype):
    module = nn.Linear(4, 3)
    module.weight = nn.Parameter(torch.ones(3, 4).to(dtype), requires_grad=False)
    return module


@pytest.mark.parametrize(
    "dtype",
    [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz],
)
def test_codes_are_no_values(dtype):
    module = in_codes(dtype)
    why = HANDLER.refusal(module, scheme(), Surroundings(nn.Sequential(module)))
    assert (why.reason, str(why)) == (Reason.CODES, f"its weight is {dtype}")


def test_a_scale_beside_the_weight():
    module = nn.Linear(4, 3)
    module.register_buffer("weight_scale", torch.ones(1))
    why = HANDLER.refusal(module, scheme(), Surroundings(nn.Sequential(module)))
    assert (why.reason, str(why)) == (Reason.UNFIT, "it has 'weight_scale' beside its weight")


def test_names_of_its_classes():
    assert (HANDLER.types, HANDLER.known_types) == (("Linear",), ("Linear", "FalconLinear", "IdeficsDecoupledLinear"))
    assert HANDLER.matches(Other(2, 2)) and not HANDLER.matches(nn.Conv1d(2, 2, 1))


@pytest.mark.parametrize(
    "options, missing", [({}, True), ({"activation_scheme": "dynamic"}, False), ({"scale_method": "unit_scale"}, False)]
)
def test_only_static_scales_that_depend_on_data_need_ranges(options, missing):
    measurements, module = Measurements(""), nn.Linear(4, 3)
    why = HANDLER.missing(target(module, measurements, **options))
    assert (why is not None and why.reason is Reason.NEVER_REACHED) is missing
    measurements.observe("a.b", "weight", module.weight)
    assert (HANDLER.missing(target(module, measurements, **options)) is not None) is missing, "a weight tells nothing"
    measurements.observe("a.b", "input", torch.ones(1, 4))
    assert HANDLER.missing(target(module, measurements, **options)) is None


def test_a_weight_without_a_scale_is_named():
    module = nn.Linear(4, 3)
    with torch.no_grad():
        module.weight[0, 0] = torch.inf

    def quantize(parameter, weight, scheme):
        raise FP8ScaleError("the weight holds NaN or Inf")

    with pytest.raises(FP8ScaleError, match="^a.b: the weight holds"):
        HANDLER.convert(target(module, activation_scheme="dynamic"), nn.Sequential(module), quantize)


# --- checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme_name, names", [("static", {"weight_scale", "input_scale"}), ("dynamic", {"weight_scale"})]
)
def test_what_is_on_disk(scheme_name, names):
    model = prepare(nn.Sequential(nn.Linear(4, 3)), FP8Config(activation_scheme=scheme_name))
    model(torch.ones(1, 4))
    convert(model)
    assert set(HANDLER.state(model[0])) == {"weight", "bias", *names}


def test_what_it_expects_of_a_checkpoint():
    module = nn.Linear(4, 3, device="meta", dtype=torch.bfloat16)
    made = HANDLER.expect(target(module), {"weight_scale": (1,), "input_scale": (1,)})
    assert made.name == "a.b" and made.codes.dtype == torch.float8_e4m3fn
    assert made.input_scale.shape == (1,) and made.input_scale.is_meta
    assert HANDLER.expect(target(module, activation_scheme="dynamic"), {"weight_scale": (1,)}).input_scale is None
    plain = HANDLER.expect(target(module), None)
    assert plain.codes.dtype == torch.float32, "in high precision it is quantized while it is loaded"


# --- other targets ------------------------------------------------------------------------------------------------


def converted(**options):
    torch.manual_seed(0)
    model = prepare(nn.Sequential(nn.Linear(64, 32)), FP8Config(target="cpu", weight_backoff=1.0, **options))
    model(torch.randn(4, 64))
    return convert(model)[0]


def fit(module, made_for: str, to: str) -> None:
    """Fit the weight of a module made for one target to another."""
    scheme = replace(module.scheme, fmt=number_format(module.scheme.fmt.name, to))
    target = Target("a.b", module, HANDLER, scheme, Measurements("").at("a.b"))

    def fitted(codes, scale, scheme):
        fitted = fit_weight(codes, scale, scheme.weight, scheme.fmt)[:2]
        return fitted if fitted[0] is codes else tuple(map(frozen, fitted))

    HANDLER.fit_weight(target, number_format(scheme.fmt.name, made_for), fitted)


@pytest.mark.core
@pytest.mark.parametrize(
    "options", [{}, {"activation_scheme": "dynamic"}, {"scale_method": "maxabs_pcs_pow2"}], ids=str
)
def test_fitted_to_a_smaller_full_scale_values_stay(options):
    module = converted(**options)
    before = module.dequantized_weight(torch.float32)
    fit(module, "cpu", "gaudi2")
    assert module.codes.float().abs().max() <= 240 and module.codes.dtype == torch.float8_e4m3fn
    assert ((module.dequantized_weight(torch.float32) - before).abs() <= module.weight_scale * 2**-10).all()


@pytest.mark.parametrize("to", ["gaudi3", "cuda", "cpu"])
def test_where_the_full_scale_is_no_smaller_nothing_changes(to):
    module = converted()
    before = module.codes
    fit(module, "cpu", to)
    assert module.codes is before


def test_scales_of_inputs_follow_from_ranges_and_the_scheme():
    module = converted()
    ranges = Measurements("", {("a.b", "input"): KnownRange({"gaudi2": 448.0, "cpu": 112.0})}).at("a.b")
    target = Target("a.b", module, HANDLER, module.scheme, ranges)
    assert HANDLER.scales_for(target)["input_scale"].tolist() == [1.0]
    assert HANDLER.scales_for(target.on("gaudi2"))["input_scale"].tolist() == [16.0]
    HANDLER.rescale(module, HANDLER.scales_for(target.on("gaudi2")))
    assert module.input_scale.tolist() == [16.0] and HANDLER.run_time_scales(module) == {
        "input_scale": module.input_scale
    }


def test_codes_that_were_not_made_for_gaudi2_are_refused():
    module = converted()
    assert module.codes.float().abs().max() > 240
    with pytest.raises(
        FP8CheckpointError, match=r"^a\.b\.weight holds codes up to \d+, but gaudi2 reads those above 240"
    ):
        fit(module, "gaudi2", "gaudi2")


def test_offloaded_codes_cannot_be_changed():
    module = converted().to("meta")
    with pytest.raises(FP8NotAvailableError, match="^a.b: changing the target to gaudi2 cannot be offloaded"):
        fit(module, "cpu", "gaudi2")
    fit(module, "gaudi2", "gaudi3")  # whatever they hold, they fit


# --- the report ---------------------------------------------------------------------------------------------------


def test_a_row_says_how_it_is_scaled_and_what_it_ran_on():
    module = converted()
    module(torch.ones(1, 64))
    row = HANDLER.row(module)
    assert row.activations == "static" and row.record is module.record and sum(row.record.kernels.values()) == 1
    assert set(row.scales) == {"weight_scale", "input_scale"}
    assert HANDLER.row(nn.Linear(2, 2)) is None
