"""Mistakes in `ops/hpu/startup.py`, and the tests that fail with them."""

_FILE = "tests/ops/hpu/test_startup.py"
EACH = f"{_FILE}::test_each_bridge_is_set_up"
FIRST = f"{_FILE}::test_a_bridge_with_the_first_names_alone"
INVERSES = f"{_FILE}::test_inverses_are_constants_too"
NEWER = f"{_FILE}::test_each_generations_calls[1.24]"
OLDER = f"{_FILE}::test_each_generations_calls[1.19]"

FAILS: dict[str, list[tuple[str, str]]] = {
    '"hpu_inference_set_env", "hpu_set_inference_env", "hpu_set_env"': [
        (NEWER, '"hpu_set_env", "hpu_set_inference_env", "hpu_inference_set_env"'),
        (NEWER, '"hpu_set_inference_env", "hpu_inference_set_env", "hpu_set_env"'),
        (OLDER, '"hpu_inference_set_env", "hpu_set_env"'),
        (FIRST, '"hpu_inference_set_env", "hpu_set_inference_env"'),
    ],
    '"hpu_inference_initialize", "hpu_initialize"': [
        (NEWER, '"hpu_initialize", "hpu_inference_initialize"'),
        (FIRST, '"hpu_inference_initialize",'),
    ],
    "    _set_up(_core())\n": [
        (NEWER, "    _function(_core(), _SET_UP)()\n"),
        (NEWER, "    _core()\n"),
    ],
    "    set_up()\n    function = _function(_core(), _INITIALIZE)\n": [
        (FIRST, "    function = _function(_core(), _INITIALIZE)\n"),
        (FIRST, "    function = _function(_core(), _SET_UP)\n"),
    ],
    "    set_up()\n": [
        (FIRST, "    _core().hpu_initialize(model, mark_non_scales=False)\n    set_up()\n"),
    ],
    '{"mark_scales": True, "mark_non_scales": False}': [
        (NEWER, '{"mark_scales": False, "mark_non_scales": True}'),
        (NEWER, '{"mark_scales": True, "mark_non_scales": True}'),
        (NEWER, '{"mark_scales": False, "mark_non_scales": False}'),
    ],
    "    if not scales_only.keys() <= inspect.signature(function).parameters.keys():\n": [
        (OLDER, "    if False:\n"),
    ],
    '{"mark_only_scales_as_const": True}': [
        (OLDER, '{"mark_only_scales_as_const": False}'),
    ],
    "function(_WithInverses(model), **scales_only)": [
        (INVERSES, "function(model, **scales_only)"),
        (NEWER, "function(_WithInverses(model))"),
        (NEWER, "function(**scales_only)"),
    ],
    "(*self.model.named_parameters(), *self.model.named_buffers())": [
        (INVERSES, "self.model.named_buffers()"),
        (INVERSES, "self.model.named_parameters()"),
    ],
    "        found = dict(self.model.state_dict(*args, **kwargs))\n": [
        (INVERSES, "        found = {}\n"),
    ],
    "kept_inverse(tensor)) is not None": [
        (INVERSES, "kept_inverse(tensor)) is not None and False"),
    ],
    'found[f"{name}_inverse"] = inverse': [
        (INVERSES, 'found["inverse"] = inverse'),
        (INVERSES, 'found[f"{name}_inverse"] = tensor'),
        (INVERSES, 'found[f"{name}_inverse"] = inverse.clone()'),
    ],
    "@lru_cache(maxsize=1)\n": [
        (NEWER, ""),
    ],
    "    if (reason := why_missing()) is not None:\n": [
        (EACH, "    if (reason := why_missing()) is None:\n"),
    ],
    "    if found is None:\n": [
        (FIRST, "    if False:\n"),
    ],
}
