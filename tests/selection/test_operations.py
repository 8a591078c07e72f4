"""What the lists of INC's files switch on and off in models of transformers, which have none of INC's helpers."""

from __future__ import annotations

import json
import re

import pytest
import torch
from attention_models import FAMILIES
from gaudi_models import Matmul
from torch import nn
from transformers import PreTrainedModel

from optimum_fp8 import FP8Config, convert, prepare, quantization_report
from optimum_fp8.attention import plan_of
from optimum_fp8.config.inc import OPERATIONS
from optimum_fp8.errors import FP8NotAvailableError

NOTHING = {"names": [], "types": []}
ALL = {"attention": "fused", "cache": True, "layers": True}
LAYERS = {"attention": "", "cache": False, "layers": True}


def types(*names):
    return {"names": [], "types": list(names)}


def by_name(*names):
    return {"names": list(names), "types": []}


@pytest.fixture
def read(tmp_path):
    def read(**options):
        path = tmp_path / "inc.json"
        path.write_text(json.dumps({"method": "HOOKS", "observer": "maxabs", **options}))
        return FP8Config.from_json_file(path)

    return read


@torch.no_grad()
def forward(model, family):
    options = {"use_cache": True} if isinstance(model, PreTrainedModel) and model.can_generate() else {}
    return model(**FAMILIES[family].inputs, **options)


def converted(config, family="llama"):
    model = prepare(FAMILIES[family].make(), config)
    forward(model, family)
    return convert(model)


def what_is_on(model, name="model.layers.1.self_attn"):
    """What one attention module really does, and whether layers are FP8."""
    plan = plan_of(model.get_submodule(name))
    scheme = None if plan is None else plan.scheme
    return {
        "attention": scheme.dataflow if scheme is not None and scheme.rounds_attention else "",
        "cache": scheme is not None and scheme.caches,
        "layers": bool(quantization_report(model).quantized),
    }


CASES = {
    "empty": ({"allowlist": NOTHING}, ALL),
    "empty, older name": ({"whitelist": NOTHING}, ALL),
    "none": ({}, LAYERS),
    "null": ({"allowlist": None}, LAYERS),
    "layers": ({"allowlist": types("Linear", "Conv2d")}, LAYERS),
    "names besides the default types": ({"allowlist": {"names": ["self_attn"]}}, ALL),
    "no types by name": ({"allowlist": by_name("self_attn")}, ALL),
    "names elsewhere": ({"allowlist": by_name("mlp")}, LAYERS),
    "products": ({"allowlist": types("Linear", "Matmul")}, ALL | {"attention": "unfused", "cache": False}),
    "products alone": (
        {"allowlist": types("Matmul")},
        {"attention": "unfused", "cache": False, "layers": False},
    ),
    "one kernel": ({"allowlist": types("Linear", "ModuleFusedSDPA")}, ALL | {"cache": False}),
    "both": ({"allowlist": types("Linear", "Matmul", "ModuleFusedSDPA", "KVCache", "Softmax")}, ALL),
    "cache": ({"allowlist": types("Linear", "KVCache")}, LAYERS | {"cache": True}),
    "cache alone": ({"allowlist": types("KVCache")}, {"attention": "", "cache": True, "layers": False}),
    "torch's prefix": (
        {"allowlist": types("torch.nn.Linear", "torch.nn.Matmul")},
        ALL | {"attention": "unfused", "cache": False},
    ),
    "no products": ({"allowlist": NOTHING, "blocklist": types("Matmul")}, LAYERS | {"cache": True}),
    "no kernel": ({"allowlist": NOTHING, "blocklist": types("ModuleFusedSDPA")}, LAYERS | {"cache": True}),
    "no cache": ({"allowlist": NOTHING, "blacklist": types("KVCache")}, ALL | {"cache": False}),
    "no softmax": ({"allowlist": NOTHING, "blocklist": types("Softmax")}, ALL),
    "no layers": ({"allowlist": NOTHING, "blocklist": types("Linear")}, ALL | {"layers": False}),
    "neither": ({"allowlist": NOTHING, "blocklist": types("Matmul", "KVCache")}, LAYERS),
    "listed, and the other blocked": (
        {"allowlist": types("Linear", "ModuleFusedSDPA"), "blocklist": types("Matmul")},
        ALL | {"cache": False},
    ),
    "listed and blocked": (
        {"allowlist": types("Linear", "Matmul", "KVCache"), "blocklist": types("KVCache")},
        ALL | {"attention": "unfused", "cache": False},
    ),
    "blocked by name": ({"allowlist": NOTHING, "blocklist": by_name("self_attn")}, LAYERS),
    "caches by name": ({"allowlist": NOTHING, "blocklist": by_name("k_cache", "v_cache")}, ALL | {"cache": False}),
    "a product by name": ({"allowlist": NOTHING, "blocklist": by_name("matmul_qk")}, LAYERS | {"cache": True}),
    "products by name": (
        {"allowlist": by_name("matmul", "mlp")},
        {"attention": "unfused", "cache": False, "layers": True},
    ),
    "one layer": ({"allowlist": NOTHING, "blocklist": by_name(r"layers\.1\.")}, LAYERS),
    "our own key wins": ({"allowlist": NOTHING, "attention": False}, LAYERS | {"cache": True}),
}


@pytest.mark.parametrize("options, expected", CASES.values(), ids=CASES)
def test_what_the_lists_of_a_file_switch(read, options, expected):
    model = converted(read(**options))
    assert what_is_on(model) == expected
    report = quantization_report(model)
    assert set(report.lists) == set(OPERATIONS) and "attention by INC's lists: Matmul" in str(report)
    assert report.to_dict()["lists"]["KVCache"] == list(report.lists["KVCache"])


