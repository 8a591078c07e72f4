"""Mistakes that might be made in the kernels for Gaudi and around them, and of each a test that fails with it.

By file of the package: a text of which it has one, and by what a mistake replaces it, each with the test.
"""

from . import (
    all_reduce,
    attention,
    attention_steps,
    bridge,
    casts,
    conv,
    experts,
    gemm,
    linear,
    matmul,
    parallel,
    ranges,
    registered,
    startup,
)

FAILS = {
    "modules/all_reduce.py": all_reduce.FAILS,
    "ops/hpu/attention.py": attention.FAILS,
    "ops/hpu/attention_steps.py": attention_steps.FAILS,
    "ops/hpu/bridge.py": bridge.FAILS,
    "ops/hpu/casts.py": casts.FAILS,
    "ops/hpu/conv.py": conv.FAILS,
    "ops/hpu/experts.py": experts.FAILS,
    "ops/hpu/gemm.py": gemm.FAILS,
    "ops/hpu/linear.py": linear.FAILS,
    "ops/hpu/matmul.py": matmul.FAILS,
    "modules/parallel.py": parallel.FAILS,
    "ops/hpu/ranges.py": ranges.FAILS,
    "ops/hpu/__init__.py": registered.FAILS,
    "ops/hpu/startup.py": startup.FAILS,
}
