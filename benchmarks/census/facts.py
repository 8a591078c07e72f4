"""What a configuration tells of the inputs that its model takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedConfig

_VISION = (
    "vision_config",
    "visual_config",
    "vit_config",
    "image_config",
    "backbone_config",
    "vision_encoder_config",
    "vq_config",
)
_AUDIO = ("audio_config", "audio_encoder_config", "speech_config", "encoder_config", "sound_config")


class Facts:
    """Reads a configuration and those inside it."""

    def __init__(self, config: Any):
        self.config, self.model_type = config, config.model_type
        self.parts = list(parts(config))

    def find(self, name: str, default: Any, among: tuple[str, ...] = ()) -> Any:
        """The value of a field: in the parts of these names first, then anywhere."""
        preferred = [part for key, part in self.parts if key in among]
        for part in (*preferred, *(part for _, part in self.parts)):
            value = getattr(part, name, None)
            if value is not None:
                return value
        return default

    def vision(self, name: str, default: Any) -> Any:
        return self.find(name, default, _VISION)

    def audio(self, name: str, default: Any) -> Any:
        return self.find(name, default, _AUDIO)

    def text(self, name: str, default: Any) -> Any:
        decodes = (
            {"decoder": True} if hasattr(self.config, "text_encoder") else {}
        )  # it has two, of which one generates
        return getattr(self.config.get_text_config(**decodes), name, None) or self.find(name, default)

    @property
    def channels(self) -> int:
        value = self.vision("num_channels", None) or self.vision("in_channels", None) or self.vision("in_chans", 3)
        return value if isinstance(value, int) else 3

    @property
    def picture(self) -> tuple[int, int]:
        size = self.vision("image_size", None) or self.vision("img_size", None) or 64
        pair = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        return (int(pair[0]), int(pair[-1])) if all(isinstance(each, int) for each in pair) else (64, 64)

    @property
    def patch(self) -> int:
        value = self.vision("patch_size", 16)
        return int(value[-1]) if isinstance(value, (list, tuple)) else int(value)

    @property
    def temporal_patch(self) -> int:
        return int(self.vision("temporal_patch_size", None) or self.vision("patch_temporal", 1))

    def token(self, word: str) -> int | None:
        """The id of the placeholder of an image, a sound or a video."""
        for name in (f"{word}_token_id", f"{word}_token_index", f"{word}_token"):
            value = self.find(name, None)
            if isinstance(value, int):
                return value
        return None

    @property
    def special(self) -> set[int]:
        """All ids that a configuration gives a meaning."""
        found: set[int] = set()
        for _, part in self.parts:
            for name, value in vars(part).items():
                if "token" in name or name.endswith(("_id", "_index")):
                    found |= {each for each in (value if isinstance(value, list) else [value]) if type(each) is int}
        return found

    def ids(self, *shape: int, seed: int = 0) -> torch.Tensor:
        """Random ids that mean nothing special."""
        size = min(self.text("vocab_size", 90), 90)
        plain = [each for each in range(3, size) if each not in self.special] or [size // 2]
        picks = torch.randint(len(plain), shape, generator=torch.Generator().manual_seed(17 + seed))
        return torch.tensor(plain)[picks]

    def is_plain(self, ids: torch.Tensor) -> torch.Tensor:
        return ~torch.isin(ids, torch.tensor(sorted(self.special) or [-1]))

    def tensors_for(self, name: str) -> Iterator[torch.Tensor]:
        """Random tensors of the shapes that inputs of this name may have."""
        noise = torch.Generator().manual_seed(5)
        mels = self.audio("num_mel_bins", None) or self.audio("feature_size", None) or self.audio("n_mels", 80)
        if name == "input_features":
            width = self.audio("input_feat_per_channel", None) or mels
            width = self.audio("feature_projection_input_dim", width)
            long = 2 * self.audio("max_source_positions", 50)
            if self.audio("max_source_positions", None):
                yield torch.randn(1, width, min(long, 6000), generator=noise)
            for rows, bands in product((1, 2), dict.fromkeys((width, self.find("input_size", width), 128))):
                yield torch.randn(rows, 96, bands, generator=noise)
                yield torch.randn(rows, bands, 96, generator=noise)
            size = self.audio("spec_size", 64)
            yield torch.randn(1, 1, self.audio("max_length", size), mels, generator=noise)
        elif name in ("input_values", "audio_values"):
            for shape in ((2, 4000), (1, 1, 4000), (1, self.audio("max_length", 256), mels), (2, 24, mels)):
                yield torch.randn(shape, generator=noise)
            yield torch.randn(1, 24000, generator=noise)
        elif name == "pixel_values":
            yield torch.randn(1, self.channels, *self.picture, generator=noise)
        elif name == "encoder_hidden_states":
            width = self.find("encoder_hidden_size", None) or self.text("hidden_size", 32)
            yield torch.randn(2, 11, self.find("cross_attention_hidden_size", width), generator=noise)
        elif name == "inputs_embeds":
            yield torch.randn(2, 11, self.text("hidden_size", 32), generator=noise)
        elif "ids" in name:
            yield self.ids(2, 11)
        else:
            yield torch.randn(2, 11, self.text("hidden_size", None) or self.find("d_model", 32), generator=noise)

    def known(self, rows: int) -> dict[str, torch.Tensor]:
        """Inputs of which every model that takes them needs the same."""
        return self._series(rows) | self._beside_pictures(rows)

    def _beside_pictures(self, rows: int) -> dict[str, torch.Tensor]:
        """What tells a model how to look at pictures."""
        height, width = self.picture
        made = {"qformer_input_ids": self.ids(rows, 5), "task_inputs": self.ids(rows, self.find("task_seq_len", 77))}
        made["image_attention_mask"] = torch.ones(rows, 11, 2, dtype=torch.long)
        made["target_sizes"] = torch.tensor([[height // self.patch, width // self.patch]]).expand(rows, 2)
        made["visual_feats"] = torch.randn(rows, 4, self.find("visual_feat_dim", 32))
        made["visual_pos"] = torch.rand(rows, 4, self.find("visual_pos_dim", 4))
        return made

    def _series(self, rows: int) -> dict[str, torch.Tensor]:
        """Series of numbers, of which the future is forecast."""
        length, history = self.find("prediction_length", 8) or 8, self.find("context_length", 16) or 16
        past = history + max(self.find("lags_sequence", [0]) or [0])
        features = self.find("num_time_features", 0) or 0
        channels = self.find("num_input_channels", None)
        values = torch.randn(rows, past, channels) if channels else torch.randn(rows, past)
        made = {"past_values": values, "past_observed_mask": torch.ones_like(values)}
        made["past_time_features"] = torch.randn(rows, past, max(features, 0))
        made["future_time_features"] = torch.randn(rows, length, max(features, 0))
        made["future_values"] = torch.randn(rows, length, channels) if channels else torch.randn(rows, length)
        return made


def parts(config: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """A configuration and those inside it, with the names of the fields that hold them."""
    yield name, config
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from parts(value, key)


def noise(*shape: int) -> torch.Tensor:
    """Random values, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))
