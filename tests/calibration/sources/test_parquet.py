"""Calibration data from Parquet files."""

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from tiny_models import tiny_llama
from transformers import AutoImageProcessor

from optimum_fp8.calibration import ModelFacts, facts_of
from optimum_fp8.errors import FP8CalibrationError

pytestmark = pytest.mark.usefixtures("no_network")

LLAMA = facts_of(tiny_llama())


def write(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.core
def test_text_and_model_inputs(tmp_path, load, ids, tokenizer):
    path = write(tmp_path / "texts.parquet", text=["a b", "c"], id=[1, 2])
    assert [ids(batch) for batch in load(path, LLAMA, tokenizer=tokenizer)] == [[[2, 3]], [[4]]]
    path = write(tmp_path / "inputs.parquet", input_ids=[[1, 2], [3, 4]])
    assert [ids(batch) for batch in load(path, LLAMA, batch_size=2)] == [[[1, 2], [3, 4]]]
    path = write(tmp_path / "many.parquet", text=["a"] * 50)
    assert len(load(path, LLAMA, tokenizer=tokenizer, num_calibration_samples=5)) == 5


@pytest.mark.core
def test_images_as_the_library_writes_them(tmp_path, load):
    images = [Image.new("RGB", (32, 32), (value, 0, 0)) for value in (10, 200)]
    datasets.Dataset.from_dict({"image": images, "label": [0, 1]}).to_parquet(tmp_path / "images.parquet")
    processor = AutoImageProcessor.from_pretrained("examples/vision/tiny_vit", backend="pil")
    sees = ModelFacts(inputs=frozenset({"pixel_values"}), main_input="pixel_values")
    (batch,) = load(tmp_path / "images.parquet", sees, processor=processor, batch_size=2)
    assert torch.equal(batch["pixel_values"], processor(images, return_tensors="pt")["pixel_values"])


def test_files_that_cannot_be_read(tmp_path, load, tokenizer):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(FP8CalibrationError, match="broken.parquet' cannot be read"):
        load(tmp_path / "broken.parquet", LLAMA, tokenizer=tokenizer)
    path = write(tmp_path / "other.parquet", body=["a"])
    with pytest.raises(FP8CalibrationError, match=r"has the columns \['body'\]: .*set text_column \(valid: body\)"):
        load(path, LLAMA, tokenizer=tokenizer)
