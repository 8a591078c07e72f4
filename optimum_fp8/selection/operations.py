"""Which operations of attention the lists of a configuration leave on, by INC's names for them.

A model of transformers has no helper modules for them: its attention does all of them by itself. Lists hold for it as
they would for the helpers that optimum-habana's models have inside their attention modules.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..config import FP8Config
from ..config.inc import HELPERS, OPERATIONS, bare_types
from ..errors import FP8NotAvailableError
from ..modules.handler import ModuleHandler
from ..scales import Scheme

_PRODUCTS = ("Matmul", "ModuleFusedSDPA")
_HELPERS = {
    "Matmul": ("matmul_qk", "matmul_av"),
    "Softmax": ("softmax",),
    "ModuleFusedSDPA": ("fused_scaled_dot_product_attention",),
    "KVCache": ("k_cache", "v_cache"),
}


def limits_by_lists(
    handler: ModuleHandler, names: Sequence[str], scheme: Scheme, config: FP8Config
) -> tuple[dict[str, Any], str]:
    """What of a scheme the lists leave off in a module of attention: fields with their values, and why.

    Raises:
        FP8NotAvailableError: the softmax alone is to be in FP8.
    """
    if not handler.operations:
        return {}, ""
    off = {kind: why_off(kind, names, config) for kind in OPERATIONS}
    listed = set(bare_types(config.allowlist))
    # Either name stands for the products of such a module: one of them on the blocklist keeps them in high precision,
    # unless the allowlist names the other.
    blocked = any(off[kind].startswith("blocklist") for kind in _PRODUCTS)
    products = [kind for kind in _PRODUCTS if not off[kind] and (kind in listed or not blocked)]
    limits: dict[str, Any] = {}
    texts = []
    if scheme.rounds_attention and not products:
        if "Softmax" in listed and not off["Softmax"]:
            raise FP8NotAvailableError(
                f"{names[0]}: the lists select Softmax and not the products around it ({off['Matmul']}), and the "
                "attention of this model rounds them together: add Matmul or ModuleFusedSDPA to the allowlist, or "
                "remove Softmax from it"
            )
        limits["rounds_attention"] = False
        reason = next(off[kind] for kind in _PRODUCTS if off[kind])
        texts.append(f"products and softmax in high precision: {reason}")
    elif scheme.rounds_attention:
        if "ModuleFusedSDPA" not in products and scheme.dataflow == "fused":
            limits["dataflow"] = "unfused"
            texts.append(f"unfused: ModuleFusedSDPA {off['ModuleFusedSDPA']}")
        if off["Softmax"].startswith("blocklist"):
            texts.append(f"the softmax is rounded as an operand of the product: only Softmax {off['Softmax']}")
    if scheme.caches and off["KVCache"]:
        limits["caches"] = False
        texts.append(f"cache in high precision: {off['KVCache']}")
    return limits, "; ".join(texts)


def why_off(kind: str, names: Sequence[str], config: FP8Config) -> str:
    """Why the lists leave an operation of the attention modules called so off; empty: they do not."""
    allow, block = config.allowlist, config.blocklist
    helpers = helper_names(names, kind)
    if kind in bare_types(block):
        return f"blocklist type {kind!r}"
    if config.lenient:
        for pattern in block["names"]:
            if any(re.search(pattern, name) for name in helpers):
                return f"blocklist name {pattern!r}"
    if not allowlist_tells(config) or kind in bare_types(allow):
        return ""
    matched = helpers and all(any(re.search(pattern, name) for pattern in allow["names"]) for name in helpers)
    return "" if matched else "not in allowlist"


def allowlist_tells(config: FP8Config) -> bool:
    """Whether the allowlist is about attention at all: it names types of it, or names that INC would look for there."""
    types = set(bare_types(config.allowlist))
    return bool(types.intersection(HELPERS)) or (config.lenient and bool(config.allowlist["names"]))


def helper_names(names: Sequence[str], kind: str = "") -> list[str]:
    """What the helpers for one operation, or for all, would be called inside attention modules."""
    helpers = _HELPERS[kind] if kind else [helper for kinds in _HELPERS.values() for helper in kinds]
    return [f"{name}.{helper}" for name in names for helper in helpers]
