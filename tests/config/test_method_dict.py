"""`scale_method` as INC's dict: which entry holds where, what entries leave out, and what is refused."""

import itertools

import pytest
from torch import nn

from optimum_fp8 import FP8Config
from optimum_fp8.errors import FP8ConfigError, FP8NotAvailableError
from optimum_fp8.scales import SCALE_METHODS

HW = {"granularity": "PTS", "scale_value_type": "MAXABS", "rounding_method": "HW_ALIGNED"}
POW2 = {"rounding_method": "POW2"}
# INC's pairs of (granularity, scale_value_type, rounding_method) for weight and activation, by the method's name.
_ACT_HW, _ACT_POW2, _TOKEN = ("PTS", "MAXABS", "HW_ALIGNED"), ("PTS", "MAXABS", "POW2"), ("PCS", "MAXABS", "POW2")
INC_PAIRS = {
    "unit_scale": (("PTS", "FIXED_VALUE", "SCALE_UNIT"), ("PTS", "FIXED_VALUE", "SCALE_UNIT")),
    "hw_aligned_single_scale": (("PTS", "FIXED_VALUE", "HW_ALIGNED_FIXED"), ("PTS", "FIXED_VALUE", "HW_ALIGNED_FIXED")),
    "maxabs_hw": (_ACT_HW, _ACT_HW),
    "maxabs_pow2": (_ACT_POW2, _ACT_POW2),
    "maxabs_arbitrary": (("PTS", "MAXABS", "IDENTITY"), ("PTS", "MAXABS", "IDENTITY")),
    "maxabs_hw_opt_weight": (("PTS", "OPT", "HW_ALIGNED"), _ACT_HW),
    "maxabs_pow2_opt_weight": (("PTS", "OPT", "POW2"), _ACT_POW2),
    "act_maxabs_hw_weights_pcs_maxabs_pow2": (("PCS", "MAXABS", "POW2"), _ACT_HW),
    "act_maxabs_hw_weights_pcs_opt_pow2": (("PCS", "OPT", "POW2"), _ACT_HW),
    "act_maxabs_pow2_weights_pcs_maxabs_pow2": (("PCS", "MAXABS", "POW2"), _ACT_POW2),
    "act_maxabs_pow2_weights_pcs_opt_pow2": (("PCS", "OPT", "POW2"), _ACT_POW2),
    "act_maxabs_pcs_pow2_weight_maxabs_pts_pow2_hw": (("PTS", "MAXABS", "HW_ALIGNED"), _TOKEN),
    "maxabs_pcs_pow2": (("PCS", "MAXABS", "POW2"), _TOKEN),
}


def pair(weight, activation, **more):
    keys = ("granularity", "scale_value_type", "rounding_method")
    return {
        part: {**dict(zip(keys, triple, strict=True)), **more}
        for part, triple in (("weight", weight), ("activation", activation))
    }


def method(value, *names, types=()):
    return FP8Config(scale_method=value).for_module(names or ["x"], types).method


# --- pairs --------------------------------------------------------------------------------------------------------


@pytest.mark.core
@pytest.mark.parametrize("case", [str.lower, str.upper, str.title])
@pytest.mark.parametrize("name", INC_PAIRS)
def test_every_named_method_can_be_said_as_a_pair(name, case):
    triples = [[case(word) for word in triple] for triple in INC_PAIRS[name]]
    found, named = method({"default": pair(*triples)}), SCALE_METHODS[name]
    assert (found.name, found.dynamic_only) == (name, named.dynamic_only)
    for mine, theirs in ((found.weight, named.weight), (found.activation, named.activation)):
        assert (mine.granularity, mine.value, mine.rounding) == (theirs.granularity, theirs.value, theirs.rounding)
        assert mine.backoff == 1.0, "INC takes no backoff from the method"


def test_no_other_pair_is_taken():
    words = (("PTS", "PCS"), ("MAXABS", "FIXED_VALUE", "OPT"),
             ("IDENTITY", "POW2", "HW_ALIGNED", "HW_ALIGNED_FIXED", "SCALE_UNIT"))  # fmt: skip
    triples, taken = list(itertools.product(*words)), set()
    for weight, activation in itertools.product(triples, triples):
        try:
            taken.add((method({"default": pair(weight, activation)}).name, (weight, activation)))
        except FP8ConfigError as error:
            assert "which no scale method is: the nearest is" in str(error)
    assert taken == set(INC_PAIRS.items())


