"""What setup.py says about how the native CPU kernels are compiled, for tests that compile them too."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import setuptools

ROOT = Path(__file__).parents[1]


def names_of_setup(monkeypatch: Any) -> dict[str, Any]:
    """The names that setup.py defines: which sources there are, and how each variant is compiled."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")