def test_the_report_says_why(read):
    told = quantization_report(converted(read(allowlist=NOTHING, blocklist=types("KVCache"))))
    assert told.lists["Matmul"] == (True, "empty allowlist: all that is supported")
    assert told.lists["KVCache"] == (False, "blocklist type 'KVCache'")
    assert all(row.quantized and row.reason == "selected" for row in told.attention)
    told = quantization_report(converted(read(allowlist=NOTHING, blocklist=by_name("v_cache"))))
    assert all(row.reason == "cache in high precision: blocklist name 'v_cache'" for row in told.attention)
    assert quantization_report(converted(read())).lists["Softmax"] == (False, "no allowlist: Linear, Conv2d and BMM")
    told = quantization_report(converted(read(allowlist=types("Linear", "KVCache"))))
    assert told.lists["Matmul"] == (False, "not in allowlist")
    told = quantization_report(converted(read(allowlist=types("Linear", "Matmul"))))
    assert all("unfused: ModuleFusedSDPA not in allowlist" in row.reason for row in told.attention)
    assert not quantization_report(converted(FP8Config())).lists


def test_softmax_goes_with_the_products(read):
    with pytest.raises(
        FP8NotAvailableError, match="self_attn: the lists select Softmax.*add Matmul or ModuleFusedSDPA"
    ):
        prepare(FAMILIES["llama"].make(), read(allowlist=types("Linear", "Softmax")))
    model = converted(read(allowlist=NOTHING, blocklist=types("Softmax")))
    assert all("rounded as an operand of the product" in row.reason for row in quantization_report(model).attention)


@pytest.mark.parametrize(
    "family, name", [("bloom", "transformer.h.1.self_attention"), ("gpt2", "transformer.h.1.attn")]
)
def test_however_a_model_computes_attention(read, family, name):
    assert what_is_on(converted(read(allowlist=NOTHING), family), name) == ALL
    off = converted(read(allowlist=NOTHING, blocklist=types("Matmul")), family)
    assert what_is_on(off, name) == LAYERS | {"cache": True}
    assert what_is_on(converted(read(), family), name) == LAYERS


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_model_without_a_cache_asks_for_none(read, family):
    report = quantization_report(converted(read(allowlist=NOTHING), family))
    assert len(report.attention) == 2 and all(row.activations == "static" for row in report.attention)


def test_a_saved_model_keeps_what_was_switched(read, tmp_path):
    model = converted(read(allowlist=types("Linear", "Matmul"), blocklist=by_name(r"layers\.0\.self_attn\.matmul")))
    model.save_pretrained(tmp_path)
    again = FAMILIES["llama"].model_class.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for each in (model, again):
        assert what_is_on(each) == ALL | {"attention": "unfused", "cache": False}
        assert what_is_on(each, "model.layers.0.self_attn") == LAYERS
    assert torch.equal(forward(again, "llama").logits, forward(model, "llama").logits)


def test_names_of_helpers_that_no_model_has_do_not_warn(read, caplog):
    converted(read(allowlist=NOTHING, blocklist=by_name("k_cache", "kv_b_proj")))
    assert "'kv_b_proj' matches no module" in caplog.text and "k_cache" not in caplog.text


class Products(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj, self.softmax = nn.Linear(8, 8), Softmax()
        self.matmul_qk, self.matmul_av = Matmul(), Matmul()

    def forward(self, x):
        q = self.proj(x)
        return self.matmul_av(self.softmax(self.matmul_qk(q, q.transpose(-1, -2))), q)


class Softmax(nn.Module):
    def forward(self, x):
        return torch.softmax(x, dim=-1)


@pytest.mark.parametrize(
    "options, on",
    [
        ({"allowlist": NOTHING}, "matmul_qk matmul_av softmax proj"),
        ({}, "proj"),
        ({"allowlist": types("Linear", "Matmul")}, "matmul_qk matmul_av proj"),
        ({"allowlist": types("Softmax")}, "softmax"),
        ({"allowlist": NOTHING, "blocklist": types("Matmul")}, "softmax proj"),
        ({"allowlist": NOTHING, "blocklist": by_name("matmul_qk")}, "matmul_av softmax proj"),
        ({"allowlist": by_name("matmul_av")}, "matmul_av"),
    ],
    ids=str,
)
def test_helper_modules_one_by_one(read, options, on):
    model = prepare(nn.Sequential(Products()), read(**options))
    model(torch.randn(2, 3, 8))
    report = quantization_report(convert(model))
    rows = [*report.modules, *report.attention]
    assert {row.name.removeprefix("0.") for row in rows if row.quantized} == set(on.split())


def test_types_of_attention_in_python():
    config = FP8Config(allowlist={"types": ["Linear", "Matmul"]})
    assert config.attention and not config.kv_cache and not config.operations
    assert what_is_on(converted(config)) == ALL | {"attention": "unfused", "cache": False}
    assert FP8Config.from_dict(config.to_dict()) == config
    assert not FP8Config(allowlist={"types": ["Linear", "Matmul"]}, attention=False).attention
    blocked = FP8Config(attention=True, kv_cache=True, blocklist={"types": ["KVCache"]})
    assert what_is_on(converted(blocked)) == ALL | {"cache": False}
    assert FP8Config(allowlist=NOTHING) == FP8Config() and not FP8Config().attention
    names_only = FP8Config(attention=True, kv_cache=True, allowlist={"names": ["mlp"]})
    assert what_is_on(converted(names_only)) == ALL  # in Python names are those of layers


def test_names_alone_without_an_empty_list_of_types_warn(read, caplog):
    config = read(allowlist={"names": ["mlp"]})
    assert config.allowlist["types"] == ["Linear", "Conv2d", "Conv1D"]
    assert re.search(r'default types .* write "types": \[\]', caplog.text)
