"""Models of diffusers: saved by themselves or in their pipeline, made again without their weights, never misread."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    ModelMixin,
    PipelineQuantizationConfig,
    UNet2DModel,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusion_models import EACH, output, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from optimum_fp8 import FP8Config, convert, dequantize, load, prepare, quantization_report, save
from optimum_fp8.errors import FP8CheckpointError, FP8NotAvailableError, FP8StateError
from optimum_fp8.modules import fp8_modules

WEIGHTS = "diffusion_pytorch_model.safetensors"
BF16 = torch.bfloat16


def converted(name: str, dtype: torch.dtype = BF16, **options) -> nn.Module:
    model = prepare(tiny(name, dtype), FP8Config(target="cpu", attention=True, **options))
    output(model, name, dtype)
    return convert(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "unet"
    save(converted("ddim"), folder)
    return folder


@pytest.mark.parametrize("name", EACH)
def test_a_model_is_made_again_without_its_weights(name, tmp_path):
    dtype = torch.float32 if name == "dit" else BF16
    model = converted(name, dtype)
    expected = output(model, name, dtype)
    save(model, tmp_path / "fp8")
    made = load(tmp_path / "fp8")

    assert type(made) is type(model) and not made.training
    assert torch.equal(output(made, name, dtype), expected)
    assert made.dtype == model.dtype == dtype
    assert {module.high_precision for module in fp8_modules(made).values()} <= {dtype, torch.float32}


def test_its_own_saving_writes_the_same_and_in_several_files(saved, tmp_path):
    model = load(saved)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert _contents(tmp_path / "one" / WEIGHTS) == _contents(saved / WEIGHTS)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert torch.equal(output(load(tmp_path / "many"), "ddim", BF16), output(model, "ddim", BF16))


def test_diffusers_refuses_what_it_cannot_read(saved):
    with pytest.raises(ValueError, match="Unknown quantization type, got optimum_fp8"):
        UNet2DModel.from_pretrained(saved)


def test_diffusers_refuses_a_method_that_it_does_not_know(tmp_path):
    tiny("ddim").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unknown quantization type, got optimum_fp8"):
        UNet2DModel.from_pretrained(tmp_path, quantization_config=FP8Config())


def test_codes_without_their_configuration_are_no_values(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "unet")
    path = tmp_path / "unet" / "config.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in said.items() if key != "quantization_config"}))
    with pytest.raises(ValueError, match="shape"):
        UNet2DModel.from_pretrained(tmp_path / "unet")
    with pytest.raises(FP8CheckpointError, match="has no 'quantization_config'"):
        load(tmp_path / "unet")


def test_a_pipeline_is_saved_and_loaded_with_an_fp8_part(tmp_path):
    pipeline = DDIMPipeline(tiny("ddim"), DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    prepare(pipeline.unet, FP8Config(target="cpu"))

    def sample(pipeline):
        noise = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipeline(2, noise, num_inference_steps=3, output_type="np").images)

    sample(pipeline)
    convert(pipeline.unet)
    pipeline.save_pretrained(tmp_path / "fp8")
    again = DiffusionPipeline.from_pretrained(tmp_path / "fp8", unet=load(tmp_path / "fp8" / "unet"))
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again), sample(pipeline))

    with pytest.raises(ValueError, match="Unknown quantization type, got optimum_fp8"):
        DiffusionPipeline.from_pretrained(tmp_path / "fp8")
    with pytest.raises(FP8CheckpointError, match=r"pipeline of diffusers.*unet=load\("):
        load(tmp_path / "fp8")


def test_a_pipeline_is_no_model_and_its_parts_are_named():
    with pytest.raises(FP8StateError, match="found DDIMPipeline; take its parts one by one: unet"):
        prepare(DDIMPipeline(tiny("ddim"), DDIMScheduler()), FP8Config())


class TextPipeline(DiffusionPipeline):
    """A text encoder of transformers beside a U-Net of diffusers."""

    def __init__(self, text_encoder, unet):
        super().__init__()
        self.register_modules(text_encoder=text_encoder, unet=unet)


def test_a_text_encoder_is_quantized_while_its_pipeline_is_loaded(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=50, **sizes))
    TextPipeline(text, tiny("stable diffusion")).save_pretrained(tmp_path)
    config = FP8Config(activation_scheme="dynamic", target="cpu")
    chosen = PipelineQuantizationConfig(quant_mapping={"text_encoder": config})
    pipeline = TextPipeline.from_pretrained(tmp_path, quantization_config=chosen)
    assert len(quantization_report(pipeline.text_encoder).quantized) == 6
    assert not fp8_modules(pipeline.unet)


def test_dequantized_it_is_as_any_other(saved, tmp_path):
    dequantized = dequantize(copy.deepcopy(load(saved)))
    assert "quantization_config" not in dequantized.config
    dequantized.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path, dtype=BF16)
    assert torch.equal(output(again, "ddim", BF16), output(dequantized, "ddim", BF16))
    assert not fp8_modules(load(saved).dequantize())  # by diffusers' method


def test_a_failed_conversion_leaves_no_trace():
    model = prepare(tiny("ddim"), FP8Config(target="cpu"))
    with pytest.raises(Exception, match="no|none"):
        convert(model)
    assert "quantization_config" not in model.config and getattr(model, "hf_quantizer", None) is None


def test_a_class_that_diffusers_does_not_have_is_given(tmp_path):
    class Own(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self, width: int = 16):
            super().__init__()
            self.layer = nn.Linear(width, width)
            self.register_buffer("table", torch.arange(width) / 7, persistent=False)

        def forward(self, x):
            return self.layer(x) + self.table

    x = torch.randn(3, 24, dtype=BF16)
    model = convert(Own(24).to(BF16), FP8Config(activation_scheme="dynamic", target="cpu"))
    save(model, tmp_path / "own")
    with pytest.raises(FP8CheckpointError, match=r"class 'Own', and diffusers has none: .*load\(folder, Own\)"):
        load(tmp_path / "own")
    with pytest.raises(FP8CheckpointError, match="found UNet2DModel"):
        load(tmp_path / "own", UNet2DModel)
    made = load(tmp_path / "own", Own)
    assert torch.equal(made(x), model(x)) and made.table.dtype == BF16


def test_other_models_have_to_be_given(tmp_path):
    save(convert(nn.Sequential(nn.Linear(16, 8)), FP8Config(activation_scheme="dynamic")), tmp_path / "plain")
    with pytest.raises(FP8StateError, match="does not say how its model is made"):
        load(tmp_path / "plain")


def test_pickled_weights_are_refused(saved, tmp_path):
    with pytest.raises(FP8NotAvailableError, match="safetensors only"):
        load(saved).save_pretrained(tmp_path, safe_serialization=False)


def test_edited_files_are_refused(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "unet")
    tensors = load_file(saved / WEIGHTS)
    metadata = _metadata(saved / WEIGHTS)
    del tensors["mid_block.resnets.0.conv1.weight_scale"]
    save_file(tensors, tmp_path / "unet" / WEIGHTS, metadata=metadata)
    with pytest.raises(FP8CheckpointError, match="mid_block.resnets.0.conv1.weight_scale"):
        load(tmp_path / "unet")
    other = tiny("stable diffusion")
    with pytest.raises(FP8CheckpointError):
        load(saved, other)
    assert not fp8_modules(other)


def test_the_dtype_of_a_model_is_not_that_of_codes():
    class Own(ModelMixin, ConfigMixin):
        @register_to_config
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    model = convert(Own().to(BF16), FP8Config(activation_scheme="dynamic", target="cpu"))
    assert model.dtype == BF16 and list(fp8_modules(model)) == ["second"]


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def _contents(path: Path) -> tuple[dict[str, str], dict[str, list]]:
    tensors = load_file(path)
    return _metadata(path), {name: tensor.view(torch.uint8).flatten().tolist() for name, tensor in tensors.items()}