def test_a_pair_of_no_method_names_what_was_found_and_the_nearest():
    with pytest.raises(FP8ConfigError) as error:
        FP8Config(scale_method={"default": "maxabs_hw", "nodes": {"a.b": {"activation": POW2}}})
    assert str(error.value) == (
        "scale_method['nodes']['a.b'] is weight (PTS, MAXABS, HW_ALIGNED) with activation (PTS, MAXABS, POW2), which "
        "no scale method is: the nearest is 'maxabs_hw', weight (PTS, MAXABS, HW_ALIGNED) with activation (PTS, "
        "MAXABS, HW_ALIGNED)"
    )


# --- what entries leave out ---------------------------------------------------------------------------------------


def test_an_empty_default_is_incs_base():
    found = method({"default": {}})
    assert (found.name, found.weight.backoff, found.activation.backoff) == ("maxabs_arbitrary", 1.0, 1.0)


def test_backoffs_are_free():
    found = method({"default": {"weight": {**HW, "backoff": 0.3}, "activation": {**HW, "backoff": 0.7}}})
    assert (found.name, found.weight.backoff, found.activation.backoff) == ("maxabs_hw", 0.3, 0.7)


def test_leaves_are_filled_from_the_default_key_by_key():
    default = {"weight": {**POW2, "backoff": 0.5}, "activation": {**POW2, "backoff": 0.25}}
    value = {
        "default": default,
        "nodes": {"a": {"weight": {"granularity": "PCS"}}, "b": {"activation": {"backoff": 1}}},
    }
    found = method(value, "a")
    assert found.name == "act_maxabs_pow2_weights_pcs_maxabs_pow2"
    assert (found.weight.backoff, found.activation.backoff) == (0.5, 0.25)
    assert (method(value, "b").weight.backoff, method(value, "b").activation.backoff) == (0.5, 1.0)


def test_an_entry_may_be_the_name_of_a_method_with_its_backoffs():
    value = {"default": "MAXABS_POW2", "nodes": {"a": "unit_scale", "b": {"weight": {"granularity": "PCS"}}}}
    assert method(value) == SCALE_METHODS["maxabs_pow2"]
    assert method(value, "a") == SCALE_METHODS["unit_scale"]
    found = method(value, "b")
    assert found.name == "act_maxabs_pow2_weights_pcs_maxabs_pow2"
    assert (found.weight.backoff, found.activation.backoff) == (0.5, 0.25), "what b leaves out is maxabs_pow2's"


def test_params_may_be_empty():
    assert (
        method({"default": {"weight": {**HW, "params": {}}, "activation": {**HW, "params": None}}}).name == "maxabs_hw"
    )


# --- which entry holds --------------------------------------------------------------------------------------------

PLACES = {
    "default": "maxabs_hw",
    "nodes": {"model.layers.3.mlp.up_proj": "maxabs_pow2", "Linear": "unit_scale"},
    "layers": {"3": "maxabs_arbitrary", "12": "maxabs_hw_opt_weight"},
    "layer_types": {"Linear": "maxabs_pow2_opt_weight"},
}


@pytest.mark.core
@pytest.mark.parametrize(
    "names, types, expected",
    [
        (["model.layers.3.mlp.up_proj"], ["Linear"], "maxabs_pow2"),
        (["model.layers.3.mlp.up_proj_2"], ["Linear"], "maxabs_arbitrary"),
        (["model.layers.3"], [], "maxabs_arbitrary"),
        (["encoder/layers/12/x"], ["Conv2d"], "maxabs_hw_opt_weight"),
        (["model.layers.1.x"], ["Linear"], "maxabs_pow2_opt_weight"),
        (["model.layers.13.x"], ["LinearX"], "maxabs_hw"),
        (["model.blocks.3.x"], [], "maxabs_hw"),
        (["tied.head", "model.layers.3.mlp.up_proj"], [], "maxabs_pow2"),
        (["tied.head", "model.layers.12.x"], ["Linear"], "maxabs_hw_opt_weight"),
        ([], [], "maxabs_hw"),
    ],
)
def test_the_first_of_node_layer_type_and_default_that_names_the_module(names, types, expected):
    assert FP8Config(scale_method=PLACES).for_module(names, types).method == SCALE_METHODS[expected]


