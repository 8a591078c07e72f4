"""`optimum-cli fp8 selftest`: every operator on this machine's device beside the reference, as a table."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

from ..self_test import SelfTestReport, selftest
from .outcome import outcome


def main(args: Namespace) -> int:
    """Run the command; 0 when all is well, 1 when a case failed, kernels are missing, or an error needs explaining."""
    reports: list[SelfTestReport] = []

    def table(args: Namespace) -> str:
        reports.append(report(args))
        return str(reports[0])

    return outcome(table, args) or int(not reports[0].ok)


def report(args: Namespace) -> SelfTestReport:
    """The report of the self-test that the arguments describe, written to the file that they name."""
    found = selftest(args.device, target=args.target, backend=args.backend, operators=args.operator)
    if args.json:
        Path(args.json).write_text(json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return found
