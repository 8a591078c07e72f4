"""The script that checks a file of card values: its counts and its exit codes."""

import json

import pytest
from scales.check_gaudi_cards import main

ROWS = [["gaudi3", "activation", 14.0625, 0.125], ["gaudi2", "weight", 0.47265625, 0.0625]]


@pytest.mark.parametrize(
    "content, code, message",
    [
        ({"rows": ROWS}, 0, "all: 2 of 2 equal"),
        ({"rows": [*ROWS, ["gaudi3", "weight", 28.125, 0.25]]}, 1, "maxabs 28.125 gives 0.125, the card gave 0.25"),
        ({"rows": []}, 1, "all: 0 of 0 equal"),
        ({"lines": ROWS}, 2, "cannot be checked"),
        ({"rows": [["gaudi1", "weight", 1.0, 1.0]]}, 2, "cannot be checked"),
        ({"rows": [["gaudi2", "output", 1.0, 1.0]]}, 2, "neither 'activation' nor 'weight'"),
        ([], 2, "cannot be checked"),
    ],
)
def test_file(tmp_path, capsys, content, code, message):
    path = tmp_path / "cards.json"
    path.write_text(json.dumps(content))
    assert main([str(path)]) == code
    assert message in "".join(capsys.readouterr())


@pytest.mark.parametrize("arguments", [[], ["no such file"], ["one", "two"]])
def test_bad_path(arguments):
    assert main(arguments) == 2
