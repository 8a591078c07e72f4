"""FP8Config: INC's keys and defaults, checks, copies that share live objects, and exact JSON."""

import copy
import inspect
import json

import pytest
import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, LlamaConfig
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from optimum_fp8 import FP8Config
from optimum_fp8.errors import FP8ConfigError
from optimum_fp8.scales import SCALE_METHODS

INC_DEFAULTS = {
    "fp8_config": "E4M3",
    "hp_dtype": "bf16",
    "observer": "maxabs",
    "allowlist": {"names": [], "types": []},
    "blocklist": {"names": [], "types": []},
    "mode": "AUTO",
    "dump_stats_path": "./hqt_output/measure",
    "scale_method": "maxabs_hw",
    "measure_exclude": "OUTPUT",
    "scale_params": {"input_backoff": None, "weight_backoff": None},
    "scale_format": "scalar",
    "ignore_modules_wo_measures": False,
    "dynamic_quantization": False,
    "use_qdq": False,
}
HF_DEFAULTS = {
    "target": "auto",
    "activation_scheme": "auto",
    "dataset": None,
    "tokenizer": None,
    "processor": None,
    "num_calibration_samples": 128,
    "max_seq_length": 512,
    "batch_size": 1,
    "text_column": "text",
    "modules_to_not_convert": None,
    "quantize_lm_head": False,
    "quantize_embeddings": False,
    "dequantize": False,
}


def generator():
    yield from [{"input_ids": torch.ones(1, 2, dtype=torch.long)}] * 3


def loader():
    return DataLoader(torch.zeros(4, 3), batch_size=2)


class Tokenizer:
    """Stands for a live object that must not be copied."""

    def __deepcopy__(self, memo):
        raise AssertionError("copied")


@pytest.mark.core
@pytest.mark.parametrize("key, value", [*INC_DEFAULTS.items(), *HF_DEFAULTS.items()])
def test_default(key, value):
    assert getattr(FP8Config(), key) == value


def test_it_is_a_quantization_config_of_transformers():
    config = FP8Config()
    assert isinstance(config, QuantizationConfigMixin)
    assert config.quant_method == "optimum_fp8"


def test_the_signature_tells_every_key_and_default():
    parameters = inspect.signature(FP8Config).parameters
    assert {*INC_DEFAULTS, *HF_DEFAULTS} - {"scale_params"} <= set(parameters)
    assert parameters["scale_method"].default == "maxabs_hw"


@pytest.mark.parametrize(
    "key, hint",
    [
        ("scale_methd", "did you mean 'scale_method'"),
        ("scale-method", "did you mean 'scale_method'"),
        ("block_list", "did you mean 'blocklist'"),
        ("nonsense_xyz", "valid: fp8_config"),
    ],
)
def test_unknown_key(key, hint):
    with pytest.raises(FP8ConfigError, match=hint):
        FP8Config(**{key: None})
    with pytest.raises(FP8ConfigError, match=hint):
        FP8Config.from_dict({**FP8Config().to_dict(), key: None})


@pytest.mark.parametrize("options", [{"quant_method": "fp8"}, {"format_version": 3}])
def test_another_method_or_a_newer_format_is_refused(options):
    with pytest.raises(FP8ConfigError, match="quant_method|upgrade"):
        FP8Config(**options)


def test_scale_params_is_the_older_spelling_of_the_backoffs():
    config = FP8Config(scale_params={"input_backoff": 0.5})
    assert config.input_backoff == 0.5 and config.weight_backoff is None
    assert config.scale_params == {"input_backoff": 0.5, "weight_backoff": None}


# --- assignment ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("scale_method", "MAXABS_POW2", "maxabs_pow2"),
        ("use_qdq", "True", True),
        ("allowlist", None, {"names": [], "types": []}),
    ],
)
def test_assigned_values_are_normalized(key, value, expected):
    config = FP8Config()
    setattr(config, key, value)
    assert getattr(config, key) == expected


def test_assigned_values_are_checked():
    config = FP8Config()
    with pytest.raises(FP8ConfigError, match="did you mean 'maxabs_pow2'"):
        config.scale_method = "maxabs_pow3"
    assert config.scale_method == "maxabs_hw"


