"""What Intel Neural Compressor (INC) quantizes a model by, from a checkpoint of ours: files of ranges and of scales.

INC has no format that it loads a quantized model of another tool from. It takes the model in high precision, and with a
file of scales beside that of the ranges it makes the very codes of the checkpoint. INC holds scales in bfloat16: those
that are powers of two stay what they are, others are rounded.
"""

from __future__ import annotations

import os
import re
from typing import Any

import torch

from ..checkpoint import Checkpoint, Record
from ..checkpoint.engine_schemes import granularity_of, layers, not_expressed
from ..config import FP8Config
from ..errors import FP8CheckpointError
from ..files.source import reading
from ..lifecycle import inc_scales
from ..measure import Observer
from ..measure.inc import SCALES, File, FileName, Node, nodes_of, write_file, write_inc
from ..measure.observers.maxabs import MaxAbs
from ..scales import PerChannel, PerTensor, Scheme
from .native_source import NativeSource

NAME = "inc"
CONFIG, INSTRUCTIONS, PREFIX = "quant_config.json", "README.md", "measure/inc_output"
_CLASSES = ("Linear", "Conv2d")  # that INC replaces, by these very names
_ELSE = "measure the model with `optimum-cli fp8 measure`, and write files for INC with `export-inc`"
_RECALIBRATE = "quantize the model anew with activation_scheme='static' and a scale_method that measures, and save it"
_POW2, _ARBITRARY, _CHANNELS = "maxabs_pow2", "maxabs_arbitrary", "act_maxabs_pow2_weights_pcs_maxabs_pow2"
# The static methods of INC's whose scales it reads from a file.
_METHODS = frozenset(
    [
        *("maxabs_hw", _POW2, _ARBITRARY, "maxabs_hw_opt_weight", "maxabs_pow2_opt_weight", _CHANNELS),
        *("act_maxabs_hw_weights_pcs_maxabs_pow2", "act_maxabs_hw_weights_pcs_opt_pow2"),
        "act_maxabs_pow2_weights_pcs_opt_pow2",
    ]
)
_README = """# To quantize {model} with Intel Neural Compressor

These files hold no weights. They belong to the model in high precision that the FP8 checkpoint was made from, a
{model} with {layers} layers in FP8. In this folder:

```python
import torch
from neural_compressor.torch.quantization import FP8Config, convert
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("the model in high precision", dtype=torch.bfloat16)
model = convert(model, FP8Config.from_json_file("{config}"))
```

For scripts of optimum-habana: `QUANT_CONFIG={config}`. Elsewhere than in this folder, write its path into
`dump_stats_path`. The scales were made for {target}, whose largest FP8 value is {largest:g}. Without an accelerator INC
needs `"use_qdq": true` as well. vLLM's modules have other names, and need ranges of outputs that a checkpoint does not
record: see `optimum-cli fp8 export-inc --vllm`.
"""


def inc_files(source: NativeSource, checkpoint: Checkpoint) -> tuple[str, dict[str, Node], dict[str, Node]]:
    """INC's name for the scale method of a checkpoint, and the ranges and the scales of its modules.

    Args:
        source: where its tensors lie.
        checkpoint: with the records to write.

    Raises:
        FP8CheckpointError: INC cannot express it, or ranges are not recorded.
    """
    config, by_name = checkpoint.config, {record.name: record for record in checkpoint.records}
    assert config is not None
    for record in checkpoint.records:
        _check(source, record)
    _check_alike(layers(checkpoint.records))
    tensors: dict[tuple[str, str], Observer] = {}
    scales: dict[str, Node] = {}
    with reading() as read:
        for name, decision in source.decisions.items():
            module, record = decision.name, by_name[name]
            if "weight" not in record.tensors:
                tensors |= {key: each for key, each in source.ranges.items() if key[0] == module}
                continue
            codes = read(source.parts[name]["weight"]).squeeze(0)
            largest = (codes.to(torch.float32) * record.tensors["weight_scale"]).abs().amax()
            tensors[module, "input"] = source.ranges[module, "input"]
            tensors[module, "weight"] = MaxAbs(maxabs=largest, count=torch.tensor(codes.numel()))
            scales[module] = _scales_of(record, _scheme(record))
    made = nodes_of(tensors)
    if made.left_out:
        raise FP8CheckpointError(f"format={NAME!r} has no place for {', '.join(made.left_out[:4])}: {_ELSE}")
    operations = {name: node for name, node in made.nodes.items() if name not in scales}
    method = _method(config, layers(checkpoint.records))
    return method, made.nodes, scales | inc_scales(operations, config)


