"""The house is as README.md draws it."""

import ast
import re

from conftest import ROOT


def test_a_file_imports_only_from_files_above_it_in_the_readme():
    listed = re.findall(r"\[`(\w+)\.py`\]\(llama/\1\.py\)", (ROOT / "README.md").read_text())
    files = {path.stem: path for path in (ROOT / "llama").glob("*.py") if not path.stem.startswith("__")}
    assert sorted(listed) == sorted(files)
    for name, path in files.items():
        tree = ast.parse(path.read_text())
        guarded = {
            node
            for block in ast.walk(tree)
            if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom) or node in guarded or not (node.module or "").startswith("llama"):
                continue
            _, _, module = node.module.partition(".")
            imported = [module] if module else [alias.name for alias in node.names if alias.name in files]
            for other in imported:
                assert listed.index(other) < listed.index(name), f"{name}.py imports {other}.py"


def test_a_users_mistake_is_never_an_assertion():
    for path in (ROOT / "llama").glob("*.py"):
        found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not found, f"{path.name} asserts at lines {found}"


def test_every_link_of_the_readme_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target
