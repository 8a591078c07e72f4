"""The exception family: one base, the builtin that fits, and a hint at the nearest valid name."""

import inspect

import pytest

from optimum_fp8 import errors
from optimum_fp8.errors import FP8Error, nearest

FAMILY = {
    "FP8ConfigError": ValueError,
    "FP8SelectionError": ValueError,
    "FP8ScaleError": ValueError,
    "FP8OperandError": RuntimeError,
    "FP8CalibrationError": ValueError,
    "FP8MeasurementError": RuntimeError,
    "FP8StateError": RuntimeError,
    "FP8CheckpointError": RuntimeError,
    "FP8NotAvailableError": NotImplementedError,
}


@pytest.mark.parametrize("name, builtin", FAMILY.items())
def test_each_is_caught_as_its_base_and_as_a_builtin(name, builtin):
    for caught in (FP8Error, builtin):
        with pytest.raises(caught, match="what to do next"):
            raise getattr(errors, name)("what to do next")


def test_every_error_belongs_to_the_family():
    classes = dict(inspect.getmembers(errors, lambda value: getattr(value, "__module__", "") == errors.__name__))
    del classes["nearest"]
    assert classes.pop("FP8Error") is FP8Error
    assert all(issubclass(value, FP8Error) and value.__doc__ for value in classes.values())
    assert set(FAMILY) <= set(classes)
    assert all(issubclass(value, ValueError | RuntimeError) for value in classes.values())


@pytest.mark.parametrize(
    "word, choices, expected",
    [
        ("maxabs_h", ["maxabs_hw", "unit_scale"], "did you mean 'maxabs_hw'? valid: maxabs_hw, unit_scale"),
        ("e4m4", ["E4M3", "E5M2"], "did you mean 'E4M3'? valid: E4M3, E5M2"),
        ("CPU", ["cpu"], "did you mean 'cpu'? valid: cpu"),
        ("zzz", ["cpu", "cuda"], "valid: cpu, cuda"),
        (None, ["cpu"], "valid: cpu"),
        (8, [4, 8], "did you mean '8'? valid: 4, 8"),
        ("a", iter(["a", "b"]), "did you mean 'a'? valid: a, b"),
        ("a", [], "valid: "),
    ],
)
def test_nearest(word, choices, expected):
    assert nearest(word, choices) == expected


def test_of_many_the_nearest_are_shown_first():
    layers = [f"layers.{number}.{name}" for number in range(20) for name in ("q_proj", "up_proj", "down_proj")]
    hint = nearest("layers.7.u_proj", reversed(layers), closest=3)
    assert hint == ("did you mean 'layers.7.up_proj'? valid: layers.7.up_proj, layers.17.up_proj, layers.7.q_proj, …")
    assert nearest("q", ["q", "k"], closest=3) == "did you mean 'q'? valid: q, k"
