"""fold_batch_norm=True: by hand, while loading, saved and loaded again, dequantized, and refused."""

from __future__ import annotations

import copy
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoImageProcessor, ResNetConfig, ResNetForImageClassification

from optimum_fp8 import (
    FP8Config,
    convert,
    dequantize,
    export,
    finalize_calibration,
    load,
    prepare,
    quantization_report,
    quantize_files,
    save,
)
from optimum_fp8.errors import (
    FP8CheckpointError,
    FP8MeasurementError,
    FP8NotAvailableError,
    FP8SelectionError,
)
from optimum_fp8.lifecycle import state_of

VISION = Path(__file__).parents[2] / "examples" / "vision"
sys.path.insert(0, str(VISION))

from digits import load_split  # noqa: E402

SHAPE = (2, 3, 16, 16)


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def with_statistics(model):
    for norm in norms(model):
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.3, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model.eval()


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    return with_statistics(ResNetForImageClassification(config))


def plain():
    torch.manual_seed(0)
    return with_statistics(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)))


@pytest.fixture
def config(tmp_path):
    keys = {"target": "cpu", "fold_batch_norm": True, "dump_stats_path": str(tmp_path / "m")}
    return lambda **options: FP8Config(**{**keys, **options})


@pytest.fixture(scope="module")
def x():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path):
    resnet().save_pretrained(tmp_path / "hp")
    return tmp_path / "hp"


@torch.no_grad()
def logits(model, x):
    return model(x).logits


@torch.no_grad()
def test_prepare_folds_and_dequantize_takes_it_back(config, x):
    model = resnet()
    expected, state, count = logits(model, x), copy.deepcopy(model.state_dict()), len(norms(model))
    prepare(model, config())
    assert count == 6 and not norms(model)
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-5, atol=1e-5)
    dequantize(model)
    assert state.keys() == model.state_dict().keys() and torch.equal(logits(model, x), expected)


@torch.no_grad()
def test_loading_calibrating_saving_and_loading_again(config, folder, tmp_path, x):
    made = config(dataset=[{"pixel_values": x}], activation_scheme="static")
    model = ResNetForImageClassification.from_pretrained(folder, quantization_config=made)
    assert not norms(model)
    by_hand = prepare(resnet(), config(activation_scheme="static"))
    logits(by_hand, x)
    convert(by_hand)
    assert torch.equal(logits(model, x), logits(by_hand, x))
    first = next(row for row in quantization_report(model).modules if row.name.startswith("resnet.embedder"))
    assert first.quantized, "its bias tells the model's dtype"
    model.save_pretrained(tmp_path / "fp8")
    again = ResNetForImageClassification.from_pretrained(tmp_path / "fp8")
    assert again.config.quantization_config.fold_batch_norm
    assert torch.equal(logits(again, x), logits(model, x))
    again.save_pretrained(tmp_path / "again")
    third = ResNetForImageClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(third, x), logits(model, x))


@torch.no_grad()
def test_dequantized_it_is_one_of_its_class(config, x, tmp_path):
    model = convert(resnet(), config(activation_scheme="weight_only"))
    expected = logits(model, x)
    model.save_pretrained(tmp_path / "fp8")
    dequantize(model)
    assert len(norms(model)) == 6 and model.state_dict().keys() == resnet().state_dict().keys()
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "hp")
    again = ResNetForImageClassification.from_pretrained(tmp_path / "hp")
    assert torch.equal(logits(again, x), logits(model, x))
    config = FP8Config(dequantize=True)
    loaded = ResNetForImageClassification.from_pretrained(tmp_path / "fp8", quantization_config=config)
    assert torch.equal(logits(loaded, x), logits(model, x))


@pytest.mark.slow
@torch.no_grad()
def test_trained_on_digits_it_is_no_worse(config):
    images, labels = load_split("heldout")
    processor = AutoImageProcessor.from_pretrained(VISION / "tiny_resnet", backend="pil")
    pixels = processor(images=images, return_tensors="pt").pixel_values
    calibration = processor(images=load_split("train")[0][:64], return_tensors="pt").pixel_values
    right = {}
    for fold in (False, True):
        model = ResNetForImageClassification.from_pretrained(VISION / "tiny_resnet")
        prepare(model, config(fold_batch_norm=fold, scale_method="maxabs_arbitrary"))
        logits(model, calibration)
        right[fold] = (logits(convert(model), pixels).argmax(-1) == torch.tensor(labels)).sum().item()
    assert right[True] >= right[False] > 0.95 * len(labels)


