"""What rescale and requantize share: how keys replace those of a checkpoint, and what they say of the result."""

from __future__ import annotations

import pytest

from optimum_fp8 import FP8CheckpointError, FP8Config, FP8ConfigError
from optimum_fp8.checkpoint.folder import config_of_transformers
from optimum_fp8.rescaling.opened import Rewritten, open_checkpoint, refuse_existing, with_keys
from optimum_fp8.rescaling.weights import Added


def test_keys_hold_for_all_modules_and_other_overrides_stay():
    overrides = {"a": {"scale_method": "maxabs_pow2"}, "b": {"scale_method": "maxabs_hw", "input_backoff": 0.5}}
    config = with_keys(FP8Config(overrides=overrides, target="gaudi3"), {"scale_method": "full_range"})
    assert config.scale_method == "full_range" and config.overrides == {"b": {"input_backoff": 0.5}}
    assert config.target == "gaudi3"
    with pytest.raises(FP8ConfigError, match="weight_only"):
        with_keys(FP8Config(attention=True), {"activation_scheme": "weight_only"})


def test_the_worst_module_comes_first():
    rows = [Added("a", 8, 0, 0.0), Added("b", 8, 2, 0.01), Added("c", 8, 4, 0.02)]
    made = Rewritten("/out", FP8Config(), rows)
    assert [row.module for row in made.rounded] == ["c", "b"] and made.error == 0.02
    assert made.change() == {"modules_rounded_again": 2, "largest_added_error": 0.02}
    assert Rewritten("/out", FP8Config(), (), "/home/me/base/").change() == {"original": "base"}
    assert Rewritten("/out", FP8Config(), ()).error == 0.0


def test_opened_for_the_target_that_it_was_made_for(fp8):
    folder = fp8(FP8Config(activation_scheme="dynamic", target="gaudi2"))
    model, state = open_checkpoint(str(folder))
    assert state.config.target == "gaudi2" and "changes" not in state.provenance
    assert type(model).__name__ == config_of_transformers(str(folder))["architectures"][0]


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(FP8CheckpointError, match="is not a folder"):
        config_of_transformers(str(tmp_path / "nothing"))
    with pytest.raises(FP8CheckpointError, match="exists"):
        refuse_existing(str(tmp_path))
    refuse_existing(str(tmp_path / "nothing"))


def test_a_class_that_transformers_does_not_have(fp8):
    folder = fp8(FP8Config(activation_scheme="dynamic", target="gaudi2"))
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"LlamaForCausalLM"\n', '"OtherForCausalLM"\n', 1))
    with pytest.raises(FP8CheckpointError, match="OtherForCausalLM.*which transformers .* does not have"):
        open_checkpoint(str(folder))
