"""In which order samples are taken: as they are, or in a random order that the config's seed decides."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

from ..config import FP8Config

BUFFER = 1000  # samples of a stream that a random one is drawn from, as in the library `datasets`
_PACKED = 64  # so many texts may go into one packed sample

_Item = TypeVar("_Item")


def positions(count: int, config: FP8Config) -> Sequence[int]:
    """Which of `count` samples, and in which order; shuffled, as many as may be used."""
    if not config.shuffle_calibration_samples:
        return range(count)
    return random.Random(config.calibration_seed).sample(range(count), min(count, _drawn(config)))


def drawn(items: Iterable[_Item], config: FP8Config) -> list[_Item]:
    """A random sample of a stream that ends, in a random order: each has the same chance, and few are kept."""
    generator, kept = random.Random(config.calibration_seed), list[_Item]()
    for number, item in enumerate(items):
        if number < _drawn(config):
            kept.append(item)
        elif (place := generator.randrange(number + 1)) < len(kept):
            kept[place] = item
    generator.shuffle(kept)
    return kept


def _drawn(config: FP8Config) -> int:
    return config.most_samples * (_PACKED if config.concatenate_data else 1)
