"""Flags for the keys of FP8Config: each key that can be said has one, and says a value that the key takes."""

from __future__ import annotations

from argparse import ArgumentParser

import pytest

from optimum_fp8 import FP8Config
from optimum_fp8.config.flags import add_flags, given_flags
from optimum_fp8.config.keys import KEYS

SAID = {
    "fp8_config": (["e5m2"], "e5m2"),
    "allowlist": (['{"names": ["mlp"]}'], {"names": ["mlp"]}),
    "scale_method": (['{"default": "maxabs_hw"}'], {"default": "maxabs_hw"}),
    "input_backoff": (["0.5"], 0.5),
    "num_calibration_samples": (["4"], 4),
    "modules_to_not_convert": (["a", "b"], ["a", "b"]),
    "decode_steps": (["0"], 0),
    "overrides": (['{"mlp": {"use_qdq": true}}'], {"mlp": {"use_qdq": True}}),
    "use_qdq": ([], True),
}


@pytest.fixture
def parser():
    parser = ArgumentParser()
    add_flags(parser)
    return parser


def test_every_key_that_can_be_said_has_a_flag(parser):
    flags = {action.dest for action in parser._actions} - {"help"}
    assert set(KEYS) - flags == {"dequantize", "format_version", "model_class"}
    assert given_flags(parser.parse_args([])) == {}
    assert parser.format_help()


@pytest.mark.parametrize("name", SAID)
def test_flags_say_values(parser, name):
    arguments, value = SAID[name]
    given = given_flags(parser.parse_args([KEYS[name].flag, *arguments]))
    assert given == {name: value}
    FP8Config(**given)


def test_a_flag_may_switch_off(parser):
    assert given_flags(parser.parse_args(["--no-attention", "--scale-method", "maxabs_pow2"])) == {
        "attention": False,
        "scale_method": "maxabs_pow2",
    }


def test_bad_json_is_a_usage_error(parser, capsys):
    with pytest.raises(SystemExit):
        parser.parse_args(["--overrides", "{mlp}"])
    assert "is not JSON" in capsys.readouterr().err
