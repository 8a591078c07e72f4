"""From whatever a user calls a dataset to batches: every accepted form, and every bad one with its message."""

import json

import datasets
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.utils.data import DataLoader
from transformers import BatchFeature, PreTrainedTokenizerFast

from optimum_fp8 import FP8Config
from optimum_fp8.calibration.loaders import batch_size_of, batches
from optimum_fp8.errors import FP8CalibrationError, FP8ConfigError

TEXTS = ["a b c", "b", "c c c c", "a"]


def make_tokenizer(**special):
    words = {word: number for number, word in enumerate(["<pad>", "<unk>", "a", "b", "c"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(pad_token="<pad>")


class ImageProcessor:
    """Gives the mean of each image as its pixel values."""

    def __call__(self, images, return_tensors):
        assert return_tensors == "pt"
        values = [torch.full((3, 2, 2), float(image.convert("L").getpixel((0, 0)))) for image in images]
        return BatchFeature({"pixel_values": torch.stack(values)})


def load(dataset, **options):
    return list(batches(FP8Config(dataset=dataset, **options), ""))


def ids(batch):
    return batch["input_ids"].tolist()


# --- text ---------------------------------------------------------------------------------------------------------


def text_file(folder):
    path = folder / "texts.txt"
    path.write_text("a b c\n\nb\n", encoding="utf-8")
    return str(path)


def json_lines(folder, column="text"):
    path = folder / "texts.jsonl"
    path.write_text("\n\n".join(json.dumps({column: text, "label": 1}) for text in TEXTS) + "\n")
    return str(path)


@pytest.mark.core
@pytest.mark.parametrize(
    "make",
    [
        lambda folder: TEXTS,
        lambda folder: tuple(TEXTS),
        json_lines,
        lambda folder: datasets.Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0, 1]}),
        lambda folder: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(),
    ],
    ids=["list", "tuple", "jsonl", "Dataset", "IterableDataset"],
)
def test_text_is_tokenized_in_order(make, tmp_path, tokenizer):
    found = load(make(tmp_path), tokenizer=tokenizer)
    assert [ids(batch) for batch in found] == [[[2, 3, 4]], [[3]], [[4, 4, 4, 4]], [[2]]]


def test_a_text_file_is_cut_into_paragraph_sized_samples(tmp_path, tokenizer):
    assert [ids(batch) for batch in load(text_file(tmp_path), tokenizer=tokenizer)] == [[[2, 3, 4, 3]]]
    (tmp_path / "long.txt").write_text(("a " * 600 + "\n\n") * 4)
    samples = load(tmp_path / "long.txt", tokenizer=tokenizer, max_seq_length=4096)
    assert [batch["input_ids"].shape[1] for batch in samples] == [1200, 1200]


@pytest.mark.parametrize("kind", ["jsonl", "Dataset"])
def test_text_column(kind, tmp_path, tokenizer):
    dataset = json_lines(tmp_path, "body")
    if kind == "Dataset":
        dataset = datasets.Dataset.from_dict({"label": TEXTS, "body": TEXTS})
    assert ids(load(dataset, tokenizer=tokenizer, text_column="body")[0]) == [[2, 3, 4]]


@pytest.mark.parametrize("limit, tokens", [(1, [1, 1, 1, 1]), (3, [3, 1, 3, 1]), (100, [3, 1, 4, 1])])
def test_max_seq_length(limit, tokens, tokenizer):
    found = load(TEXTS, tokenizer=tokenizer, max_seq_length=limit)
    assert [batch["input_ids"].shape[1] for batch in found] == tokens


@pytest.mark.core
def test_batches_are_padded_and_say_where(tokenizer):
    first, second = load(TEXTS[:3], tokenizer=tokenizer, batch_size=2)
    assert first["input_ids"].shape == (2, 3) and second["input_ids"].shape == (1, 4)
    assert first["attention_mask"].sum(1).tolist() == [3, 1]


def test_blank_texts_are_left_out(tokenizer):
    assert len(load(["", "a b", "  \n"], tokenizer=tokenizer)) == 1


def test_blank_texts_do_not_count_as_samples(tokenizer):
    found = load(["", "a", "", "b", "c"], tokenizer=tokenizer, num_calibration_samples=2)
    assert [ids(batch) for batch in found] == [[[2]], [[3]]]


