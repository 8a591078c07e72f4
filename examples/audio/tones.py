"""Synthetic sounds in eight classes: tones and sweeps of a second, of any pitch and loudness, under noise."""

from __future__ import annotations

import numpy

RATE = 16000
NAMES = ("tone", "up", "down", "up and down", "two tones", "pulses", "warble", "noise")


def sound(kind: int, dice: numpy.random.Generator) -> numpy.ndarray:
    """One sound of a class, float32 `[RATE]`."""
    seconds = numpy.arange(RATE) / RATE
    low = dice.uniform(250, 900)
    high = low * dice.uniform(1.5, 2.5)
    pitch = {
        "tone": numpy.full(RATE, low),
        "up": low + (high - low) * seconds,
        "down": high + (low - high) * seconds,
        "up and down": low + (high - low) * (1 - abs(2 * seconds - 1)),
        "two tones": numpy.where(seconds < 0.5, low, high),
        "pulses": numpy.full(RATE, low),
        "warble": low * (1 + 0.15 * numpy.sin(2 * numpy.pi * dice.uniform(4, 8) * seconds)),
        "noise": numpy.full(RATE, low),
    }[NAMES[kind]]
    wave = numpy.sin(2 * numpy.pi * (numpy.cumsum(pitch) / RATE + dice.uniform()))
    if NAMES[kind] == "pulses":
        wave *= (seconds * dice.uniform(3, 6)) % 1 < 0.5
    if NAMES[kind] == "noise":
        wave = dice.normal(0, 0.7, RATE)
    loud = dice.uniform(0.1, 0.8) * wave + dice.normal(0, dice.uniform(0.01, 0.1), RATE)
    return loud.astype(numpy.float32)


def sounds(count: int, seed: int) -> tuple[list[numpy.ndarray], list[int]]:
    """So many sounds and their classes, in turn, always the same for a seed."""
    dice = numpy.random.default_rng(seed)
    kinds = [number % len(NAMES) for number in range(count)]
    return [sound(kind, dice) for kind in kinds], kinds
