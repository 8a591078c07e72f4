"""The calibration loop: every kind of batch, limits, the model left as it was."""

import logging

import pytest
import torch
from tiny_models import tiny_llama
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from optimum_fp8 import FP8Config, calibrate, convert, finalize_calibration, prepare
from optimum_fp8.errors import FP8CalibrationError, FP8Error, FP8StateError
from optimum_fp8.lifecycle.state import state_of


def vision():
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 2))


def calibrated(model, dataset, **options):
    prepare(model, FP8Config(dataset=dataset, **options))
    return calibrate(model)


def measurements(model):
    return state_of(model).measurements


IMAGES = torch.stack([torch.full((3, 2, 2), float(n)) for n in range(1, 7)])


@pytest.mark.core
@pytest.mark.parametrize(
    "dataset",
    [
        lambda: DataLoader(IMAGES, batch_size=2),
        lambda: DataLoader(TensorDataset(IMAGES, torch.zeros(6)), batch_size=4),
        lambda: (image[None] for image in IMAGES),
        lambda: ((image[None], 1) for image in IMAGES),
        lambda: ({"input": image[None]} for image in IMAGES),
        lambda: [IMAGES],
        lambda: lambda model: model(IMAGES),
    ],
    ids=["loader", "loader of (x, y)", "tensors", "(x, y)", "dicts", "list", "callable"],
)
def test_every_kind_of_batch_reaches_the_model(dataset):
    model = calibrated(vision(), dataset())
    assert measurements(model).range("0") == 6.0
    assert measurements(model).tensors["0", "input"].statistics()["count"] == IMAGES.numel()
    convert(model)


def test_a_language_model_with_dicts_of_ids():
    model = calibrated(tiny_llama(), [{"input_ids": torch.randint(0, 64, (2, 8))} for _ in range(3)])
    assert measurements(model).samples == 6
    assert measurements(model).tensors["model.layers.0.mlp.up_proj", "input"].statistics()["count"] == 3 * 2 * 8 * 32


@pytest.mark.core
def test_padding_stays_out_of_the_ranges():
    torch.manual_seed(0)
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] = 1000.0  # token 0 pads
    ids = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 10]])
    calibrated(model, [{"input_ids": ids, "attention_mask": (ids != 0).long()}])
    assert measurements(model).tensors["model.layers.0.self_attn.q_proj", "input"].statistics()["count"] == 6 * 32


def test_the_number_of_samples_is_limited_and_remembered():
    model = calibrated(vision(), (image[None] for image in IMAGES), num_calibration_samples=3)
    assert measurements(model).range("0") == 3.0
    assert measurements(model).samples == 3


def test_it_can_go_on_with_more_data():
    model = calibrated(vision(), [IMAGES[:2]])
    calibrate(model, FP8Config(dataset=[IMAGES[2:]]))
    assert measurements(model).range("0") == 6.0
    assert measurements(model).samples == 6


def test_measurements_know_their_data():
    known = [measurements(calibrated(vision(), data)).data for data in ([IMAGES], [IMAGES], [IMAGES * 2])]
    assert known[0] == known[1] != known[2]


def test_floating_point_inputs_get_the_dtype_of_the_model():
    class Vision(nn.Sequential):
        dtype = torch.bfloat16

    calibrated(Vision(nn.Linear(4, 4)).bfloat16(), [torch.ones(2, 4)])


@pytest.mark.core
@pytest.mark.parametrize("training", [True, False])
def test_the_training_flags_come_back(training):
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    model.train(training)
    seen = []
    calibrated(model, lambda model: (seen.append(model.training), model(torch.ones(1, 4))))
    assert seen == [False] and model.training is training and model[0].training is training


def test_flags_of_single_modules_come_back():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))
    model.train()
    model[0].eval()  # frozen statistics
    calibrated(model, [torch.ones(2, 4)])
    assert model.training and not model[0].training and model[1].training


