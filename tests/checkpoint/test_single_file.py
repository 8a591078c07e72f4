"""Single files in FP8, as ComfyUI has them: made by a writer of this test's own, and run without a dequantized copy."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusion_models import output, tiny
from safetensors.torch import save_file
from torch import nn

from optimum_fp8 import load, load_single_file, quantization_report, save
from optimum_fp8.errors import FP8CheckpointError, FP8ConfigError, FP8StateError
from optimum_fp8.modules import fp8_modules

E4M3, E5M2, BF16 = torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16
FULL = {E4M3: 448.0, E5M2: 57344.0}


class Block(nn.Module):
    """Two layers, a norm and an embedding."""

    def __init__(self):
        super().__init__()
        self.table, self.norm = nn.Embedding(10, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 48), nn.Linear(48, 16, bias=False)

    def forward(self, ids):
        return self.down(F.silu(self.up(self.norm(self.table(ids)))))


IDS = torch.arange(10)


def block(dtype=torch.float32) -> Block:
    torch.manual_seed(0)
    return Block().eval().to(dtype)


def quantized(weight: torch.Tensor, dtype=E4M3, rows=False) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of a weight and their scale, by the formula of the format's documentation."""
    largest = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True) if rows else weight.abs().max()
    scale = largest.float() / FULL[dtype]
    return (weight.float() / scale).clamp(-FULL[dtype], FULL[dtype]).to(dtype), scale


def rounded(x: torch.Tensor, scale: float) -> torch.Tensor:
    return (x / scale).clamp(-448, 448).to(E4M3).float() * scale


