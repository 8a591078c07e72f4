"""The parts of a model that calibration can go through one after the other: its blocks, and what lies around them.

Blocks are what models keep in lists, one after the other, and what transformers says cannot be split. Around them are
embeddings, projectors and heads: of each, the largest module that holds no block and something that is selected.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

from ...errors import FP8CalibrationError

_LISTS = (nn.ModuleList, nn.ModuleDict)
WHOLE = "use calibration='whole'"


def parts_of(model: nn.Module, selected: Collection[str]) -> dict[str, nn.Module]:
    """The parts by name, in the order in which they stand in the model; each of `selected` is in one of them.

    Raises:
        FP8CalibrationError: the model has no blocks, or some modules are in several.
    """
    blocks = set(_blocks(model, _not_split(model)))
    if not blocks:
        raise FP8CalibrationError(
            f"calibration='sequential' goes through a model block by block, and {type(model).__name__} has none: "
            f"expected layers in a torch.nn.ModuleList; {WHOLE}"
        )
    parts = {name: model.get_submodule(name) for name in _parts("", model, blocks, selected)}
    owners: dict[nn.Module, str] = {}
    for name, part in parts.items():
        for module in part.modules():
            if owners.setdefault(module, name) != name and any(True for _ in module.parameters(recurse=False)):
                raise FP8CalibrationError(
                    f"calibration='sequential' goes through a model block by block, and {owners[module]} and {name} "
                    f"share a {type(module).__name__}: {WHOLE}"
                )
    return parts


def _not_split(model: nn.Module) -> set[str]:
    """Names of the classes that transformers keeps on one device."""
    said = (getattr(module, "_no_split_modules", None) or () for module in model.modules())
    return {name for names in said for name in names}


def _blocks(model: nn.Module, not_split: Collection[str], prefix: str = "") -> Iterator[str]:
    """Names of the outermost modules in lists; without lists, of those that are not to be split."""
    for name, child in model._modules.items():
        if child is None:
            continue
        full_name = f"{prefix}{name}"
        if _is_in_list(model, child):
            yield full_name
            continue
        inside = list(_blocks(child, not_split, f"{full_name}."))
        if not inside and type(child).__name__ in not_split and _has_children(child):
            yield full_name
        yield from inside


def _is_in_list(parent: nn.Module, child: nn.Module) -> bool:
    """Whether `child` is one of several modules that are called one after the other, and more than a single layer."""
    if isinstance(child, _LISTS) or not _has_children(child) or next(child.parameters(), None) is None:
        return False
    if isinstance(parent, nn.Sequential):
        return sum(type(each) is type(child) for each in parent) > 1
    return isinstance(parent, _LISTS)


def _has_children(module: nn.Module) -> bool:
    return any(child is not None for child in module._modules.values())


def _parts(name: str, module: nn.Module, blocks: Collection[str], selected: Collection[str]) -> Iterator[str]:
    if name in blocks:
        yield name
        return
    below = f"{name}." if name else ""
    if any(block.startswith(below) for block in blocks):
        for child_name, child in module._modules.items():
            if child is not None:
                yield from _parts(f"{below}{child_name}", child, blocks, selected)
    elif name in selected or any(each.startswith(below) for each in selected):
        yield name
