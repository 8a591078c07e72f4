"""Tiny configurations made of an architecture's defaults: widths divided by one number, few layers, a small vocabulary.

One divisor for all widths of a configuration and those inside it keeps what has to fit together.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

from transformers import CONFIG_MAPPING

from .complete import complete, own_backbone

Config = dict[str, Any]

VOCABULARY = 160
_PLAIN_IDS = 100  # token ids below stay what they are
_LAYERS = re.compile(
    r"(^|_)(num_.*layers|n_layers?|layers|depth|num_blocks|num_hidden_groups)$|(encoder|decoder)_layers$"
)
_NO_LAYERS = re.compile(
    r"shared_layers|nextn|feat_extract|adapter_layers|loss_|lstm|residual|window_layers|dense_layers|add_layers|postnet"
)
_HEADS = re.compile(r"(^|_)(n_heads?|num_heads|attention_heads)$")
_WIDTH = re.compile(
    r"(hidden|dim|_size|channels?|width|features|units|embd|d_model|d_ff|d_inner|d_kv|d_embed|filters|ffn|intermediate"
    r"|_rank|dff|d_head|kv_channels|filter_sizes)"
)
_NO_WIDTH = re.compile(
    r"vocab|position|^pos_|patch|image_size|window|kernel|stride|batch|chunk|^num_(?!filters|channels)|^max_|fft|rate|block_size|crop"
    r"|input_size|pool(?!er_hidden)|codebook_size|group|factor|layers|time|frame|length|grid|context|view|roi|merge|expand|hash|token"
    r"|num_dim|bins|buckets|ratio|step|resolution|spatial|tile|bucket|chunk|image_feature_pool|points|query_size|_p$"
)  # fmt: skip
_TOKEN = re.compile(r"(token_ids?|token_index|_token|eos_id|bos_id|pad_id|_index|_idx)$")
_PER_LAYER = re.compile(r"(indexes|indices|idxs?|_ids|layers|pattern)$")
_NO_PARTS = ("per_layer_config", "id2label", "label2id", "task_specific_params")
_DROPPED = ("transformers_version", "torch_dtype", "dtype", "_name_or_path")


def default(model_type: str) -> Config:
    """What an architecture's configuration says when nothing is asked of it."""
    return CONFIG_MAPPING[model_type]().to_dict()


def walk(config: Config) -> Iterator[Config]:
    """A configuration, and all that are inside it."""
    yield config
    for name, value in config.items():
        if isinstance(value, dict) and name not in _NO_PARTS and all(isinstance(key, str) for key in value):
            yield from walk(value)


def proportional(config: Config, *, widths: bool = True, pictures: bool = True, fewer_heads: bool = False) -> Config:
    """The configuration with few layers and tokens, and if wanted with narrow layers and small pictures.

    Args:
        config: as a dict.
        widths: whether layers become narrower.
        pictures: whether images become smaller.
        fewer_heads: whether narrower layers have fewer heads, or narrower ones.
    """
    small = copy.deepcopy(config)
    divisor = 1 if not widths else _divisor_of_heads(small) if fewer_heads else _divisor(small)
    tokens = _token_map(small)
    for part in walk(small):
        _fewer_layers(part)
        _fewer_kinds(part)
        for own in (part, *(part.get("per_layer_config") or {}).values()):
            for name, value in list(own.items()):
                if name in _DROPPED:
                    del own[name]
                elif isinstance(name, str) and not isinstance(value, (bool, str, dict)):
                    own[name] = _smaller(name, value, divisor, tokens, fewer_heads)
        if divisor > 1 and not fewer_heads:
            _fitting_heads(part)
        if pictures:
            _smaller_pictures(part)
    for part, full in zip(walk(small), walk(config), strict=True):
        complete(part, full, _width_of(part), _heads_of(part))
    for part in list(walk(small)):
        own_backbone(part)
    _fitting_text(small)
    return small


def _fitting_text(config: Config) -> None:
    """Features that are made for a text model, as wide as it is."""
    width = _width_of(config.get("text_config") or {})
    for part in config.values():
        if width and isinstance(part, dict) and type(part.get("out_hidden_size")) is int:
            part["out_hidden_size"] = width