def test_assigning_an_unknown_key_is_an_error():
    with pytest.raises((FP8ConfigError, AttributeError), match="scale_method"):
        FP8Config().scale_methd = "maxabs_pow2"


def test_a_contradiction_that_was_assigned_is_found_before_the_model_is_touched():
    from optimum_fp8 import prepare

    config = FP8Config(scale_method="maxabs_pcs_pow2")
    with pytest.raises(FP8ConfigError, match="only exists dynamically"):
        config.activation_scheme = "static"
        prepare(nn.Sequential(nn.Linear(4, 4)), config)


def test_replace_makes_a_checked_copy():
    data = loader()
    config = FP8Config(dataset=data)
    changed = config.replace(target="gaudi2")
    assert (config.target, changed.target) == ("auto", "gaudi2")
    assert changed.dataset is data
    with pytest.raises(FP8ConfigError, match="drop the dataset"):
        config.replace(activation_scheme="dynamic")


# --- copies and JSON ----------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("make", [generator, loader, lambda: generator], ids=["generator", "loader", "callable"])
def test_live_objects_are_shared_by_copies_and_never_serialized(make):
    data, tokenizer = make(), Tokenizer()
    config = FP8Config(dataset=data, tokenizer=tokenizer, processor=tokenizer, blocklist={"names": ["x"]})
    clone = copy.deepcopy(config)
    assert clone.dataset is data and clone.tokenizer is tokenizer and clone.processor is tokenizer
    clone.blocklist["names"].append("y")
    assert config.blocklist["names"] == ["x"], "everything else is copied"
    plain = json.loads(config.to_json_string(use_diff=False))
    assert plain["dataset"] is None and plain["tokenizer"] is None and plain["processor"] is None
    assert json.loads(json.dumps(config.to_dict())) == plain


def test_paths_and_texts_are_serialized():
    config = FP8Config(dataset="texts.txt", tokenizer="folder")
    assert (config.to_dict()["dataset"], config.to_dict()["tokenizer"]) == ("texts.txt", "folder")
    assert FP8Config.from_dict(FP8Config(dataset=["a", "b"]).to_dict()).dataset == ["a", "b"]


def test_a_changed_dict_does_not_change_the_config():
    config = FP8Config(allowlist={"names": ["a"]}, dataset=["x"])
    plain = config.to_dict()
    plain["allowlist"]["names"].append("b")
    plain["dataset"].append("y")
    assert config.allowlist["names"] == ["a"] and config.dataset == ["x"]


name_lists = st.lists(st.from_regex(r"[a-z_]{1,8}(\\\.[0-9]{1,2})?", fullmatch=True), max_size=3)
module_lists = st.fixed_dictionaries(
    {}, optional={"names": name_lists, "types": st.lists(st.sampled_from(["Linear", "torch.nn.Conv2d", nn.Linear]))}
)
backoffs = st.none() | st.floats(min_value=2.0**-10, max_value=1.0)
counts = st.integers(1, 4096)
any_case = st.sampled_from([str.lower, str.upper, str.title])
VALID = {
    "fp8_config": st.sampled_from(["E4M3", "e5m2"]),
    "hp_dtype": st.sampled_from(["bf16", "FP16", torch.float32]),
    "allowlist": st.none() | module_lists,
    "blocklist": st.none() | module_lists,
    "mode": st.sampled_from(["AUTO", "MEASURE", "QUANTIZE", "LOAD"]),
    "dump_stats_path": st.from_regex(r"\A[a-z]{1,8}/[a-zäß ]{1,8}\Z"),
    "scale_method": st.builds(lambda name, case: case(name), st.sampled_from(sorted(SCALE_METHODS)), any_case),
    "measure_exclude": st.sampled_from(["NONE", "INPUT", "OUTPUT", "PARAMS", "ALL"]),
    "input_backoff": backoffs,
    "weight_backoff": backoffs,
    "scale_format": st.sampled_from(["scalar", "CONST"]),
    "ignore_modules_wo_measures": st.booleans(),
    "dynamic_quantization": st.sampled_from([False, False, False, True]),
    "use_qdq": st.booleans() | st.sampled_from(["True", "False"]),
    "target": st.sampled_from(["auto", "gaudi2", "gaudi3", "cuda", "cpu"]),
    "activation_scheme": st.sampled_from(["auto", "auto", "static", "dynamic", "weight_only"]),
    "dataset": st.none() | st.lists(st.text(), min_size=1, max_size=2) | st.just("texts.jsonl"),
    "tokenizer": st.none() | st.just("folder/tokenizer"),
    "num_calibration_samples": counts,
    "max_seq_length": counts,
    "batch_size": counts,
    "text_column": st.text(min_size=1, max_size=5),
    "modules_to_not_convert": st.none() | name_lists,
    "quantize_lm_head": st.booleans(),
    "quantize_embeddings": st.booleans(),
    "softmax_backoff": backoffs,
    "overrides": st.dictionaries(
        st.sampled_from(["mlp", "attn", "z"]), st.fixed_dictionaries({}, optional={"input_backoff": backoffs})
    ),
}


