"""`optimum-cli fp8 export`."""

from argparse import Namespace

from exporting.conftest import wide_llama

from optimum_fp8.exporting.command import main


def arguments(**options):
    return Namespace(**{"format": "compressed-tensors", "without": [], "verify": False, **options})


def test_writes_a_folder_and_says_so(quantized, tmp_path, capsys):
    _, folder = quantized(wide_llama(), "FP8_DYNAMIC")
    assert main(arguments(model=str(folder), output=str(tmp_path / "out"))) == 0
    assert f"{tmp_path / 'out'}: a checkpoint in the format compressed-tensors" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_an_error_is_one_line(tmp_path, capsys):
    wide_llama().save_pretrained(tmp_path / "plain")
    assert main(arguments(model=str(tmp_path / "plain"), output=str(tmp_path / "out"))) == 1
    assert "holds no FP8 checkpoint of optimum_fp8" in capsys.readouterr().err


def test_files_for_inc_are_called_so(quantized, tmp_path, capsys):
    _, folder = quantized(wide_llama(), "FP8")
    assert main(arguments(model=str(folder), output=str(tmp_path / "out"), format="inc")) == 0
    assert f"{tmp_path / 'out'}: files for Intel Neural Compressor" in capsys.readouterr().out


def test_files_for_inc_cannot_be_verified(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(model="a-folder", output=str(out), format="inc", verify=True)) == 1
    assert "--verify with --format inc: the folder holds no checkpoint" in capsys.readouterr().err
    assert not out.exists()
