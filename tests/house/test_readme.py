"""Every number, picture, table and page of the documentation is what the code makes of it today."""

from __future__ import annotations

from pathlib import Path

import render
from PIL import Image

from rope_export.lowering import operators_page as operators
from rope_export.pretrained.families_table import table as families

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_the_numbers_of_the_committed_results():
    assert README.count("<!-- measured ") == README.count("<!-- end -->") > 0
    assert render.rendered(README) == README
    assert render.rendered(README.replace(" ms |", " s |", 1)) == README


def test_the_readme_has_pictures_of_the_committed_results():
    drawn = render.drawn_from(README)
    assert drawn
    for picture, file in drawn.items():
        assert f"]({picture.relative_to(render.ROOT)})" in README
        assert Image.open(picture).text["Description"] == render.digest(file)


def test_the_readme_has_the_table_of_families():
    assert families() in README


def test_the_page_of_operators_says_what_the_rules_say():
    page = ROOT / "docs" / "operators.md"
    assert page.read_text(encoding="utf-8") == operators.page()
