"""The page of the course is true: its quotations are in the files, and its snippets print what it shows."""

import contextlib
import io
import re
import sys
import textwrap

import pytest
from conftest import ROOT

PAGE = ROOT / "docs" / "how_it_works.md"
PICTURES = ROOT / "docs" / "pictures"


def quotations() -> list[tuple[str, str]]:
    return re.findall(r"<!-- from (\S+) -->\n```python\n(.*?)```", PAGE.read_text(), re.S)


def snippets() -> list[tuple[str, str]]:
    return re.findall(r"<!-- run -->\n```python\n(.*?)```\n```text\n(.*?)```", PAGE.read_text(), re.S)


def test_each_stop_has_a_quotation_and_something_to_run():
    stops = re.split(r"^## (?=\d)", PAGE.read_text(), flags=re.M)[1:]
    assert len(stops) == 8
    for stop in stops:
        assert "<!-- from " in stop and "<!-- run -->" in stop, stop.splitlines()[0]
    fenced = len(re.findall(r"^```python$", PAGE.read_text(), re.M))
    assert len(quotations()) + len(snippets()) == fenced  # and none that nobody checks


@pytest.mark.parametrize(("file", "code"), quotations())
def test_a_quotation_is_in_its_file_line_by_line(file, code):
    text = (ROOT / file).read_text()
    indents = {len(line) - len(line.lstrip()) for line in text.splitlines()}
    assert any(textwrap.indent(code, " " * indent) in text for indent in indents), f"{file} no longer has\n{code}"
    assert len(code.splitlines()) <= 16


def test_the_snippets_print_what_the_page_shows(monkeypatch):
    monkeypatch.chdir(ROOT)
    variables: dict = {}
    for code, expected in snippets():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, variables)  # one after the other, as a reader runs them
        shown = [line for line in printed.getvalue().splitlines() if not line.startswith("Loaded in")]
        assert "\n".join(shown) == expected.rstrip("\n"), code


def test_the_pictures_are_what_the_program_draws(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    try:
        import draw_pictures
    finally:
        sys.modules.pop("draw_pictures", None)
    drawn = {draw.__name__: str(draw()) for draw in draw_pictures.PICTURES_DRAWN}
    assert {path.stem: path.read_text() for path in PICTURES.glob("*.svg")} == drawn
    for name in drawn:
        assert f"](pictures/{name}.svg)" in PAGE.read_text()
