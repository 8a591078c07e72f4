"""The model card of an FP8 model: a README.md that says what it was made of, how, and how it is loaded.

It goes to the hub with `push_to_hub`, unless there is a card already; in a folder none is written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from huggingface_hub import ModelCardData
from torch import nn

from ..checkpoint.folder import OWN_CARD
from ..checkpoint.provenance import provenance_of
from ..errors import FP8ConfigError, FP8StateError
from ..lifecycle import Phase, state_of, unwrapped
from ..modules.handler import Reason
from ..report import QuantizationReport, format_bytes, format_share, quantization_report
from ..report.table import name_pattern

README = "README.md"
_TAGS = ["fp8", "optimum-fp8", "quantized"]
# Of the card that transformers makes up where there is none.
_MADE_UP = "This model card has been automatically generated."

_REPOSITORY = "<this repository>"

Results = Mapping[str, Any]


def model_card(model: nn.Module, results: Results | None = None, *, base_model: str | None = None) -> str:
    """The text of a README.md for a converted model of transformers, with metadata for the hub at its top.

    It tells no path of the machine that it is made on.

    Args:
        model: converted.
        results: what was measured of it, by name: numbers or texts, or for each a mapping of them by model, such as
            `{"perplexity": {"bfloat16": 20.24, "FP8": 20.31}}`.
        base_model: the model on the hub that it was made of; None: the one that it was loaded from, if that is a name.

    Raises:
        FP8StateError: the model is not converted.
        FP8ConfigError: results that are no mapping.
    """
    inner: Any = unwrapped(model)
    state = state_of(inner)
    if state is None or state.phase is not Phase.CONVERTED:
        raise FP8StateError(
            f"model_card: {type(inner).__name__} is not converted to FP8: load it with quantization_config=FP8Config(…)"
        )
    if results is not None and not isinstance(results, Mapping):
        raise FP8ConfigError(f"results={results!r}: expected a mapping of what was measured, {{'perplexity': 20.3}}")
    base = base_model or _name_on_the_hub(getattr(inner, "name_or_path", ""))
    report, provenance = quantization_report(inner), provenance_of(inner)
    parts = [
        _metadata(inner, base),
        f"# {base or type(inner).__name__}, in FP8",
        f"{'[' + base + '](https://huggingface.co/' + base + ')' if base else 'A ' + type(inner).__name__}, quantized "
        f"to FP8 with `optimum_fp8`: {format_share(report.size.in_fp8, report.size.parameters)} of the parameters, "
        f"{format_bytes(report.size.now)} instead of {format_bytes(report.size.high_precision)}.",
        "## How it was made",
        _table(("", ""), _method(report, provenance)),
        "## What is in FP8",
        _table(("modules", "type", "how many", "parameters", "precision"), _rows(report)),
        *(["## Results", _results(results)] if results else []),
        "## How to load it",
        _loading(inner),
        OWN_CARD,
    ]
    return "\n\n".join(parts) + "\n"


def fp8_card_for(model: Any, path: str, repo_id: str) -> None:
    """Write the card of a model in FP8 over one that transformers made up; one of the user's stays as it is."""
    with open(path, encoding="utf-8") as file:
        found = file.read()
    state = state_of(model)
    if _MADE_UP not in found or state is None or state.phase is not Phase.CONVERTED:
        return
    with open(path, "w", encoding="utf-8") as file:
        file.write(model_card(model).replace(_REPOSITORY, repo_id))


def _name_on_the_hub(name: str) -> str | None:
    """A name such as "owner/model", or None for what is a path, or is not known."""
    is_path = not name or os.path.isabs(name) or name.startswith((".", "~")) or os.path.exists(name)
    return None if is_path or name.count("/") > 1 else name


def _metadata(model: Any, base: str | None) -> str:
    tags = [*_TAGS, *(tag for tag in getattr(model, "model_tags", None) or [] if tag not in _TAGS)]
    said: dict[str, Any] = {"library_name": "transformers", "tags": tags}
    if base is not None:
        said |= {"base_model": base, "base_model_relation": "quantized"}
    if getattr(model, "can_generate", bool)():
        said["pipeline_tag"] = "text-generation" if not model.config.is_encoder_decoder else None
    return f"---\n{ModelCardData(**said).to_yaml()}\n---"


