"""The variants of the native CPU kernels that this processor runs, for tests that go through them."""

from __future__ import annotations

from optimum_fp8 import ops

# Those with tiles differ in products and attention; casts they share with another variant.
OF_CASTS = [each for each in ops.cpu.backends() if each not in ("cpu_avx512amx", "cpu_tiles")]
