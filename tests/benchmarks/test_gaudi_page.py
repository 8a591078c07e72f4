"""The page about accuracy on Gaudi says what was measured."""

from __future__ import annotations

import json

from benchmarks import gaudi_accuracy, gaudi_page

RESULTS = json.loads(gaudi_accuracy.RESULTS.read_text())


def test_the_page_and_the_picture_are_those_of_the_results():
    page = gaudi_page.PAGE.read_text(encoding="utf-8")
    assert gaudi_page.filled(page, RESULTS) == page
    assert gaudi_page.picture(RESULTS) == gaudi_page.PICTURE.read_text(encoding="utf-8")


def test_every_scale_method_is_in_the_results():
    methods = {row["method"] for row in RESULTS["rows"]}
    assert methods == set(gaudi_accuracy.INC_METHODS)
