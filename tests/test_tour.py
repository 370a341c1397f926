"""The notebook docs/tour.ipynb runs from its first cell to its last, and prints what it shows."""

import ast
import contextlib
import io

import pytest
from conftest import ROOT


def test_the_notebook_prints_what_it_shows(monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="pip install nbformat to read the notebook")
    notebook = nbformat.read(ROOT / "docs" / "tour.ipynb", as_version=4)
    nbformat.validate(notebook)
    monkeypatch.chdir(ROOT / "docs")
    names, n_shown = {"__name__": "__main__"}, 0
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        body, value, printed = ast.parse(cell.source).body, None, io.StringIO()
        with contextlib.redirect_stdout(printed):
            last = body.pop() if isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), "<cell>", "exec"), names)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), names)
        shown = "".join(output.get("text", "") or output["data"]["text/plain"] for output in cell.outputs)
        found = "" if printed.getvalue().startswith("Loaded") else printed.getvalue()
        assert found + (repr(value) if value is not None else "") == shown, cell.source
        n_shown += bool(shown)
    assert n_shown >= 7