@given(st.fixed_dictionaries({}, optional=VALID))
@settings(max_examples=60, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_json_round_trip_is_exact(options):
    try:
        config = FP8Config(**options)
    except FP8ConfigError as error:
        assert "is not valid" not in str(error), "only combinations may be refused here"
        reject()
    again = FP8Config.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert again.to_json_string(use_diff=False) == config.to_json_string(use_diff=False)


def test_unequal_configs_are_unequal():
    assert FP8Config() != FP8Config(target="gaudi2")
    assert FP8Config() != FP8Config().to_dict()


def test_our_own_file_round_trips(tmp_path):
    config = FP8Config(target="gaudi2", blocklist={"names": ["lm_head"]}, input_backoff=0.3)
    config.to_json_file(tmp_path / "config.json")
    again = FP8Config.from_json_file(tmp_path / "config.json")
    assert again == config and not again.lenient


def test_from_dict_gives_back_what_it_does_not_know():
    config, unused = FP8Config.from_dict({}, return_unused_kwargs=True, target="gaudi3", revision="main")
    assert config.target == "gaudi3" and unused == {"revision": "main"}


@pytest.mark.core
@pytest.mark.parametrize("make", [generator, loader], ids=["generator", "loader"])
def test_the_path_through_a_model_config_of_transformers(make, tmp_path):
    data = make()
    model_config = LlamaConfig(hidden_size=32, num_hidden_layers=1)
    model_config.quantization_config = FP8Config(dataset=data, target="gaudi2", blocklist={"types": [nn.Conv2d]})
    assert copy.deepcopy(model_config).quantization_config.dataset is data
    assert '"quant_method": "optimum_fp8"' in model_config.to_json_string()
    model_config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path).quantization_config
    config = AutoQuantizationConfig.from_dict(dict(loaded))
    assert isinstance(config, FP8Config)
    assert config == model_config.quantization_config


# --- shown --------------------------------------------------------------------------------------------------------


def test_repr_shows_what_differs_from_the_defaults():
    assert repr(FP8Config()) == "FP8Config()"
    assert repr(FP8Config(target="gaudi2", use_qdq=True)) == "FP8Config(use_qdq=True, target='gaudi2')"


def test_repr_can_be_typed_in_again():
    config = FP8Config(scale_method="maxabs_pow2", blocklist={"names": [r"mlp\.gate\b"]}, input_backoff=0.5)
    assert eval(repr(config), {"FP8Config": FP8Config}) == config


def test_repr_does_not_hide_live_objects():
    assert "dataset" in repr(FP8Config(dataset=loader()))


@pytest.mark.parametrize("mode", ["MEASURE", "QUANTIZE", "AUTO"])
def test_inc_scripts_ask_the_config_what_to_do(mode):
    config = FP8Config(mode=mode)
    assert (config.measure, config.quantize) == (mode == "MEASURE", mode == "QUANTIZE")


def test_it_is_asked_like_the_dict_that_it_is_on_disk():
    config = FP8Config(target="gaudi2", hp_dtype=torch.float16)
    for key, value in config.to_dict().items():
        assert config.get(key) == config.get(key, "other") == value
    assert config.get("weight_block_size") is None and config.get("activation", 3) == 3


def test_what_was_said_is_known():
    assert FP8Config(batch_size=1).says("batch_size") and not FP8Config().says("batch_size")
    assert FP8Config().replace(batch_size=1).says("batch_size")
