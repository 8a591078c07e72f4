"""Zero-shot classification by the embedded CLIP, in FP8 as in bfloat16."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "vision"))

from clip_zero_shot import main


def test_images_get_the_sentences_that_they_get_in_bfloat16(capsys):
    found = main([])
    accuracy = {name: (found[name] == found["truth"]).float().mean().item() for name in ("bfloat16", "FP8")}
    assert accuracy["bfloat16"] > 0.9 and accuracy["FP8"] >= accuracy["bfloat16"] - 0.01
    assert (found["FP8"] == found["bfloat16"]).float().mean() >= 0.98
    assert "of all parameters in FP8" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, said",
    [
        (["--model", "{folder}"], "AutoProcessor cannot load it"),
        (["--model", "{folder}/none"], "AutoProcessor cannot load it"),
    ],
)
def test_a_folder_that_is_no_model_ends_with_one_line(tmp_path, given, said):
    with pytest.raises(SystemExit, match=said) as caught:
        main([argument.format(folder=tmp_path) for argument in given])
    assert "\n" not in str(caught.value)


def test_a_prompt_without_a_place_for_the_number(capsys):
    with pytest.raises(SystemExit):
        main(["--prompt", "a photo"])
    assert "has no {} where the number goes: 'a photo'" in capsys.readouterr().err