def _divisor(config: Config) -> int:
    """The largest power of two that leaves every head eight values, and every width 32."""
    limits = [64 if any(_heads_of(part) for part in walk(config)) else 8]
    for part in walk(config):
        own = part.get("head_dim") or part.get("d_kv")
        limits += [_power_of_two(own, 8)] if isinstance(own, int) and own else []
        width, heads = _width_of(part), _heads_of(part)
        if width >= 32:
            limits.append(_power_of_two(width, 32))
            if heads and not own and width % heads == 0 and (width // heads) % 32 == 0:
                limits.append(_power_of_two(width // heads, 8))
    return min(limits)


def _divisor_of_heads(config: Config) -> int:
    """The largest power of two that divides all numbers of heads."""
    counts = [heads for part in walk(config) if (heads := _heads_of(part))]
    return min([_power_of_two(count, 1) for count in counts], default=1)


def _width_of(part: Config) -> int:
    found = (part.get(key) for key in ("embed_dim", "d_model", "n_embd", "hidden_size"))
    return next((value for value in found if type(value) is int), 0)


def _heads_of(part: Config) -> int:
    return next((value for key, value in part.items() if _HEADS.search(str(key)) and type(value) is int), 0)


def _fitting_heads(part: Config) -> None:
    """Fewer heads where narrow ones would have a number of values that rotary embeddings cannot halve twice."""
    width, heads = _width_of(part), _heads_of(part)
    if (
        not width
        or not heads
        or part.get("head_dim")
        or part.get("d_kv")
        or (width % heads == 0 and width // heads % 8 == 0)
    ):
        return
    fitting = next((each for each in range(heads, 0, -1) if width % (8 * each) == 0), math.gcd(width, heads))
    for key, value in part.items():
        if type(value) is int and (value == heads and _HEADS.search(str(key)) or "key_value_heads" in str(key)):
            part[key] = fitting if value == heads else math.gcd(value, fitting)


def _power_of_two(value: int, least: int) -> int:
    found = 1
    while value % (2 * found) == 0 and value // (2 * found) >= least:
        found *= 2
    return found


def _smaller(name: str, value: Any, divisor: int, tokens: dict[int, int], fewer_heads: bool) -> Any:
    if name == "mrope_section":
        return value if fewer_heads else _sections(value, divisor)
    if isinstance(value, (list, tuple)):
        plain = [each for each in value if isinstance(each, (bool, str, dict))]
        return value if plain else [_smaller(name, each, divisor, tokens, fewer_heads) for each in value]
    if not isinstance(value, int) or value is None:
        return value
    for pattern, ceiling in _CEILINGS:
        if pattern.search(name):
            return min(value, ceiling)
    if _TOKEN.search(name):
        return tokens.get(value, value)
    if fewer_heads and (_HEADS.search(name) or "key_value_heads" in name):
        return max(value // divisor, 1)
    if fewer_heads and re.search(r"head_dim|d_kv|rank|d_head", name):
        return value
    if _WIDTH.search(name) and not _NO_WIDTH.search(name) and value >= 16 and value % divisor == 0:
        return value // divisor
    if re.search(r"intermediate_size", name) and value > 8 * divisor > 8:
        return value // (8 * divisor) * 8  # grouped products want rows of multiples of 16 bytes
    return value


def _sections(values: list[int], divisor: int) -> list[int]:
    """Parts of a head's rotary dimensions, which add up to what is left of these."""
    small = [each // divisor for each in values]
    small[-1] += sum(values) // divisor - sum(small)
    return small


# The most that fields of these names may say.
_CEILINGS = [
    (re.compile(pattern), ceiling)
    for pattern, ceiling in (
        (r"vocab_size", VOCABULARY),
        (r"^(max_position_embeddings|n_positions|max_sequence_length|seq_length|n_ctx)$", 512),
        (r"^max_source_positions$", 32),
        (r"^(mamba_)?chunk_size$", 16),
        (r"^sliding_window(_size)?$", 8),
        (r"^mm_tokens_per_image$", 4),
        (r"^(num_queries|two_stage_num_proposals|num_denoising)$", 8),
        (r"(num|n)_(local_|routed_)?experts$|moe_num_experts$|zero_expert_num$", 4),
        (r"(experts_per_tok(en)?|moe_top_?k|moe_k|router_top_k|top_k_experts|num_selected_experts)$", 2),
        (r"^(n|num_expert)_group$", 2),
        (r"(_period|cross_attention_frequency|sliding_window_pattern|(de|en)coder_sparse_step)$", 2),
        (r"^topk_group$|first_k_dense_replace|num_nextn_predict_layers|num_kv_shared_layers|_offset$", 1),
    )
]


def _token_map(config: Config) -> dict[int, int]:
    """Small ids for the large ones, different for different ones."""
    large: set[int] = set()
    for part in walk(config):
        for name, value in part.items():
            if not isinstance(name, str):
                continue
            values = value if isinstance(value, (list, tuple)) else [value]
            if _TOKEN.search(name):
                large.update(each for each in values if type(each) is int and each >= _PLAIN_IDS)
    return {value: VOCABULARY - 1 - number for number, value in enumerate(sorted(large, reverse=True))}


def _fewer_layers(part: Config) -> None:
    """Two layers, or as many as there are kinds of them, and lists about layers cut to these."""
    for name, value in list(part.items()):
        if type(value) is not int or not _LAYERS.search(name) or _NO_LAYERS.search(name) or value <= 2:
            continue
        lists = {key: each for key, each in part.items() if isinstance(each, list) and len(each) == value}
        kinds = [key for key, each in lists.items() if each and isinstance(each[0], (str, list, bool))]
        kept = _representatives([tuple(str(part[key][index]) for key in kinds) for index in range(value)])
        stages = part.get("out_indices") or []
        kept = sorted({*kept, *range(value - max(0, len(stages) - len(kept)), value)})
        part[name] = len(kept)
        for key, each in list(part.items()):
            if key in lists:
                part[key] = [each[index] for index in kept]
            elif key == "out_indices" and stages:
                part[key] = list(range(len(kept) - len(stages) + 1, len(kept) + 1))
            elif key in ("out_features", "stage_names"):
                del part[key]
            elif key == "per_layer_config" and each:
                part[key] = {kept.index(int(layer)): own for layer, own in each.items() if int(layer) in kept}
            elif isinstance(each, list) and _PER_LAYER.search(key):
                part[key] = _indices_within(each, len(kept))
    for name in [
        key for key in part if re.search(r"^(depths|num_block_repeats|blocks_per_stage|layers_per_stage)$", key)
    ]:
        if isinstance(part[name], list):
            part[name] = [min(each, 1) if isinstance(each, int) else each for each in part[name]]


def _fewer_kinds(part: Config) -> None:
    """The same for a list of kinds of layers that is their count, too."""
    kinds = part.get("layers_block_type")
    if kinds and "num_hidden_layers" not in part:
        part["layers_block_type"] = [kinds[index] for index in _representatives([(each,) for each in kinds])]


def _representatives(kinds: list[tuple[str, ...]]) -> list[int]:
    """The first layer of each kind, at most six, and the next ones until there are two."""
    found = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:6]
    rest = [index for index in range(len(kinds)) if index not in found]
    return sorted(found + rest[: max(0, 2 - len(found))])


def _indices_within(values: list[Any], count: int) -> list[Any]:
    if not all(type(each) is int and each >= 0 for each in values) or not values:
        return values
    return [each for each in values if each < count] or [count - 1]


def _smaller_pictures(part: Config) -> None:
    patch = part.get("patch_size")
    patch = patch[-1] if isinstance(patch, (list, tuple)) and patch else patch
    small = 4 * patch if isinstance(patch, int) and patch >= 7 else 64
    for key in ("image_size", "img_size"):
        size = part.get(key)
        if isinstance(size, int) and size > 64:
            part[key] = small
        elif isinstance(size, (list, tuple)) and all(isinstance(each, int) and each > 64 for each in size):
            part[key] = [small for _ in size]
