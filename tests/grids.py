"""Many combinations of values in one test: quicker than a test for each, and a failure names the combination; and
parameters most of which are slow.
"""

import functools
import inspect
import itertools

import pytest
import torch


def over(**values):
    """Run the test for every combination of `values`, each from the same seed; say which one failed."""

    def decorate(test):
        @functools.wraps(test)
        def run(*args, **kwargs):
            for combination in itertools.product(*values.values()):
                chosen = dict(zip(values, combination, strict=True))
                torch.manual_seed(0)
                try:
                    test(*args, **kwargs, **chosen)
                except BaseException:
                    print("failed with", {name: getattr(value, "__name__", value) for name, value in chosen.items()})
                    raise

        signature = inspect.signature(test)
        kept = [parameter for name, parameter in signature.parameters.items() if name not in values]
        run.__signature__ = signature.replace(parameters=kept)  # what pytest looks for fixtures in
        return run

    return decorate


def slow_but(values, *fast):
    """Parameters for `pytest.mark.parametrize`, all of them slow but those in `fast`."""
    assert set(fast) <= set(values)
    several = lambda value: value if isinstance(value, tuple) else (value,)  # noqa: E731
    return [value if value in fast else pytest.param(*several(value), marks=pytest.mark.slow) for value in values]
