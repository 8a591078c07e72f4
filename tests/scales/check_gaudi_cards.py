"""Compare `maxabs_hw` scales with scales that real Gaudi cards computed.

    python tests/scales/check_gaudi_cards.py PATH

PATH is a JSON file {"rows": [[target, "activation" | "weight", maxabs, scale], ...]}. Every row must be equal, bit for
bit. Prints counts; exits with 0 (all equal), 1 (some differ) or 2 (no such file, or not of that form).
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch

from optimum_fp8.errors import FP8Error
from optimum_fp8.scales import activation_scale, weight_scale


def our_scale(target: str, kind: str, maxabs: float) -> float:
    if kind == "activation":
        return activation_scale(maxabs, method="maxabs_hw", target=target).item()
    if kind == "weight":
        return weight_scale(torch.tensor([[maxabs]]), method="maxabs_hw", target=target).item()
    raise ValueError(f"{kind!r} is neither 'activation' nor 'weight'")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    equal, rows = Counter(), Counter()
    try:
        for target, kind, maxabs, scale in json.loads(Path(arguments[0]).read_text())["rows"]:
            ours = our_scale(target, kind, maxabs)
            rows[target, kind] += 1
            equal[target, kind] += ours == scale
            if ours != scale:
                print(f"{target} {kind}: maxabs {maxabs} gives {ours}, the card gave {scale}")
    except (OSError, ValueError, TypeError, KeyError, FP8Error) as error:
        print(f"{arguments[0]} cannot be checked: {error!r}", file=sys.stderr)
        return 2
    for (target, kind), count in sorted(rows.items()):
        print(f"{target} {kind}: {equal[target, kind]} of {count} equal")
    print(f"all: {equal.total()} of {rows.total()} equal")
    return 0 if equal == rows and rows else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
