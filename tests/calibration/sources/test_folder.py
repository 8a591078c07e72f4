"""Calibration data from folders."""

import json
import wave

import datasets
import pytest
import torch
from PIL import Image
from tiny_models import tiny_llama
from transformers import AutoImageProcessor, Wav2Vec2FeatureExtractor

from optimum_fp8.calibration import ModelFacts, check_dataset, facts_of
from optimum_fp8.errors import FP8CalibrationError

pytestmark = pytest.mark.usefixtures("no_network")

LLAMA = facts_of(tiny_llama())
SEES = ModelFacts(inputs=frozenset({"pixel_values"}), main_input="pixel_values")
HEARS = ModelFacts(inputs=frozenset({"input_values", "attention_mask"}), main_input="input_values")


@pytest.fixture
def texts(load, ids, tokenizer):
    """`texts(folder)`: the tokens of each sample."""
    return lambda folder, **keys: [ids(each)[0] for each in load(folder, LLAMA, tokenizer=tokenizer, **keys)]


@pytest.mark.core
def test_a_folder_of_images(tmp_path, load):
    images = []
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        images.append(Image.new("RGB", (32, 32), (len(images) * 90, 0, 0)))
        images[-1].save(tmp_path / label / "one.png")
    processor = AutoImageProcessor.from_pretrained("examples/vision/tiny_vit", backend="pil")
    (batch,) = load(tmp_path, SEES, processor=processor, batch_size=2)
    assert torch.equal(batch["pixel_values"], processor(images, return_tensors="pt")["pixel_values"])


@pytest.mark.core
def test_a_folder_of_audio(tmp_path, load):
    for name in ("b.wav", "a.wav"):
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(bytes([0, ord(name[0])] * 500))
    (batch,) = load(tmp_path, HEARS, processor=Wav2Vec2FeatureExtractor(do_normalize=False), batch_size=2)
    assert batch["input_values"][:, 0].tolist() == [97 / 128, 98 / 128]


def test_a_folder_of_texts(tmp_path, texts):
    (tmp_path / "b.txt").write_text("c")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.md").write_text("a b")
    (tmp_path / "README.md").write_text("b")
    (tmp_path / ".hidden").write_text("b")
    assert texts(tmp_path) == [[4], [2, 3]]
    with pytest.raises(FP8CalibrationError, match="dataset_split='train', and the dataset='.*' holds plain files"):
        texts(tmp_path, dataset_split="train")


@pytest.fixture
def splits(tmp_path):
    """A folder as the Hub has datasets: files of rows by the names of splits."""
    for split, words in {"train": "aab", "test": "c"}.items():
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps({"text": word}) for word in words))
    (tmp_path / "README.md").write_text("# A dataset\n")
    return tmp_path


@pytest.mark.core
def test_a_folder_of_splits(splits, texts):
    with pytest.raises(
        FP8CalibrationError, match=r"has the splits \['test', 'train'\]: set dataset_split to one of them"
    ):
        texts(splits)
    assert texts(splits, dataset_split="train") == [[2], [2], [3]]
    assert texts(splits, dataset_split="train[1:]") == [[2], [3]] and texts(splits, dataset_split="train[:1]") == [[2]]
    with pytest.raises(FP8CalibrationError, match="dataset_split='trian' is no split of .*did you mean 'train'"):
        texts(splits, dataset_split="trian")
    with pytest.raises(FP8CalibrationError, match=r"'train\[:50%\]' is in per cent, and how many rows .* is not known"):
        texts(splits, dataset_split="train[:50%]")


def test_configurations_in_a_folder(splits, texts):
    files = {"one": "train.jsonl", "two": "test.jsonl"}
    configs = "\n".join(f"- config_name: {name}\n  data_files: {file}" for name, file in files.items())
    (splits / "README.md").write_text(f"---\nconfigs:\n{configs}\n---\n")
    assert texts(splits, dataset_config_name="two") == [[4]]
    with pytest.raises(FP8CalibrationError, match=r"cannot be read: Config name is missing.*; set dataset_config_name"):
        texts(splits)
    with pytest.raises(FP8CalibrationError, match=r"cannot be read: .*three.*one.*two"):
        texts(splits, dataset_config_name="three")


@pytest.mark.core
def test_what_save_to_disk_writes(tmp_path, texts):
    train, test = (datasets.Dataset.from_dict({"text": list(words)}) for words in ("aab", "c"))
    train.save_to_disk(tmp_path / "one")
    assert texts(tmp_path / "one") == [[2], [2], [3]]
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    assert texts(tmp_path / "both", dataset_split="test") == [[4]]
    with pytest.raises(FP8CalibrationError, match="set dataset_split to one of them"):
        texts(tmp_path / "both")


def test_folders_that_hold_nothing(tmp_path, texts):
    with pytest.raises(FP8CalibrationError, match="is a folder without files: expected files of data in it"):
        check_dataset(str(tmp_path))
    (tmp_path / "data.xyz").write_text("a")
    with pytest.raises(FP8CalibrationError, match="cannot be read: "):
        texts(tmp_path)
    with pytest.raises(
        FP8CalibrationError, match="dataset_revision='main' does not go with the path of a folder of data"
    ):
        config_keys = {"dataset_revision": "main"}
        from optimum_fp8 import FP8Config

        config = FP8Config(dataset=str(tmp_path), **config_keys)
        check_dataset(config.dataset).opened(config.dataset, config, LLAMA)