def _method(report: QuantizationReport, provenance: Mapping[str, Any]) -> list[tuple[str, ...]]:
    config, data, made = provenance["config"], provenance["data"], provenance["made_with"]
    schemes = sorted({each.scheme for each in report.quantized if each.scheme})
    activations = sorted({each.activations for each in report.quantized if each.activations})
    unknown = "not recorded" if "static" in activations else "none: no scale follows from data"
    rows: list[tuple[str, ...]] = [
        ("scheme", "; ".join(schemes)),
        ("scale method", str(config["scale_method"])),
        ("activations", ", ".join(activations)),
        ("made for", str(config["target"])),
        ("calibration data", _data(data) if data else unknown),
        ("date", provenance["date"] or "unknown"),
        ("versions", ", ".join(f"{name} {version}" for name, version in made.items()) or "unknown"),
    ]
    if report.attention:
        rows.append(("attention", f"{sum(bool(each.quantized) for each in report.attention)} modules in FP8"))
    rows += [("changed since", f"{each['what']} ({each['date']})") for each in provenance["changes"]]
    return rows


def _data(data: Mapping[str, Any]) -> str:
    amounts = [f"{data[name]} {name}" for name in ("samples", "tokens") if data.get(name)]
    observer = [f"observer {data['observer']}"] if data.get("observer") else []
    return ", ".join([str(data.get("source", "unknown")), *amounts, *observer])


def _rows(report: QuantizationReport) -> list[tuple[str, ...]]:
    """Modules that differ in numbers alone stand together: those in FP8, then those that are not, with the reason."""
    counted: dict[tuple[str, str, str], list[int]] = {}
    for each in report.modules:
        precision = f"FP8, {each.activations}" if each.quantized else f"as it was: {each.reason}"
        counted.setdefault((precision, name_pattern(each.name), each.type), []).append(each.parameters)
    for other in report.others:
        for pattern in {name_pattern(name) for name in other.names} if len(other.names) > 1 else other.names:
            alike = sum(name_pattern(name) == pattern for name in other.names) or 1
            key = (f"as it was: {other.reason or Reason.NO_CANDIDATE.value}", pattern, other.type)
            counted.setdefault(key, []).extend([other.parameters * alike // len(other.names)] + [0] * (alike - 1))
    rows = [
        (f"`{pattern}`", kind, str(len(sizes)), f"{sum(sizes):,}", precision)
        for (precision, pattern, kind), sizes in counted.items()
    ]
    return sorted(rows, key=lambda row: (not row[-1].startswith("FP8"), row))


def _results(results: Results) -> str:
    nested = [each for each in results.values() if isinstance(each, Mapping)]
    columns = list(dict.fromkeys(name for each in nested for name in each))
    if not columns:
        return _table(("", "FP8"), [(name, str(value)) for name, value in results.items()])
    rows = [
        (name, *(str(value.get(column, "")) for column in columns))
        if isinstance(value, Mapping)
        else (name, *("" for _ in columns[1:]), str(value))
        for name, value in results.items()
    ]
    return _table(("", *columns), rows)


def _loading(model: Any) -> str:
    auto = "AutoModelForCausalLM" if getattr(model, "can_generate", bool)() else type(model).__name__
    auto = type(model).__name__ if hasattr(transformers, type(model).__name__) else auto
    return (
        "The weights are in the format of `optimum_fp8` (`pip install optimum-fp8`), which computes with them in FP8:\n"
        "\n```python\n"
        "import optimum_fp8  # registers the format with transformers\n"
        f"from transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("{_REPOSITORY}")\n'
        "```\n\n"
        "vLLM, SGLang and transformers without `optimum_fp8` load what `export` makes of a copy of this repository, "
        "where their format can express it:\n"
        "\n```bash\n"
        "optimum-cli fp8 export --model <folder> --output <folder> --format compressed-tensors\n"
        "```"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
