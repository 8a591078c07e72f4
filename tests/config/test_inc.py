"""Reading INC's configuration files as people have them."""

import json
import logging

import pytest
from torch import nn

from optimum_fp8 import FP8Config
from optimum_fp8.errors import FP8ConfigError, FP8NotAvailableError
from optimum_fp8.test_utils import gaudi

SHIPPED = {"method": "HOOKS", "observer": "maxabs", "dump_stats_path": "./hqt_output/measure"}
NOTHING = {"names": [], "types": []}
DEEPSEEK = {"types": [], "names": ["lm_head", "k_b_proj", "kv_b_proj", "k_cache", "v_cache"]}
# Written by INC itself beside a saved model.
SAVED = {
    "non_tunable_params": ["white_list"],
    "dump_stats_path": "measure_cfg.json",
    "fp8_config": "E4M3",
    "hp_dtype": "bf16",
    "blocklist": NOTHING,
    "allowlist": {"names": [], "types": ["Linear", "Conv2d", "EmbeddingBag"]},
    "mode": "LOAD",
    "scale_method": "maxabs_pow2",
    "scale_params": {},
    "observer": "maxabs",
    "mod_dict": {},
    "_json_file": "measure_cfg.json",
    "measure_exclude": "OUTPUT",
    "fake_quant": "False",
    "use_qdq": "True",
    "scale_format": "scalar",
    "measure_on_hpu": True,
    "world_size": -1,
}


@pytest.fixture
def read(tmp_path):
    def read(options):
        path = tmp_path / "config.json"
        path.write_text(options if isinstance(options, str) else json.dumps(options, indent=4))
        return FP8Config.from_json_file(path)

    return read


@pytest.mark.core
@pytest.mark.parametrize(
    "options, expected",
    [
        ({"mode": "MEASURE"}, {"mode": "MEASURE"}),
        ({"mode": "MEASURE", "measure_exclude": "NONE"}, {"measured": ("input", "output", "weight")}),
        ({"mode": "QUANTIZE", "scale_method": "maxabs_hw"}, {"mode": "QUANTIZE", "scale_method": "maxabs_hw"}),
        ({"mode": "QUANTIZE", "scale_method": "unit_scale"}, {"scheme": "static"}),
        ({"mode": "QUANTIZE", "scale_method": "maxabs_hw_opt_weight"}, {"scale_method": "maxabs_hw_opt_weight"}),
        ({"mode": "QUANTIZE", "scale_method": "maxabs_hw", "scale_format": "CONST"}, {"scale_format": "const"}),
        ({"mode": "MEASURE", "quantize_weight": False, "blocklist": DEEPSEEK}, {"blocklist": DEEPSEEK}),
        ({"mode": "MEASURE", "dump_stats_xlsx_path": "./hqt_output/m.xlsx"}, {"mode": "MEASURE"}),
        (
            {"mode": "QUANTIZE", "allowlist": NOTHING, "blocklist": {"types": [], "names": ["self_attn"]}},
            {"allowlist": NOTHING, "blocklist": {"types": [], "names": ["self_attn"]}},
        ),
    ],
    ids=str,
)
def test_files_shipped_with_optimum_habana(read, options, expected):
    config = read({**SHIPPED, **options})
    for key, value in expected.items():
        assert getattr(config, key) == value
    assert config.dump_stats_path == "./hqt_output/measure"


def test_a_file_that_inc_saved_beside_a_model(read, caplog):
    config = read(SAVED)
    assert (config.mode, config.scale_method, config.use_qdq) == ("LOAD", "maxabs_pow2", True)
    assert config.allowlist == {"names": [], "types": ["Linear", "Conv2d"]}
    assert "EmbeddingBag" in caplog.text


@pytest.mark.core
@pytest.mark.parametrize(
    "options, key, value",
    [
        ({"mode": "quantize"}, "mode", "QUANTIZE"),
        ({"fp8_config": "e5m2"}, "fp8_config", "E5M2"),
        ({"hp_dtype": "BF16"}, "hp_dtype", "bf16"),
        ({"hp_dtype": "torch.float32"}, "hp_dtype", "fp32"),
        ({"scale_method": "MAXABS_POW2"}, "scale_method", "maxabs_pow2"),
        ({"scale_format": "Scalar"}, "scale_format", "scalar"),
        ({"observer": "MAXABS"}, "observer", "maxabs"),
        ({"measure_exclude": "none"}, "measure_exclude", "NONE"),
        ({"ignore_modules_wo_measures": "True"}, "ignore_modules_wo_measures", True),
        ({"use_qdq": "false"}, "use_qdq", False),
        ({"dynamic_quantization": "True"}, "scheme", "dynamic"),
        ({"whitelist": {"names": ["mlp"], "types": []}}, "allowlist", {"names": ["mlp"], "types": []}),
        ({"blacklist": {"names": ["lm_head"]}}, "blocklist", {"names": ["lm_head"], "types": []}),
        ({"allowlist": {"types": ["torch.nn.Linear"]}}, "allowlist", {"names": [], "types": ["torch.nn.Linear"]}),
        ({"dump_stats_path": ""}, "dump_stats_path", "./hqt_output/measure"),
        ({"scale_params": {"input_backoff": 0.5, "lp_dtype": "x"}}, "input_backoff", 0.5),
        ({"scale_params": {"alpha": 0.5}}, "input_backoff", None),
        ({"scale_params": None}, "input_backoff", None),
        ({"device_for_scales": "GAUDI2"}, "target", "gaudi2"),
        ({"device_for_scales": "gaudi3"}, "target", "gaudi3"),
        ({"device_for_scales": None}, "target", "auto"),
        ({"device_for_scales": None, "target": "gaudi2"}, "target", "gaudi2"),
        ({"calibration_sample_interval": "0"}, "mode", "AUTO"),
        ({"row_parallel_linear_allreduce_quantization": "True"}, "row_parallel_linear_allreduce_quantization", True),
        ({"recalc_scales": "True", "seperate_measure_files": False, "local_rank": None}, "mode", "AUTO"),
        ({"dataset": "texts.txt", "target": "gaudi3"}, "target", "gaudi3"),
    ],
    ids=str,
)
def test_values_as_they_are_in_the_wild(read, options, key, value):
    assert getattr(read(options), key) == value


