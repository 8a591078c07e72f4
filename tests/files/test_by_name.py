"""Folders of no class that transformers knows: names, shapes and config.json tell what is quantized."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers as hf
from files.conftest import DYNAMIC, WEIGHT_ONLY, said, tensors
from hf.conftest import llama
from safetensors.torch import load_file, save_file
from tiny_models import tiny_bert, tiny_gpt2
from torch import nn
from transformers.pytorch_utils import Conv1D

import optimum_fp8
from optimum_fp8 import FP8Config, convert, quantize_files
from optimum_fp8.errors import FP8CheckpointError, FP8ConfigError, FP8NotAvailableError, FP8SelectionError
from optimum_fp8.files.by_name import modules_by_name
from optimum_fp8.files.source import Stored
from optimum_fp8.modules import fp8_modules


class Mixer(nn.Module):
    """Of no library."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.forward_ = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 40)
        self.register_buffer("steps", torch.arange(3))
        self.table = nn.Parameter(torch.randn(4, 16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embedding(ids).mT).mT + self.table[:1]
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.forward_(self.norm(x)))


LAYERS = ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "forward_"]


@pytest.fixture
def mixer() -> Mixer:
    torch.manual_seed(4)
    return Mixer().eval()


@pytest.fixture
def source(mixer, tmp_path) -> str:
    (tmp_path / "mixer").mkdir()
    save_file(mixer.state_dict(), tmp_path / "mixer" / "model.safetensors")
    return str(tmp_path / "mixer")


@pytest.mark.parametrize("options", [WEIGHT_ONLY, DYNAMIC | {"scale_method": "maxabs_arbitrary"}])
def test_a_module_of_no_library_is_loaded_by_load(mixer, source, tmp_path, options, caplog):
    with caplog.at_level(logging.WARNING, "optimum_fp8"):
        report = quantize_files(source, tmp_path / "fp8", FP8Config(**options))
    assert "knows no class" in caplog.text and report.by_name
    assert sorted(report.layers) == LAYERS
    assert report.kept.keys() == {"embedding", "conv", "head"} and not (tmp_path / "fp8" / "config.json").exists()
    loaded = optimum_fp8.load(tmp_path / "fp8", Mixer())
    assert sorted(fp8_modules(loaded)) == LAYERS
    ids = torch.arange(12).view(2, 6)
    high = mixer(ids)
    expected = convert(mixer, FP8Config(**options, allowlist={"types": [], "names": ["blocks", "forward_"]}))
    assert torch.equal(loaded.eval()(ids), expected(ids))
    assert 0 < float((expected(ids) - high).detach().norm() / high.detach().norm()) < 0.1


def test_it_counts_what_is_in_fp8(mixer, source, tmp_path):
    report = quantize_files(source, tmp_path / "fp8", FP8Config(**WEIGHT_ONLY))
    assert report.in_fp8 == sum(mixer.get_submodule(name).weight.numel() for name in LAYERS)
    assert report.parameters == sum(tensor.numel() for tensor in mixer.state_dict().values())
    assert report.size == sum(len(each[3]) for each in tensors(tmp_path / "fp8").values())


def test_lists_overrides_and_heads(source, tmp_path):
    options = {"blocklist": {"types": [], "names": [r"blocks\.1"]}, "modules_to_not_convert": ["forward_"]}
    options |= {"overrides": {r"blocks\.0\.2": {"fp8_config": "E5M2"}}, "quantize_lm_head": True}
    report = quantize_files(source, tmp_path / "fp8", FP8Config(**WEIGHT_ONLY, **options))
    assert sorted(report.layers) == ["blocks.0.0", "blocks.0.2", "head"]
    assert "modules_to_not_convert" in report.kept["forward_"] and "blocklist" in report.kept["blocks.1.0"]
    found = load_file(tmp_path / "fp8" / "model.safetensors")
    assert found["blocks.0.2.weight"].dtype == torch.float8_e5m2
    assert found["blocks.0.0.weight"].dtype == torch.float8_e4m3fn
    left = said(tmp_path / "fp8", "quantization.json")["modules_to_not_convert"]
    assert set(left) == {"embedding", "conv", "forward_", "blocks.1.0", "blocks.1.2"}
    assert set(fp8_modules(optimum_fp8.load(tmp_path / "fp8", Mixer()))) == set(report.layers)
    with pytest.raises(FP8SelectionError, match="'blokcs' matches no module"):
        quantize_files(source, tmp_path / "b", FP8Config(**WEIGHT_ONLY, allowlist={"names": ["blokcs"], "types": []}))


class NovelConfig(hf.PreTrainedConfig):
    model_type = "novel"


class NovelModel(hf.PreTrainedModel):
    config_class = NovelConfig

    def __init__(self, config: NovelConfig) -> None:
        super().__init__(config)
        self.mixer = Mixer()
        self.post_init()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.mixer(ids)


