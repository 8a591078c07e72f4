"""The handwritten digits that scikit-learn carries, as images: 1797 of them, 8 x 8 pixels in 17 shades of grey."""

import numpy
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def load_images() -> tuple[list[Image.Image], list[int]]:
    """Return all images, in RGB as most vision models want them, and their labels."""
    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(numpy.uint8)
    return [Image.fromarray(image).convert("RGB") for image in pixels], digits.target.tolist()


def split_indices(seed: int = 0) -> tuple[list[int], list[int]]:
    """Return the indices of the training images and of the held-out ones, a fifth with every digit in proportion."""
    labels = load_digits().target
    train, heldout = train_test_split(range(len(labels)), test_size=0.2, random_state=seed, stratify=labels)
    return sorted(train), sorted(heldout)


def load_split(part: str) -> tuple[list[Image.Image], list[int]]:
    """Return the images and labels of one part: "train", "heldout" or "all"."""
    images, labels = load_images()
    train, heldout = split_indices()
    indices = {"train": train, "heldout": heldout, "all": range(len(labels))}[part]
    return [images[i] for i in indices], [labels[i] for i in indices]
