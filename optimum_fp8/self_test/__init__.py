"""The self-test: every operator on a device beside the reference, as `optimum-cli fp8 selftest` shows it."""

from .report import Row, SelfTestReport
from .run import selftest

__all__ = ["Row", "SelfTestReport", "selftest"]
