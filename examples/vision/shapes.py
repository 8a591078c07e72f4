"""Synthetic pictures for detection: squares, circles and triangles on noise, and where they are."""

import math
from typing import NamedTuple

import numpy
from PIL import Image, ImageDraw

KINDS = ("square", "circle", "triangle")
SIDE = 64
# Drawn so many times larger, then shrunk: edges are smooth, and corners may lie between pixels.
FINE = 4


class Scene(NamedTuple):
    """A picture and what is on it.

    Attributes:
        image: RGB, `SIDE` pixels high and wide.
        boxes: left, top, right and bottom of each shape in pixels, `[n, 4]`.
        kinds: the index in `KINDS` of each shape, `[n]`.
    """

    image: Image.Image
    boxes: numpy.ndarray
    kinds: numpy.ndarray


def outline(kind: str, radius: float, angle: float) -> numpy.ndarray:
    """The corners of a shape around the origin, turned by `angle` in radians: `[corners, 2]`."""
    corners = {"square": 4, "triangle": 3, "circle": 48}[kind]
    turns = angle + numpy.arange(corners) * (2 * math.pi / corners)
    return radius * numpy.stack([numpy.cos(turns), numpy.sin(turns)], axis=1)


def place(random: numpy.random.Generator, taken: list[numpy.ndarray]) -> tuple[int, numpy.ndarray] | None:
    """A kind and its corners in the picture, `[corners, 2]`; None where it would lie on another shape."""
    kind = int(random.integers(len(KINDS)))
    points = outline(KINDS[kind], random.uniform(7, 14), random.uniform(0, 2 * math.pi))
    low, high = -points.min(0), SIDE - points.max(0)
    points = points + random.uniform(low, high)
    left, top = points.min(0)
    right, bottom = points.max(0)
    for other in taken:
        a, b = other.min(0), other.max(0)
        if left < b[0] and a[0] < right and top < b[1] and a[1] < bottom:
            return None
    return kind, points


def scene(random: numpy.random.Generator) -> Scene:
    """One to four shapes whose boxes do not overlap, each in a colour of its own, on a noisy ground."""
    ground = random.uniform(0, 255, 3)
    picture = Image.new("RGB", (SIDE * FINE, SIDE * FINE), tuple(int(value) for value in ground))
    draw = ImageDraw.Draw(picture)
    kinds, shapes = [], []
    for _ in range(int(random.integers(1, 5))):
        if (placed := place(random, shapes)) is None:
            continue
        # A colour of which at least one component is far from the ground's.
        colour = random.uniform(0, 255, 3)
        component = int(random.integers(3))
        colour[component] = (ground[component] + random.uniform(90, 165)) % 255
        kinds.append(placed[0])
        shapes.append(placed[1])
        draw.polygon([tuple(point * FINE) for point in placed[1]], fill=tuple(int(value) for value in colour))
    pixels = numpy.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=float)
    pixels = numpy.clip(pixels + random.normal(0, 25, pixels.shape), 0, 255).round().astype(numpy.uint8)
    boxes = numpy.stack([[*points.min(0), *points.max(0)] for points in shapes])
    return Scene(Image.fromarray(pixels), boxes, numpy.array(kinds))


def scenes(count: int, seed: int) -> list[Scene]:
    """So many pictures; of each seed always the same."""
    random = numpy.random.default_rng(seed)
    return [scene(random) for _ in range(count)]
