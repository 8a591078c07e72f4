"""Trainers empty the memory each time they start, which looks at every object: most of these never go away."""

import gc
from collections.abc import Iterator

import pytest
import training_runs  # noqa: F401  (all that it imports)


@pytest.fixture(scope="package", autouse=True)
def objects_are_collected_in_the_end() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def objects_that_stay(objects_are_collected_in_the_end: None) -> None:
    gc.freeze()