def write_inc_folder(
    source: NativeSource, files: tuple[str, dict[str, Node], dict[str, Node]], folder: str
) -> dict[str, Any]:
    """Write the files of `inc_files` and the instructions, and return INC's configuration for them."""
    method, ranges, scales = files
    config = source.checkpoint.config
    assert config is not None
    prefix = os.path.join(folder, *PREFIX.split("/"))
    write_inc(prefix, ranges)
    write_file(FileName(prefix, method=method.upper()), File(SCALES, {name: scales[name] for name in ranges}))
    in_fp8, target = layers(source.checkpoint.records), config.resolved_target
    said = {
        "model": (source.config.get("architectures") or ["model"])[0],
        "target": target,
        "largest": _scheme(in_fp8[0]).fmt.full_scale,
        "layers": len(in_fp8),
        "config": CONFIG,
    }
    with open(os.path.join(folder, INSTRUCTIONS), "w", encoding="utf-8") as file:
        file.write(_README.format(**said))
    # By name alone: with a list of types as well, INC would replace what was not measured.
    names = {"allowlist": {"types": [], "names": [f"^{re.escape(name)}$" for name in ranges]}}
    names["blocklist"] = {"types": [], "names": []}
    return {
        **{name: getattr(config, name) for name in ("fp8_config", "hp_dtype")},
        **names,
        "mode": "QUANTIZE",
        "observer": "maxabs",
        "scale_method": method,
        "scale_format": "CONST" if any(map(_is_by_channel, in_fp8)) else "SCALAR",
        "dump_stats_path": f"./{PREFIX}",
        "seperate_measure_files": False,  # INC's spelling; all ranks read the same files
    }


def _scheme(record: Record) -> Scheme:
    assert record.scheme is not None
    return record.scheme


def _check(source: NativeSource, record: Record) -> None:
    """Refuse a module that INC does not quantize, and one whose ranges are not recorded."""
    decision = source.decisions[record.name]
    if decision.handler.family.replaced:
        if decision.type not in _CLASSES:
            advice = f"INC replaces {' and '.join(_CLASSES)}: list it in modules_to_not_convert"
            raise not_expressed(record, NAME, f"a weight of {decision.type}", advice)
        if "input_scale" not in record.tensors:
            how = "inputs that are scaled as they come" if _scheme(record).is_dynamic else "weights alone in FP8"
            raise not_expressed(record, NAME, how, f"its files are about static scales; {_RECALIBRATE}")
        granularity, channels = granularity_of(record), PerChannel() if decision.type == "Linear" else PerTensor()
        if granularity not in (PerTensor(), channels):
            raise not_expressed(record, NAME, f"weights of {decision.type} scaled {granularity}", _RECALIBRATE)
    if not any(module == decision.name for module, _ in source.ranges):
        raise FP8CheckpointError(
            f"format={NAME!r}: the checkpoint does not record the ranges of {record.name}, which INC's files are made "
            f"of: {_RECALIBRATE}"
        )


def _check_alike(records: list[Record]) -> None:
    """INC scales all weights of a model by tensor or all by channel, and has one number format."""
    kinds = {(_is_by_channel(record), _scheme(record).fmt.dtype): record.name for record in records}
    if len(kinds) > 1:
        raise FP8CheckpointError(
            f"format={NAME!r} cannot express layers that are scaled or rounded in different ways, as "
            f"{' and '.join(list(kinds.values())[:2])} are: quantize them alike"
        )


def _scales_of(record: Record, scheme: Scheme) -> Node:
    """The scales of a layer as INC writes them; that of its output is the product, as INC multiplies: in hp_dtype."""
    scale, of_input = record.tensors["weight_scale"].flatten(), record.tensors["input_scale"].reshape(())
    product = (scale.to(scheme.hp_dtype) * of_input.to(scheme.hp_dtype)).float()
    if scale.numel() == 1:
        return Node((of_input,), (product.reshape(()),), {"weight": scale.reshape(())})
    of_inputs = torch.ones(record.tensors["weight"].shape[1])
    return Node((of_input,), (product,), {"weight": {0: scale, 1: of_inputs}})


def _method(config: FP8Config, layers: list[Record]) -> str:
    """INC's name for scales: the method's own, or that of one whose scales may have these values."""
    name = str(config.scale_method).lower()
    if name in _METHODS:
        return name
    if any(_is_by_channel(record) for record in layers):
        return _CHANNELS
    scales = [record.tensors[part].reshape(()) for record in layers for part in ("weight_scale", "input_scale")]
    return _POW2 if bool((torch.frexp(torch.stack(scales)).mantissa == 0.5).all()) else _ARBITRARY


def _is_by_channel(record: Record) -> bool:
    return record.tensors["weight_scale"].numel() > 1
