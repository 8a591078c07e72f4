"""Number formats: full scales, hardware scales and dtypes per target, and errors for unknown names."""

import copy
import types

import fresh
import pytest
import torch

from optimum_fp8.errors import FP8ConfigError
from optimum_fp8.formats import (
    FP8_DTYPES,
    GAUDI_TARGETS,
    HP_DTYPES,
    TARGETS,
    HardwareScales,
    detect_target,
    hp_torch_dtype,
    is_fp8,
    number_format,
)
from optimum_fp8.test_utils import gaudi

EVERYWHERE = [(fp8, target) for fp8 in FP8_DTYPES for target in TARGETS]


@pytest.mark.core
@pytest.mark.parametrize(
    "fp8, target, dtype, full_scale",
    [
        ("E4M3", "gaudi2", torch.float8_e4m3fn, 240.0),
        ("E4M3", "gaudi3", torch.float8_e4m3fn, 448.0),
        ("E4M3", "cuda", torch.float8_e4m3fn, 448.0),
        ("E4M3", "cpu", torch.float8_e4m3fn, 448.0),
        *[("E5M2", target, torch.float8_e5m2, 57344.0) for target in TARGETS],
    ],
)
def test_full_scale_and_dtype(fp8, target, dtype, full_scale):
    fmt = number_format(fp8, target)
    assert (fmt.name, fmt.target, fmt.dtype, fmt.full_scale) == (fp8, target, dtype, full_scale)
    assert fmt.is_gaudi == target.startswith("gaudi")
    assert torch.tensor(full_scale).to(dtype).float().item() == full_scale <= torch.finfo(dtype).max


@pytest.mark.parametrize(
    "target, scales",
    [
        ("gaudi2", [16, 1, 2**-4, 2**-8]),
        ("gaudi3", [2.0**e for e in range(7, -56, -1)]),
        ("cuda", [2.0**e for e in range(126, -127, -1)]),
        ("cpu", [2.0**e for e in range(126, -127, -1)]),
    ],
)
@pytest.mark.parametrize("fp8", FP8_DTYPES)
def test_hardware_scales(fp8, target, scales):
    fmt = number_format(fp8, target)
    assert fmt.hardware_scales.descending() == scales
    assert all(torch.isfinite(1 / torch.tensor(scales)))


@pytest.mark.parametrize("fp8, target", EVERYWHERE)
def test_search_scales_are_few_hardware_scales(fp8, target):
    fmt = number_format(fp8, target)
    assert len(fmt.search_scales) == (4 if target == "gaudi2" else 63)
    assert set(fmt.search_scales) <= set(fmt.hardware_scales.descending())
    assert fmt.search_scales == sorted(fmt.search_scales, reverse=True)


@pytest.mark.parametrize("fp8, target", EVERYWHERE)
def test_copy_is_the_same_format(fp8, target):
    fmt = number_format(fp8, target)
    copied = copy.deepcopy(fmt)  # as happens to everything a config or a module holds
    assert copied == fmt
    assert copied.search_scales == fmt.search_scales


def test_formats_are_values():
    assert number_format("e4m3", "cpu") == number_format("E4M3", "cpu") == number_format()
    assert len({number_format(fp8, target) for fp8, target in EVERYWHERE}) == 8
    with pytest.raises(AttributeError):
        number_format().full_scale = 1.0


def test_hardware_scales_step():
    assert HardwareScales(min_exponent=-2, max_exponent=2, step=2).descending() == [4.0, 1.0, 0.25]


@pytest.mark.parametrize(
    "names, hint",
    [
        (("E4M4",), "fp8_config='E4M4'.*did you mean 'E4M3'.*valid: E4M3, E5M2"),
        (("int8",), "valid: E4M3, E5M2"),
        (("E4M3", "gaudy3"), "target='gaudy3'.*did you mean 'gaudi3'.*valid: gaudi2, gaudi3, cuda, cpu"),
        (("E4M3", "auto"), "target='auto'"),
    ],
)
def test_unknown_format_or_target(names, hint):
    with pytest.raises(FP8ConfigError, match=hint):
        number_format(*names)


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_high_precision_dtypes(name, dtype):
    assert hp_torch_dtype(name) == HP_DTYPES[name] == dtype


def test_unknown_high_precision_dtype():
    with pytest.raises(FP8ConfigError, match="hp_dtype='bf32'.*did you mean '.*valid: bf16, fp16, fp32"):
        hp_torch_dtype("bf32")


def test_is_fp8():
    assert is_fp8(torch.float8_e4m3fn) and is_fp8(torch.float8_e5m2)
    assert not any(map(is_fp8, [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.bfloat16, torch.int8]))


def bridge(name: str | None) -> types.SimpleNamespace:
    return types.SimpleNamespace(is_available=lambda: name is not None, get_device_name=lambda: name)


@pytest.mark.parametrize(
    "device_name, cuda, target",
    [
        ("GAUDI3", False, "gaudi3"),
        ("GAUDI2", True, "gaudi2"),
        ("Gaudi 3 HL-325L", False, "gaudi3"),
        ("GAUDI2D", False, "gaudi2"),
        (None, True, "cuda"),
        (None, False, "cpu"),
    ],
)
def test_detected_target(monkeypatch, device_name, cuda, target):
    monkeypatch.setattr(torch, "hpu", bridge(device_name), raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert detect_target() == target


@pytest.mark.parametrize("name", ["GAUDI4", "GAUDI", "GAUDI30", "HL-999", ""])
def test_a_device_of_an_unknown_generation(monkeypatch, name):
    monkeypatch.setattr(torch, "hpu", bridge(name), raising=False)
    with pytest.raises(
        FP8ConfigError, match=rf"calls itself '{name}', expected one of gaudi2, gaudi3: name the target"
    ):
        detect_target()


@pytest.mark.parametrize("chip", ["gaudi2", "gaudi3"])
def test_a_bridge_that_was_imported_is_asked(chip):
    assert detect_target() not in GAUDI_TARGETS
    with gaudi.emulated(chip):
        assert not hasattr(torch, "hpu") and detect_target() == chip
    assert detect_target() not in GAUDI_TARGETS


@pytest.mark.slow
def test_a_bridge_is_not_imported_to_find_out(tmp_path):
    (tmp_path / "habana_frameworks").mkdir()
    (tmp_path / "habana_frameworks" / "__init__.py").write_text("raise SystemExit('imported')")
    script = "import optimum_fp8\nprint(optimum_fp8.FP8Config().resolved_target)"
    assert fresh.TRANSFORMERS.run(script, folder=tmp_path).split()[-1] in ("cpu", "cuda")