def test_the_config_of_a_module_has_one_method():
    config = FP8Config(scale_method=PLACES).for_module(["model.layers.3.x"])
    assert config == FP8Config(scale_method="maxabs_arbitrary")
    free = FP8Config(scale_method={"default": {"weight": {"backoff": 0.3}}, "nodes": {"a": {}}}).for_module(["a"])
    assert free.method.weight.backoff == 0.3 and set(free.scale_method) == {"default"}
    assert free.for_module(["a"]) == free and len(free.methods) == 1


def test_the_method_of_the_config_is_the_defaults_and_methods_are_all():
    config = FP8Config(scale_method=PLACES)
    assert config.method == SCALE_METHODS["maxabs_hw"]
    assert {found.name for found in config.methods} == {
        "maxabs_hw", "maxabs_pow2", "unit_scale", "maxabs_arbitrary", "maxabs_hw_opt_weight", "maxabs_pow2_opt_weight"
    }  # fmt: skip


def test_entries_that_name_no_module_are_told():
    modules = [(["model.layers.3.mlp.up_proj"], ["Linear"]), (["model.layers.4.x"], ["Conv1D"])]
    assert FP8Config(scale_method=PLACES).unused_patterns(modules) == [
        ("scale_method['nodes']", "Linear"),
        ("scale_method['layers']", "12"),
    ]


# --- one form, and what is refused --------------------------------------------------------------------------------


def test_a_dict_has_one_form_and_survives_json():
    config = FP8Config(
        scale_method={
            "default": {"weight": {"rounding_method": "pow2", "params": {}}, "activation": {"rounding_method": "Pow2"}},
            "layers": {3: "MAXABS_HW"},
            "layer_types": {nn.Linear: {}},
            "nodes": None,
        }
    )
    assert config.scale_method == {
        "default": {"weight": {"rounding_method": "POW2"}, "activation": {"rounding_method": "POW2"}},
        "layers": {"3": "maxabs_hw"},
        "layer_types": {"torch.nn.modules.linear.Linear": {}},
    }
    assert FP8Config.from_dict(config.to_dict()) == config
    config.to_dict()["scale_method"]["layers"]["3"] = "x"
    assert config.scale_method["layers"] == {"3": "maxabs_hw"}


def test_a_dict_with_nothing_but_a_name_is_that_name():
    assert FP8Config(scale_method={"default": "MAXABS_HW", "nodes": {}}).scale_method == "maxabs_hw"


@pytest.mark.parametrize(
    "value, message",
    [
        ({}, "scale_method has no 'default'"),
        ({"nodes": {"a": "maxabs_hw"}}, "scale_method has no 'default'"),
        ({"default": {}, "node": {}}, "unknown key 'node' in scale_method: did you mean 'nodes'"),
        ({"default": "maxabs"}, r"scale_method\['default'\]='maxabs' is unknown: did you mean 'maxabs_hw'"),
        ({"default": {"weights": {}}}, r"unknown key 'weights' in scale_method\['default'\]: did you mean 'weight'"),
        ({"default": {"weight": "maxabs_hw"}}, r"scale_method\['default'\]\['weight'\]='maxabs_hw' is not valid"),
        ({"default": {"weight": {"backof": 1}}}, r"in scale_method\['default'\]\['weight'\]: did you mean 'backoff'"),
        ({"default": {"weight": {"backoff": 0}}}, r"\['weight'\]\['backoff'\]=0 is not valid"),
        ({"default": {"weight": {"granularity": "PTC"}}}, r"\['granularity'\]='PTC' is not valid: did you mean"),
        ({"default": {}, "layers": {"first": {}}}, r"scale_method\['layers'\] holds 'first'"),
        ({"default": {}, "layers": ["3"]}, r"scale_method\['layers'\]=\['3'\] is not valid"),
        ({"default": {}, "layers": {"3": {"activation": POW2}}}, r"scale_method\['layers'\]\['3'\] is weight \(PTS"),
        ({"default": {}, "layer_types": {3: {}}}, r"scale_method\['layer_types'\] holds 3"),
    ],
    ids=str,
)
def test_errors_name_the_place(value, message):
    with pytest.raises(FP8ConfigError, match=message):
        FP8Config(scale_method=value)


@pytest.mark.parametrize("leaf", [{"params": {"weight_scales": [1.0]}}, {"scale_value_type": "DUMMY_SCALES"}], ids=str)
def test_what_inc_has_and_we_do_not_have_says_so(leaf):
    with pytest.raises(FP8NotAvailableError, match=r"scale_method\['nodes'\]\['a'\]\['weight'\]"):
        FP8Config(scale_method={"default": {}, "nodes": {"a": {"weight": leaf}}})