@pytest.mark.core
def test_an_architecture_of_ones_own_is_loaded_by_from_pretrained(tmp_path):
    model = NovelModel(NovelConfig()).eval()
    model.save_pretrained(tmp_path / "novel")
    assert quantize_files(tmp_path / "novel", tmp_path / "fp8", FP8Config(**WEIGHT_ONLY)).by_name
    loaded, info = NovelModel.from_pretrained(tmp_path / "fp8", output_loading_info=True)
    assert not any(info.values()) and sorted(fp8_modules(loaded)) == [f"mixer.{name}" for name in LAYERS]
    ids = torch.arange(12).view(2, 6)
    assert 0 < float((loaded(ids) - model(ids)).detach().norm() / model(ids).detach().norm()) < 0.1
    config = said(tmp_path / "fp8")
    assert config["model_type"] == "novel" and config["quantization_config"]["model_class"] == "NovelModel"


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), tiny_bert], ids=["llama", "tied", "bert"])
def test_names_tell_what_the_class_would(save, tmp_path, make):
    model = make()
    source = save(model)
    quantize_files(source, tmp_path / "class", FP8Config(**WEIGHT_ONLY))
    report = quantize_files(source, tmp_path / "names", FP8Config(**WEIGHT_ONLY), names_only=True)
    assert report.by_name and tensors(tmp_path / "names") == tensors(tmp_path / "class")
    loaded, info = type(model).from_pretrained(tmp_path / "names", output_loading_info=True)
    assert not any(info.values()) and set(fp8_modules(loaded)) == set(report.layers)


def test_transposed_weights_are_left_alone(save, tmp_path):
    with pytest.raises(FP8SelectionError, match="c_fc: its bias of shape .* is not one of a Linear"):
        quantize_files(save(tiny_gpt2()), tmp_path / "fp8", FP8Config(**WEIGHT_ONLY), names_only=True)


def test_a_transposed_weight_taken_for_a_linears_fails_when_loaded(tmp_path):
    """A square weight does not tell how it is stored; the module that loads it does."""
    model = nn.Sequential(Conv1D(16, 16), nn.Linear(16, 8))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert quantize_files(tmp_path, tmp_path / "fp8", FP8Config(**WEIGHT_ONLY)).layers == ("0", "1")
    with pytest.raises(FP8CheckpointError, match="0 was taken for a Linear, but it is a Conv1D"):
        optimum_fp8.load(tmp_path / "fp8", model)
    assert isinstance(model[0], Conv1D)


def linear_like(shapes: dict[str, tuple[int, ...]], config=None, heads=False) -> set[str]:
    stored = {key: Stored("f", key, torch.float32, shape) for key, shape in shapes.items()}
    model = modules_by_name(stored, config or {}, None, heads=heads)
    assert set(model.state_dict()) == set(shapes)
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize(
    "key",
    [
        *("embed_tokens.weight", "wte.weight", "h.0.wpe.weight", "block.0.attn.relative_attention_bias.weight"),
        *("lm_head.weight", "classifier.weight", "score.weight", "cls.predictions.decoder_head.weight"),
        *("layers.0.mlp.gate.weight", "layers.0.router.weight", "layers.1.q_proj.lora_A.weight", "weight"),
        *("layers.0.mlp.weight_table", "layers.0.norm.bias"),
    ],
)
def test_what_is_taken_for_no_linear(key):
    assert linear_like({key: (8, 16)}) == set()


@pytest.mark.parametrize("name", ["layers.0.mlp.gate_proj", "layers.0.attn.query", "0", "fc", "a.type.half.training"])
def test_what_is_taken_for_a_linear(name):
    assert linear_like({f"{name}.weight": (8, 16)}) == {name}
    assert linear_like({f"{name}.weight": (8, 16), f"{name}.bias": (8,)}) == {name}
    assert linear_like({f"{name}.weight": (8, 16), f"{name}.bias": (16,)}) == set()
    assert linear_like({f"{name}.weight": (8, 16), f"{name}.extra": (8,)}) == set()
    assert linear_like({f"{name}.weight": (8, 16), f"{name}.inner.weight": (8, 4)}) == {f"{name}.inner"}
    assert linear_like({f"{name}.weight": (8, 16, 3, 3)}) == linear_like({f"{name}.weight": (8,)}) == set()


def test_a_dtype_that_is_none(source, tmp_path):
    with pytest.raises(FP8ConfigError, match="dtype='float64': expected auto, bfloat16"):
        quantize_files(source, tmp_path / "fp8", FP8Config(**WEIGHT_ONLY), dtype="float64")


def test_sizes_in_the_configuration_tell_tables():
    config = {"text_config": {"vocab_size": 40, "max_position_embeddings": 12}}
    shapes = {"output.weight": (40, 8), "where.weight": (12, 8), "layers.0.up.weight": (40, 8), "out.weight": (9, 8)}
    assert linear_like(shapes, config) == {"layers.0.up", "out"}
    assert linear_like({"lm_head.weight": (40, 8)}, config, heads=True) == {"lm_head"}
    assert linear_like({"output.weight": (40, 8)}, config, heads=True) == set()  # it may be an embedding


def test_what_names_do_not_tell_is_refused(source, tmp_path):
    with pytest.raises(FP8NotAvailableError, match="kv_cache"):
        quantize_files(source, tmp_path / "fp8", FP8Config(**WEIGHT_ONLY, kv_cache=True))
    save_file({"embedding.weight": torch.randn(4, 4)}, tmp_path / "mixer" / "model.safetensors")
    with pytest.raises(FP8SelectionError, match="embedding: by its name it is an embedding"):
        quantize_files(source, tmp_path / "fp8", FP8Config(**WEIGHT_ONLY))