def scaled(model: nn.Module, names, *, dtype=E4M3, rows=False, leaf="weight_scale") -> dict[str, torch.Tensor]:
    """The tensors of a file in which some layers of a model are in FP8."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in names:
        tensors[f"{name}.weight"], tensors[f"{name}.{leaf}"] = quantized(tensors[f"{name}.weight"], dtype, rows)
    return tensors


def header(*names, **options) -> dict[str, str]:
    layers = {name: {"format": "float8_e4m3fn", **options} for name in names}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def file_of(tmp_path, tensors, metadata=None) -> str:
    path = str(tmp_path / "model.safetensors")
    save_file(tensors, path, metadata=metadata)
    return path


def dequantized(tensors, names) -> Block:
    """The model in high precision with the values that a file stands for."""
    model = block()
    for name in names:
        scale = tensors.get(f"{name}.weight_scale", tensors.get(f"{name}.scale_weight", torch.ones(())))
        model.get_submodule(name).weight.data = tensors[f"{name}.weight"].float() * scale
    return model


BOTH = ("up", "down")


@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
@pytest.mark.parametrize("rows", [False, True], ids=["per tensor", "per channel"])
def test_weights_are_the_codes_and_scales_of_the_file(dtype, rows, tmp_path):
    tensors = scaled(block(), BOTH, dtype=dtype, rows=rows)
    model = load_single_file(file_of(tmp_path, tensors), block(), activation_scheme="weight_only")
    for name, module in fp8_modules(model).items():
        assert torch.equal(module.codes.view(torch.uint8), tensors[f"{name}.weight"].view(torch.uint8))
        assert torch.equal(module.weight_scale.flatten(), tensors[f"{name}.weight_scale"].flatten())
    assert list(fp8_modules(model)) == list(BOTH)
    torch.testing.assert_close(model(IDS), dequantized(tensors, BOTH)(IDS), rtol=1e-5, atol=1e-6)


def test_layers_that_are_not_in_fp8_stay_as_they_are(tmp_path):
    model = load_single_file(file_of(tmp_path, scaled(block(), ["up"])), block(BF16))
    assert list(fp8_modules(model)) == ["up"] and type(model.down) is nn.Linear
    assert {parameter.dtype for name, parameter in model.named_parameters() if "scale" not in name} == {BF16, E4M3}


def by_header(tensors):
    return tensors, header(*BOTH)


def by_layer(tensors):
    said = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    return {**tensors, **{f"{name}.comfy_quant": said.clone() for name in BOTH}}, None


def by_marker(tensors):
    renamed = {name.replace("weight_scale", "scale_weight"): tensor for name, tensor in tensors.items()}
    return {**renamed, "scaled_fp8": torch.zeros(1, dtype=E4M3)}, None


def in_a_pipeline(tensors):
    said = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    return {**said, "first_stage_model.conv.weight": torch.zeros(2)}, None


@pytest.mark.parametrize("written", [by_header, by_layer, by_marker, in_a_pipeline])
def test_each_way_of_writing_says_the_same(written, tmp_path):
    tensors = scaled(block(), BOTH)
    model = load_single_file(file_of(tmp_path, *written(tensors)), block())
    expected = load_single_file(file_of(tmp_path, tensors), block())
    assert torch.equal(model(IDS), expected(IDS))
    assert {row.activations for row in quantization_report(model).quantized} == {"dynamic"}


def test_an_input_scale_is_what_the_input_is_rounded_with(tmp_path):
    tensors = {**scaled(block(), BOTH), "up.input_scale": torch.tensor(0.01)}
    model = load_single_file(file_of(tmp_path, tensors, header(*BOTH)), block(), activation_scheme="weight_only")
    assert {row.name: row.activations for row in quantization_report(model).quantized} == {
        "up": "static",
        "down": "weight_only",
    }
    reference = dequantized(tensors, BOTH)
    reference.up.register_forward_pre_hook(
        lambda module, args: ((args[0] / 0.01).clamp(-448, 448).to(E4M3).float() * 0.01,)
    )
    torch.testing.assert_close(model(IDS), reference(IDS), rtol=1e-4, atol=1e-5)


def test_an_input_scale_of_one_in_a_file_of_old_is_none(tmp_path):
    tensors = scaled(block(), BOTH, leaf="scale_weight")
    tensors |= {
        "scaled_fp8": torch.zeros(1, dtype=E4M3),
        "up.scale_input": torch.ones(1),
        "down.scale_input": torch.tensor([0.5]),
    }
    model = load_single_file(file_of(tmp_path, tensors), block())
    assert {row.name: row.activations for row in quantization_report(model).quantized} == {
        "up": "dynamic",
        "down": "static",
    }
    assert model.down.input_scale.tolist() == [0.5]


@pytest.mark.parametrize("where", ["header", "marker"])
def test_full_precision_products_do_not_round_their_input(where, tmp_path):
    tensors = {**scaled(block(), BOTH, leaf="scale_weight"), "up.input_scale": torch.tensor(0.01)}
    said = header(*BOTH, full_precision_matrix_mult=True) if where == "header" else None
    tensors |= {} if said else {"scaled_fp8": torch.zeros(2, dtype=E4M3)}
    model = load_single_file(file_of(tmp_path, tensors, said), block())
    torch.testing.assert_close(model(IDS), dequantized(tensors, BOTH)(IDS), rtol=1e-5, atol=1e-6)


def test_a_plain_cast_has_scales_of_one(tmp_path):
    tensors = {name: tensor.to(E4M3) for name, tensor in block().state_dict().items()}
    model = load_single_file(file_of(tmp_path, tensors), block(), activation_scheme="weight_only")
    assert model.up.weight_scale.tolist() == [1.0]
    expected = block()
    expected.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-5, atol=1e-6)


def test_a_converter_may_split_and_join_rows(tmp_path):
    tensors = scaled(block(), BOTH)
    gate, value = scaled(block(), ["up"], rows=True), tensors.pop("up.weight_scale")
    tensors["up.weight_scale"] = gate["up.weight_scale"].reshape(-1, 1)
    tensors["up.weight"] = gate["up.weight"]
    tensors = {f"net.{name}": tensor for name, tensor in tensors.items()}

    def swapped(found):
        found = {name.removeprefix("net."): tensor for name, tensor in found.items()}
        for leaf in ("weight", "bias"):
            first, second = found[f"up.{leaf}"].chunk(2)
            found[f"up.{leaf}"] = torch.cat([second, first])
        return found

    model = load_single_file(file_of(tmp_path, tensors), block(), convert=swapped, activation_scheme="weight_only")
    up = (gate["up.weight"].float() * gate["up.weight_scale"]).roll(24, 0)
    assert torch.equal(model.up.dequantized_weight(torch.float32), up) and value.numel() == 1
    assert model.down.weight_scale.shape == (1,)


def test_a_model_of_diffusers_runs_and_is_saved(tmp_path):
    original = tiny("ddim", BF16)
    names = [name for name, module in original.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    path = file_of(tmp_path, scaled(original, names), header(*names))
    torch.manual_seed(9)
    model = load_single_file(path, UNet2DModel.from_config(original.config).eval().to(BF16))
    assert len(fp8_modules(model)) == len(names)
    found, expected = output(model, "ddim", BF16), output(original, "ddim", BF16)
    assert (found - expected).norm() < 0.15 * expected.norm()
    save(model, tmp_path / "fp8")
    assert torch.equal(output(load(tmp_path / "fp8"), "ddim", BF16), found)


def missing_scale(tensors):
    del tensors["up.weight_scale"]


def of_blocks(tensors):
    tensors["up.weight_scale"] = torch.ones(3, 2)


def of_two_scales(tensors):
    tensors["up.weight_scale_2"] = torch.ones(1)


def nan_scale(tensors):
    tensors["up.weight_scale"] = torch.tensor(torch.nan)


def wrong_shape(tensors):
    tensors["down.weight"] = tensors["down.weight"][:, :-1].contiguous()


def scale_of_none(tensors):
    tensors["norm.weight_scale"] = torch.ones(1)


def nothing_in_fp8(tensors):
    tensors.clear()
    tensors.update(block().state_dict())


def other_names(tensors):
    for name in list(tensors):
        tensors[f"layers.{name}"] = tensors.pop(name)


def missing_tensor(tensors):
    del tensors["norm.bias"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (missing_scale, "up.weight is in torch.float8_e4m3fn and has no up.weight_scale"),
        (of_blocks, r"scale of up.weight has shape \(3, 2\), expected one number, or 48"),
        (of_two_scales, "up.weight_scale_2 belongs to a format with several scales"),
        (nan_scale, "up.weight_scale"),
        (wrong_shape, r"down.weight in .* is \(1, 16, 47\)"),
        (scale_of_none, "a scale of norm, whose weight is not in FP8"),
        (nothing_in_fp8, "holds no tensor in FP8"),
        (other_names, "no weight in FP8 of a layer of Block: its names are like 'layers"),
        (missing_tensor, "lacks norm.bias"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_does_not_fit_is_refused_by_name(spoil, message, tmp_path):
    tensors = scaled(block(), BOTH)
    spoil(tensors)
    model = block()
    with pytest.raises(FP8CheckpointError, match=message):
        load_single_file(file_of(tmp_path, tensors), model)
    assert not fp8_modules(model) and torch.equal(model(IDS), block()(IDS))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8", "int8_tensorwise", None])
def test_other_formats_are_refused_by_name(name, tmp_path):
    path = file_of(tmp_path, scaled(block(), BOTH), header("up", format=name))
    with pytest.raises(FP8CheckpointError, match=f"up is in the format {name!r}, expected one of float8_e4m3fn"):
        load_single_file(path, block())


def test_a_header_that_says_otherwise_than_the_tensors_is_refused(tmp_path):
    load_it = partial(load_single_file, model=block())
    with pytest.raises(FP8CheckpointError, match="up is in float8_e5m2, but its weight is in torch.float8_e4m3fn"):
        load_it(file_of(tmp_path, scaled(block(), BOTH), header("up", format="float8_e5m2")))
    with pytest.raises(FP8CheckpointError, match="its weight is missing or not in FP8"):
        load_it(file_of(tmp_path, scaled(block(), BOTH), header("norm")))
    with pytest.raises(FP8CheckpointError, match="in no readable way"):
        load_it(file_of(tmp_path, scaled(block(), BOTH), {"_quantization_metadata": "{"}))


def test_what_cannot_be_asked_for(tmp_path):
    path = file_of(tmp_path, scaled(block(), BOTH))
    for scheme in ("none", "static"):
        with pytest.raises(FP8ConfigError, match="activation_scheme"):
            load_single_file(path, block(), activation_scheme=scheme)
    with pytest.raises(FP8CheckpointError, match="does not exist"):
        load_single_file(tmp_path / "none.safetensors", block())
    with pytest.raises(FP8CheckpointError, match="is a folder"):
        load_single_file(tmp_path, block())
    with pytest.raises(FP8CheckpointError, match="`convert` returned NoneType"):
        load_single_file(path, block(), convert=lambda tensors: None)
    with pytest.raises(FP8CheckpointError, match="no weight in FP8 of a layer"):
        load_single_file(path, block(), convert=lambda tensors: {})
    with pytest.raises(FP8StateError, match="converted to FP8 already"):
        load_single_file(path, load_single_file(path, block()))


def test_gaudi2_gets_codes_that_it_has(tmp_path):
    tensors = scaled(block(), BOTH)
    model = load_single_file(file_of(tmp_path, tensors), block(), target="gaudi2", activation_scheme="weight_only")
    assert all(module.codes.float().abs().max() <= 240 for module in fp8_modules(model).values())
    torch.testing.assert_close(model(IDS), dequantized(tensors, BOTH)(IDS), rtol=0.05, atol=0.02)
