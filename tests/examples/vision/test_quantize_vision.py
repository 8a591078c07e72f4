"""examples/vision/quantize_vision.py on pictures of one's own, and on input that will not do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "examples" / "vision"))

from digits import load_split
from quantize_vision import HERE as VISION
from quantize_vision import main


@pytest.fixture
def pictures(tmp_path) -> Path:
    """The first 24 held-out digits, in a folder for each."""
    for number, (image, label) in enumerate(zip(*(part[:24] for part in load_split("heldout")), strict=True)):
        folder = tmp_path / "pictures" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    return tmp_path / "pictures"


def test_pictures_in_folders_named_as_their_classes(pictures, capsys):
    main(["--model", str(VISION / "tiny_vit"), "--images", str(pictures)])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("tiny_vit"))
    assert row.split()[-3:] == ["100.00%"] * 3


def test_a_class_that_the_model_has_not(pictures):
    (pictures / "7").rename(pictures / "seven")
    with pytest.raises(SystemExit, match=r"the model has no class 'seven', expected a folder named 0, 1,"):
        main(["--model", str(VISION / "tiny_vit"), "--images", str(pictures)])


def test_a_folder_that_is_no_model(pictures):
    with pytest.raises(SystemExit, match="AutoModelForImageClassification cannot load it") as caught:
        main(["--model", str(pictures), "--images", str(pictures)])
    assert "\n" not in str(caught.value)


def test_one_needs_the_other(capsys):
    with pytest.raises(SystemExit):
        main(["--model", str(VISION / "tiny_vit")])
    assert "--model and --images go together" in capsys.readouterr().err
