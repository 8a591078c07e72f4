"""Findings as they are printed."""

from optimum_fp8.verifying.finding import error, warning


def test_a_finding_says_where_what_and_what_to_do():
    found = error("a.weight", "nothing", "codes", "copy it")
    assert str(found) == "error: a.weight: found nothing, expected codes; copy it"
    assert warning("a", "b", "c", "d").severity == "warning" and len({found, found}) == 1