@torch.no_grad()
def test_measurements_are_of_the_folded_model(config, folder, x, caplog):
    prepared = prepare(resnet(), config())
    logits(prepared, x)
    finalize_calibration(prepared)
    kept = config(activation_scheme="static")
    model = ResNetForImageClassification.from_pretrained(folder, quantization_config=kept)
    assert torch.equal(logits(model, x), logits(convert(prepared), x))
    with pytest.raises(FP8MeasurementError, match="another model"):
        convert(resnet(), config(activation_scheme="static", fold_batch_norm=False))


@torch.no_grad()
def test_measuring_while_loading(config, folder, x):
    made = config(mode="MEASURE", dataset=[{"pixel_values": x}])
    model = ResNetForImageClassification.from_pretrained(folder, quantization_config=made)
    assert not norms(model)
    dequantize(model)
    assert torch.equal(logits(model, x), logits(resnet(), x))


@torch.no_grad()
def test_what_is_not_selected_is_folded_too(config, x):
    model = convert(resnet(), config(activation_scheme="dynamic", blocklist={"names": ["embedder"], "types": []}))
    assert not norms(model) and type(model.resnet.embedder.embedder.convolution) is nn.Conv2d


@torch.no_grad()
def test_a_plain_module_saved_and_loaded(config, x, tmp_path):
    model = convert(plain(), config(activation_scheme="dynamic", quantize_lm_head=True))
    save(model, tmp_path / "saved")
    fresh = plain()
    loaded = load(tmp_path / "saved", fresh)
    assert torch.equal(loaded(x), model(x)) and isinstance(loaded[1], nn.Identity)


def test_an_error_leaves_the_model_as_it_was(config, x, tmp_path):
    model = plain()
    before, modules = copy.deepcopy(model.state_dict()), list(model)
    with pytest.raises(FP8SelectionError, match="matches no module"):
        prepare(model, config(blocklist={"names": ["nowhere"], "types": []}))
    with pytest.raises(FP8MeasurementError):
        convert(model, config(activation_scheme="static"))
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="3: "):
        convert(model, config(activation_scheme="dynamic", quantize_lm_head=True))
    save(convert(plain(), config(activation_scheme="dynamic")), tmp_path / "saved")
    with pytest.raises(FP8CheckpointError):
        load(tmp_path / "saved", nn.Sequential(*modules[:3], nn.Conv2d(8, 5, 3)))
    assert list(model) == modules and state_of(model) is None
    assert model.state_dict().keys() == before.keys() and torch.equal(model[0].weight, before["0.weight"])


def test_a_failed_conversion_goes_on_measuring(config, x):
    model = prepare(plain(), config(activation_scheme="static"))
    with pytest.raises(FP8MeasurementError):
        convert(model)
    model(x)
    convert(model)
    assert isinstance(model[1], nn.Identity)


def test_in_training_mode_it_is_refused(config):
    model = plain().train()
    with pytest.raises(FP8SelectionError, match=r"1: .*model\.eval\(\)"):
        prepare(model, config())
    assert isinstance(model[1], nn.BatchNorm2d)


def test_where_nothing_folds_it_is_an_error(config, caplog):
    conv = nn.Conv2d(4, 4, 1)
    shared = nn.Sequential(conv, nn.BatchNorm2d(4), conv).eval()
    with pytest.raises(FP8SelectionError, match="fold_batch_norm=True folds nothing: of Sequential's 1 batch norms"):
        prepare(shared, config())
    lenient = config()
    lenient._lenient = True  # as one that was read from INC's file
    with caplog.at_level(logging.WARNING):
        prepare(shared, lenient)
    assert "folds nothing" in caplog.text


def test_a_checkpoint_whose_norm_this_code_uses_otherwise_is_refused(config, tmp_path, monkeypatch):
    convert(resnet(), config(activation_scheme="dynamic")).save_pretrained(tmp_path / "fp8")
    monkeypatch.setattr("optimum_fp8.lifecycle.batch_norm.batch_norm_pairs", lambda model: [])
    with pytest.raises(FP8CheckpointError, match=r"embedder\.normalization was folded when the checkpoint was saved"):
        ResNetForImageClassification.from_pretrained(tmp_path / "fp8")


def test_what_cannot_go_with_it_is_refused(config, folder, tmp_path):
    with pytest.raises(FP8NotAvailableError, match="fold_batch_norm needs the model"):
        quantize_files(folder, tmp_path / "out", config(activation_scheme="dynamic"))
    model = convert(resnet(), config(activation_scheme="dynamic", allowlist={"names": [], "types": ["Conv2d"]}))
    with pytest.raises(FP8CheckpointError, match="folded batch norms"):
        export(model, tmp_path / "exported")
