"""The package is as CONTRIBUTING.md describes it: who imports whom, how long files are, what stays importable."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "llama"

# A house (a folder, or a file in llama/) imports only from houses on lines above its own. Houses on one line do not
# import each other, except on the first line, where a house may import those to its left.
FLOORS = [
    *(["tokenizer"], ["parallel"], ["kv_cache"], ["sampling"], ["keywords"], ["options"], ["sequence"], ["layers"]),
    *(["meta_names"], ["model"], ["decode_step", "checkpoint"], ["adapters"], ["engine"], ["decoding"], ["generation"]),
    *(["datasets"], ["rejection_sampling", "training", "server"], ["cli"]),
]
FLOOR = {house: floor for floor, houses in enumerate(FLOORS) for house in houses}
DOORS = ("__init__", "__main__", "evaluation")  # these only export or start what is in the houses
COURSE = ("generation", "engine", "decode_step", "sequence", "model", "kv_cache", "sampling", "options")


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def house_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_houses(path: Path) -> set[str]:
    """The houses that a file imports from, anywhere in it: inside functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("llama.")}
            found |= {"generation" for alias in node.names if alias.name == "llama"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: a relative import"
            if node.module == "llama":  # the names that the package exports are at most as high as `Llama`
                names = [alias.name for alias in node.names]
                found |= {name if name in FLOOR else "generation" for name in names}
            elif (node.module or "").startswith("llama."):
                found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_house_imports_only_from_houses_below_it(path):
    house = house_of(path)
    if house in DOORS:
        return
    assert house in FLOOR, f"{house} has no floor: give it one in this test and in CONTRIBUTING.md"
    for other in imported_houses(path) - {house}:
        assert FLOOR[other] < FLOOR[house], f"{path.relative_to(ROOT)} imports from {other}"
        assert {house, other} != {"engine", "checkpoint"}, "the engine and the files know nothing of each other"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_the_files_of_a_house_import_each_other_in_no_circle():
    names = {module_name(path): path for path in files()}
    uses: dict[str, set[str]] = {}
    for name, path in names.items():
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        modules = [f"{node.module}.{alias.name}" for node in imports for alias in node.names]
        uses[name] = {m if m in names else m.rpartition(".")[0] for m in modules} & names.keys() - {name}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above, name])
        if name not in done and name != "llama":
            for other in uses[name]:
                # A house's own files are imported through its door by others only.
                if other != name.rpartition(".")[0]:
                    visit(other, (*above, name))
            done.add(name)

    for name in names:
        visit(name, ())


def test_a_users_mistake_is_never_an_assertion():
    for path in files():
        found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
        assert not found, f"{path.name} asserts at lines {found}"


def test_every_link_of_the_readme_leads_somewhere():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


IMPORTABLE = {
    "llama": "Llama Dialog Message Tokenizer ChatFormat ModelArgs Transformer sample_top_p",
    "llama.generation": "Llama Dialog Message Role ChatPrediction CompletionPrediction sample_top_p "
    "B_INST E_INST B_SYS E_SYS",
    "llama.model": "ModelArgs Transformer TransformerBlock Attention FeedForward RMSNorm "
    "precompute_freqs_cis apply_rotary_emb repeat_kv",
    "llama.tokenizer": "Tokenizer ChatFormat Dialog Message Role",
}


@pytest.mark.parametrize("module", IMPORTABLE)
def test_what_scripts_in_the_wild_import_is_there(module):
    for name in IMPORTABLE[module].split():
        assert hasattr(importlib.import_module(module), name), f"from {module} import {name}"


def test_the_course_is_short():
    lines = {name: len((PACKAGE / f"{name}.py").read_text().splitlines()) for name in COURSE}
    assert max(lines.values()) <= 300 and sum(lines.values()) <= 1800, (sum(lines.values()), lines)


def test_no_file_is_longer_than_400_lines_and_no_house_has_more_than_ten_files():
    for path in files():
        assert len(path.read_text().splitlines()) <= 400, path
    for folder in {path.parent for path in files()} - {PACKAGE}:
        assert len([path for path in folder.glob("*.py") if path.stem not in DOORS]) <= 10, folder


def test_a_house_says_what_it_is_for_and_what_it_knows_nothing_of():
    for folder in {path.parent for path in files()} - {PACKAGE}:
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
        assert "nothing" in said.lower(), folder