def test_a_tokenizer_given_as_a_folder(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    assert ids(load(["a b"], tokenizer=str(tmp_path))[0]) == [[2, 3]]
    assert ids(next(iter(batches(FP8Config(dataset=["a b"]), str(tmp_path))))) == [[2, 3]], "or beside the model"


# --- ready inputs -------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("torch_format", [False, True])
def test_rows_of_model_inputs_are_collated(torch_format):
    dataset = datasets.Dataset.from_dict(
        {"input_ids": [[1, 2], [3, 4], [5, 6]], "attention_mask": [[1, 1], [0, 1], [1, 1]], "label": [0, 1, 0]}
    )
    dataset = dataset.with_format("torch") if torch_format else dataset
    first, second = load(dataset, batch_size=2)
    assert ids(first) == [[1, 2], [3, 4]] and ids(second) == [[5, 6]]
    assert set(first) == {"input_ids", "attention_mask"}, "labels are not for calibration"


def test_rows_of_pixel_values():
    dataset = datasets.Dataset.from_dict({"pixel_values": torch.rand(3, 3, 2, 2).tolist()})
    assert [batch["pixel_values"].shape for batch in load(dataset, batch_size=3)] == [(3, 3, 2, 2)]


def test_images_go_through_the_processor():
    images = [Image.new("RGB", (4, 4), (value, value, value)) for value in (1, 2, 3)]
    dataset = datasets.Dataset.from_dict({"picture": images, "label": [0, 1, 0]}, features=None)
    found = load(dataset.cast_column("picture", datasets.Image()), processor=ImageProcessor(), batch_size=2)
    assert [batch["pixel_values"][:, 0, 0, 0].tolist() for batch in found] == [[1.0, 2.0], [3.0]]


DICTS = [{"input_ids": torch.tensor([[n, n]])} for n in range(4)]


@pytest.mark.core
@pytest.mark.parametrize(
    "dataset",
    [
        lambda: (batch for batch in DICTS),
        lambda: iter(DICTS),
        lambda: DICTS,
        lambda: DataLoader(list(range(4)), collate_fn=lambda rows: DICTS[rows[0]]),
    ],
    ids=["generator", "iterator", "list", "DataLoader"],
)
def test_batches_are_passed_on_as_they_are(dataset):
    assert [ids(batch) for batch in load(dataset())] == [ids(batch) for batch in DICTS]


def test_a_torch_dataset_of_tuples_through_a_loader():
    loader = DataLoader(torch.utils.data.TensorDataset(torch.rand(5, 3), torch.arange(5)), batch_size=2)
    assert [len(batch[0]) for batch in load(loader)] == [2, 2, 1]


# --- how many -----------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    "dataset",
    [
        lambda: ["a"] * 10,
        lambda: datasets.Dataset.from_dict({"text": ["a"] * 10}),
        lambda: datasets.Dataset.from_dict({"input_ids": [[1]] * 10}),
        lambda: (torch.ones(1, 3) for _ in range(10)),
        lambda: DataLoader(torch.ones(10, 3), batch_size=1),
    ],
    ids=["texts", "Dataset of texts", "Dataset of inputs", "generator", "DataLoader"],
)
@pytest.mark.parametrize("samples, expected", [(3, 3), (10, 10), (100, 10)])
def test_num_calibration_samples(dataset, samples, expected, tokenizer):
    found = load(dataset(), num_calibration_samples=samples, tokenizer=tokenizer)
    assert sum(batch_size_of(batch) for batch in found) == expected


def test_no_more_of_a_stream_is_read_than_needed():
    taken = []

    def stream():
        for n in range(100):
            taken.append(n)
            yield torch.ones(2, 3)

    assert len(load(stream(), num_calibration_samples=6)) == 3
    assert len(taken) <= 4


def test_a_generator_of_one_endless_batch_ends():
    def endless():
        while True:
            yield {"input_ids": torch.ones(4, 2, dtype=torch.long)}

    assert len(load(endless(), num_calibration_samples=10)) == 3


@pytest.mark.parametrize(
    "batch, size",
    [
        (torch.ones(3, 2), 3),
        (torch.tensor(1.0), 1),
        ({"x": torch.ones(4, 1)}, 4),
        ({"use_cache": False, "x": torch.ones(4, 1)}, 4),
        ((torch.ones(5, 1), torch.ones(5)), 5),
        ([], 1),
        ({}, 1),
    ],
)
def test_size_of_a_batch(batch, size):
    assert batch_size_of(batch) == size


# --- what cannot be used ------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize(
    "dataset, options, message",
    [
        ("wikitext", {}, "'wikitext' is not a file.*load_dataset"),
        (["a"], {}, "needs a tokenizer and the model has no path.*pass tokenizer="),
        (["a"], {"tokenizer": "./nowhere"}, "no tokenizer at './nowhere'.*pass tokenizer="),
        (["a"], {"batch_size": 2, "tokenizer": make_tokenizer()}, "no pad_token"),
        (datasets.Dataset.from_dict({"text": []}), {}, "the dataset is empty"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}), {}, "one split"),
        (datasets.Dataset.from_dict({"body": ["a"]}), {}, r"columns \['body'\].*set text_column"),
        (datasets.Dataset.from_dict({"input_ids": [[1], [1, 2]]}), {"batch_size": 2}, "different lengths"),
        (datasets.Dataset.from_dict({"text": ["a", None]}), {"tokenizer": make_tokenizer()}, "text"),
    ],
    ids=[
        "hub name", "no tokenizer", "bad tokenizer path", "no padding", "empty", "splits", "columns", "lengths",
        "missing text",
    ],
)  # fmt: skip
def test_bad_data_says_what_to_do(dataset, options, message):
    with pytest.raises((FP8CalibrationError, FP8ConfigError), match=message):
        load(dataset, **options)


def test_images_without_a_processor():
    dataset = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4))]})
    with pytest.raises(FP8CalibrationError, match="needs a processor.*pass processor="):
        load(dataset)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data.csv", "a,b", "suffix '.csv': expected .txt"),
        ("data.jsonl", '{"text": "a"}\n{"text"', "line 2 is not JSON"),
        ("data.jsonl", '{"body": "a"}', r"line 1 has no text under 'text'.*\['body'\]"),
        ("data.jsonl", '["a"]', "line 1 has no text"),
        ("data.txt", b"\xff\xfe\x00", "data.txt"),
        ("data.json", '[\n  {"text": "a"}\n]', "data.json"),
    ],
)
def test_bad_files_say_where(name, content, message, tmp_path, tokenizer):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FP8CalibrationError, match=message):
        load(tmp_path / name, tokenizer=tokenizer)
