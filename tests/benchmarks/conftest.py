"""The benchmarks are no installed package: they are found in the root of the repository."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# First, since this very folder, seen from `tests`, is called `benchmarks` too.
sys.path.insert(0, str(ROOT))