def test_the_training_flag_comes_back_after_an_error():
    model = prepare(nn.Sequential(nn.Linear(4, 4)), FP8Config(dataset=[torch.ones(1, 5)])).train()
    with pytest.raises(FP8CalibrationError, match=r"after 0 samples \(a tensor of shape \(1, 5\)\): mat1"):
        calibrate(model)
    assert model.training


def test_no_gradients_are_made():
    grads = []
    calibrated(nn.Sequential(nn.Linear(4, 4)), lambda model: grads.append(model(torch.ones(1, 4)).requires_grad))
    assert grads == [False]


@pytest.mark.core
@pytest.mark.parametrize("tokens, warns", [(16, True), (2048, False)])
def test_few_tokens_warn(tokens, warns, caplog):
    with caplog.at_level(logging.WARNING):
        calibrated(tiny_llama(), [{"input_ids": torch.randint(0, 64, (tokens // 16, 16))}])
    assert ("tokens only" in caplog.text) is warns


def test_padding_does_not_count_as_tokens(caplog):
    ids, mask = torch.ones(64, 32, dtype=torch.long), torch.zeros(64, 32, dtype=torch.long)
    mask[:, -1] = 1
    with caplog.at_level(logging.WARNING):
        calibrated(tiny_llama(), [{"input_ids": ids, "attention_mask": mask}])
    assert "calibrated on 64 tokens only" in caplog.text


@pytest.mark.core
@pytest.mark.parametrize(
    "dataset, message",
    [
        (lambda: None, "the config has no dataset"),
        (lambda: [], "the dataset is empty"),
        (lambda: iter(()), "the dataset is empty"),
        (lambda: [3], "a batch of type int"),
        (lambda: ["a", 3], "sample 1, column 'text' is 3, not text"),
        (lambda: [("a", 3)], "a batch of type str"),
        (lambda: DataLoader([], batch_size=1), "the dataset is empty"),
    ],
    ids=["none", "empty list", "empty stream", "numbers", "mixed", "tuples of text", "empty loader"],
)
def test_bad_data_says_what_is_wrong(dataset, message):
    model = prepare(vision(), FP8Config())
    with pytest.raises(FP8CalibrationError, match=message):
        calibrate(model, FP8Config(dataset=dataset()))


def test_a_callable_that_never_calls_the_model():
    model = calibrated(vision(), lambda model: None)
    with pytest.raises(FP8Error, match="calibration data|no sample"):
        convert(model)


def test_a_generator_that_is_used_up_says_so():
    stream = (image[None] for image in IMAGES)
    model = calibrated(vision(), stream)
    with pytest.raises(FP8CalibrationError, match="empty"):
        calibrate(model)


@pytest.mark.parametrize("state", ["fresh", "converted", "finalized"])
def test_only_a_model_that_is_measured_can_be_calibrated(state, tmp_path):
    config = FP8Config(dataset=[IMAGES], dump_stats_path=str(tmp_path / "measure"))
    model = vision()
    if state != "fresh":
        prepare(model, config)
        calibrate(model)
        (convert if state == "converted" else finalize_calibration)(model)
    with pytest.raises(FP8StateError, match="calibrate: "):
        calibrate(model, config)


def test_the_data_of_all_runs_counts():
    def digest(*runs):
        model = prepare(nn.Sequential(nn.Linear(4, 4)), FP8Config())
        for value in runs:
            calibrate(model, FP8Config(dataset=[torch.full((1, 4), value)]))
        return state_of(model).measurements.data

    assert len({digest(1.0), digest(2.0), digest(1.0, 2.0), digest(2.0, 2.0)}) == 4
    assert digest(1.0, 2.0) == digest(1.0, 2.0)


def test_what_cannot_be_merged_is_refused_before_it_is_measured_in_parts():
    model = prepare(nn.Sequential(nn.Linear(4, 4)), FP8Config(observer="moving_average", dataset=[torch.ones(1, 4)]))
    calibrate(model)
    with pytest.raises(FP8CalibrationError, match="'moving_average' cannot measure a second time: a moving average"):
        calibrate(model)
    convert(model)
