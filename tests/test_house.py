"""The house keeps its order: short files and functions, no path that is changed, a test for every module."""

import ast
import re

import pytest

from helpers.paths import ROOT

PACKAGE = ROOT / "src" / "ddpm_from_scratch"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "training").rglob("*.py")])
MOST_LINES, MOST_OF_A_FUNCTION = 450, 45
STANDARD = {"torch", "numpy", "diffusers"}


def functions(path):
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]


def length(function):
    """Lines of a function without its docstring."""
    first = function.body[0]
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if text else 0)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    assert [function.name for function in functions(path) if length(function) > MOST_OF_A_FUNCTION] == []


def test_no_file_changes_the_path_of_imports():
    folders = ("src", "training", "benchmarks", "demo", "docs", "examples", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    changing = []
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "path" and isinstance(node.value, ast.Name):
                changing += [path] if node.value.id == "sys" else []
    assert files and changing == []


def is_text_without_encoding(call):
    """A call that reads or writes text in an encoding that differs from system to system."""
    function, keywords = call.func, {keyword.arg: keyword.value for keyword in call.keywords}
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", None)
    if name not in ("open", "fdopen", "read_text", "write_text") or "encoding" in keywords:
        return False
    owner = getattr(getattr(function, "value", None), "id", None)
    if owner == "Image" or (owner, name) == ("os", "open"):  # not of text
        return False
    values = [*call.args, *keywords.values()]
    modes = [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return not (name.endswith("open") and any(re.fullmatch("[rwxa+]*b[rwxa+]*", mode) for mode in modes))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("open(path)", True),
        ("path.open('a')", True),
        ("Path('b').read_text()", True),
        ("path.write_text(text)", True),
        ("path.read_text(encoding='utf-8')", False),
        ("path.open('rb')", False),
        ("open(path, mode='xb')", False),
        ("fsspec.open(path, 'rb')", False),
        ("Image.open(path)", False),
        ("os.open(path, flags)", False),
    ],
)
def test_text_without_an_encoding_is_found(code, expected):
    assert is_text_without_encoding(ast.parse(code, mode="eval").body) == expected


@pytest.mark.parametrize("folder", ["src", "training", "benchmarks", "demo", "docs", "examples"])
def test_every_text_file_has_an_encoding(folder):
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and is_text_without_encoding(node)
    ]
    assert found == []


def imported(path):
    """The modules that a file imports: absolute names, and relative ones with their dots."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("path", sorted((PACKAGE / "diffusion").glob("*.py")), ids=lambda path: path.stem)
def test_what_travels_with_a_model_needs_torch_numpy_and_diffusers_alone(path):
    import sys

    for name in imported(path):
        assert not name.startswith(".."), f"{name} is of another room"
        root = name.partition(".")[0]
        assert not root or root in STANDARD or root in sys.stdlib_module_names, name


def test_every_room_has_its_tests():
    rooms = [path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()]
    assert [room for room in rooms if room != "runtime" and not list((ROOT / "tests" / room).glob("test_*.py"))] == []