@pytest.mark.parametrize("value", ["GAUDI2", "gaudi2", "Gaudi2"])
def test_the_device_for_scales_is_the_target_whose_numerics_apply(read, value):
    asked = FP8Config(target="gaudi2")
    with gaudi.emulated("gaudi3"):
        for config in (FP8Config(device_for_scales=value), read({"device_for_scales": value})):
            assert config.target == "gaudi2" and config.number_format == asked.number_format
            assert config.number_format.full_scale == 240 and config.arithmetic == "gaudi"
        assert FP8Config(device_for_scales=None).resolved_target == "gaudi3"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device_for_scales": "GAUDI2", "target": "gaudi3"}, "both 'device_for_scales' and 'target' are given"),
        ({"device_for_scales": "GAUDI4"}, "target='GAUDI4'"),
    ],
)
def test_a_device_for_scales_that_contradicts_the_target_or_is_not_known(read, options, message):
    for make in (read, lambda options: FP8Config(**options)):
        with pytest.raises(FP8ConfigError, match=message):
            make(options)


@pytest.mark.parametrize(
    "key, value", [("method", "HOOKS"), ("quantize_weight", False), ("dump_stats_xlsx_path", "a.xlsx")]
)
def test_retired_keys_warn(read, caplog, key, value):
    with caplog.at_level(logging.WARNING):
        assert read({key: value}) == read({})
    assert key in caplog.text and "retired" in caplog.text


def test_how_often_inc_writes_its_files_has_no_counterpart(read, caplog):
    assert read({"calibration_sample_interval": 0}) == read({}) and "interval" not in caplog.text
    assert read({"calibration_sample_interval": "1"}) == read({})
    assert "calibration_sample_interval has no effect" in caplog.text
    with pytest.raises(FP8NotAvailableError, match="calibration_sample_interval"):
        FP8Config(calibration_sample_interval=1)


@pytest.mark.parametrize("value", [True, "True", False, "False"])
def test_fake_quant_is_quantization_aware_training(read, value):
    assert read({"fake_quant": value, "allowlist": {"types": ["Linear"], "names": []}}).fake_quant is (
        str(value) == "True"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"observer": "shape"},
        {"mode": "SHAPE"},
        {"allowlist": {"types": ["EmbeddingBag"]}},
        {"scale_method": {"default": {"activation": {"params": {"x": 1}}}}},
    ],
    ids=str,
)
def test_what_is_not_there_yet_says_so(read, options):
    with pytest.raises(FP8NotAvailableError, match="not available in optimum_fp8 yet"):
        read(options)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"scale_methd": "maxabs_hw"}', "did you mean 'scale_method'"),
        ('{"scale_method": "maxabs"}', "did you mean 'maxabs_hw'"),
        ('{"mode": "QUANTIZE",}', "is not JSON"),
        ('["mode"]', "must hold a JSON object, found list"),
        ("", "is not JSON"),
        ('{"blocklist": ["lm_head"]}', "blocklist"),
        ('{"scale_params": 0.5}', "scale_params"),
    ],
)
def test_bad_files_say_what_is_wrong(read, text, message):
    with pytest.raises(FP8ConfigError, match=message):
        read(text)


def test_a_missing_file(tmp_path):
    with pytest.raises(FP8ConfigError, match="cannot read the configuration .*nowhere.json"):
        FP8Config.from_json_file(tmp_path / "nowhere.json")


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(FP8ConfigError, match="config.json"):
        FP8Config.from_json_file(tmp_path / "config.json")


def test_patterns_of_inc_files_that_match_nothing_only_warn(read, caplog):
    from optimum_fp8 import prepare

    config = read({**SHIPPED, "mode": "MEASURE", "blocklist": DEEPSEEK})
    assert config.lenient and config.replace(target="cpu").lenient
    prepare(nn.Sequential(nn.Linear(4, 4)), config)
    assert "kv_b_proj" in caplog.text and "matches no module" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"scale_params": {"input_backoff": 0.5}}, "scale_params: INC 3.10 ignores it; here it counts (input_backoff)"),
        ({"scale_params": {"weight_backoff": 0.5, "alpha": 1}}, "neither INC 3.10 nor optimum_fp8 reads alpha"),
        ({"use_qdq": "True"}, "use_qdq: written as text ('True')"),
        ({"recalc_scales": "false", "measure_on_hpu": "True"}, "recalc_scales, measure_on_hpu: written as text"),
    ],
)
def test_what_inc_reads_otherwise_is_said(read, caplog, options, said):
    config = read(options)
    assert said in caplog.text
    assert config.use_qdq is (options.get("use_qdq") == "True")
    given = options.get("scale_params", {})
    assert (config.input_backoff, config.weight_backoff) == (given.get("input_backoff"), given.get("weight_backoff"))


@pytest.mark.parametrize("options", [{"scale_params": {}}, {"scale_params": {"hp_dtype": "bf16"}}, {"use_qdq": True}])
def test_what_inc_reads_as_we_do_is_not(read, caplog, options):
    read({**options, "allowlist": {"types": ["Linear"]}})
    assert not caplog.records
