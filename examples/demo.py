"""The main job on the embedded models, a language model and two classifiers: quantize, compare, save and reload.

python examples/demo.py
"""

from __future__ import annotations

import runpy
from pathlib import Path

HERE = Path(__file__).parent

if __name__ == "__main__":
    for script in ("llm/quantize_llm.py", "vision/quantize_vision.py"):
        runpy.run_path(str(HERE / script), run_name="__main__")
