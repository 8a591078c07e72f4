"""Inputs with a meaning of their own, which no rule can know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .facts import Facts, noise

Inputs = dict[str, Any]


def _depth_pro(model: Any, facts: Facts) -> Iterator[Inputs]:
    """Pictures of which the smallest of three sizes is one patch."""
    yield {"pixel_values": noise(1, 3, 112, 112)}


def _decisions(model: Any, facts: Facts) -> Iterator[Inputs]:
    """What was seen, done and rewarded, step by step."""
    steps = torch.arange(8).expand(2, 8)
    made = {"states": noise(2, 8, facts.config.state_dim), "actions": noise(2, 8, facts.config.act_dim)}
    made |= {"rewards": noise(2, 8, 1), "returns_to_go": noise(2, 8, 1), "timesteps": steps}
    yield made | {"attention_mask": torch.ones_like(steps)}


def _matched(model: Any, facts: Facts) -> Iterator[Inputs]:
    """A picture and a text, to be matched with each other."""
    ids = facts.ids(1, 11)
    yield {
        "pixel_values": noise(1, facts.channels, *facts.picture),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "use_image_text_matching_head": True,
    }


def _pixels(model: Any, facts: Facts) -> Iterator[Inputs]:
    """Four blocks of two by two patches of pixels, colours last."""
    side = 2 * facts.patch
    yield {"pixel_values": noise(4, side, side, facts.channels), "image_grid_thw": torch.tensor([[1, 2, 2]])}


def _spectra(model: Any, facts: Facts) -> Iterator[Inputs]:
    """A spectrum and where in it padding is."""
    made = noise(1, 64, facts.config.input_feat_size)
    yield {"audio_mel": made, "audio_mel_mask": torch.zeros(made.shape[:2], dtype=torch.bool)}


def _question(model: Any, facts: Facts) -> Iterator[Inputs]:
    """One question of three options, that ends at the tenth token."""
    numbers = {"marks": [[10]], "num_options": [[3]], "question_type_ids": [[0]]}
    yield {"input_ids": facts.ids(1, 11)} | {name: torch.tensor(value) for name, value in numbers.items()}


def _placed(model: Any, facts: Facts) -> Iterator[Inputs]:
    """A text with the places that an image takes in it."""
    ids = facts.ids(1, 11)
    places = torch.zeros_like(ids)
    places[:, 1 : 1 + facts.config.latent_query_num] = 1
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "image_embeds_position_mask": places}
    yield text | {"pixel_values": noise(1, 3, *facts.picture)}


def _global(model: Any, facts: Facts) -> Iterator[Inputs]:
    """Texts of which the first token attends to all others, one or several a row."""
    for shape in ((2, 11), (2, 2, 11)):
        made = {"input_ids": facts.ids(*shape), "attention_mask": torch.ones(shape, dtype=torch.long)}
        yield made | {"global_attention_mask": (torch.arange(11) == 0).long().expand(shape)}


def _tiles(model: Any, facts: Facts) -> Iterator[Inputs]:
    """One image of one tile."""
    count = facts.vision("max_num_tiles", 4)
    mask = (torch.arange(count) == 0).long().expand(1, 1, count)
    made = {"pixel_values": noise(1, 1, count, 3, *facts.picture), "aspect_ratio_mask": mask}
    yield made | {"aspect_ratio_ids": torch.tensor([[1]])}


def _asked(model: Any, facts: Facts) -> Iterator[Inputs]:
    """Texts of which the fourth token is to be found."""
    ids = facts.ids(2, 11)
    ids[:, 3] = facts.config.question_token_id
    yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _spoken(model: Any, facts: Facts) -> Iterator[Inputs]:
    """Speech so far, as spectra or as what the decoder makes of them, beside text, sounds or hidden states."""
    for width in (facts.config.num_mel_bins, facts.config.hidden_size):
        said = {"decoder_input_values": noise(2, 6, width)}
        for made in ({"input_ids": facts.ids(2, 11)}, {"input_values": noise(2, 11, facts.config.hidden_size)}):
            yield made | said


def _acted(model: Any, facts: Facts) -> Iterator[Inputs]:
    """What a robot sees and is told, its state, and random actions to start from."""
    ids = facts.ids(1, 11)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": noise(1, 1, 3, *facts.picture)}
    made |= {"pixel_attention_mask": torch.ones(1, 1, dtype=torch.bool)}
    width = facts.config.dit_config.hidden_size
    yield made | {"action_embeds": noise(1, 5, width)}
    actions = noise(1, facts.config.chunk_size, facts.config.max_action_dim)
    yield made | {"state": noise(1, facts.config.max_state_dim), "noise": actions, "timestep": torch.tensor([0.5])}


# By model type.
INPUTS: dict[str, Callable[[Any, Facts], Iterator[Inputs]]] = {
    "blip-2": _matched,
    "gemma3n_audio": _spectra,
    "inkling2_vision": _pixels,
    "jev": _question,
    "kosmos-2": _placed,
    "longformer": _global,
    "mllama_vision_model": _tiles,
    "pi0": _acted,
    "splinter": _asked,
    "speecht5": _spoken,
    "decision_transformer": _decisions,
    "depth_pro": _depth_pro,
}
