"""The shape of the house: one-way imports, one file with non-public Keras."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "keras_qwrap"

READING_ORDER = [
    "_version",
    "errors",
    "tables",
    "tensors",
    "fusion",
    "grids",
    "rounding",
    "packing",
    "compact",
    "sealing",
    "tightening",
    "file_checks",
    "channels",
    "ranges",
    "quantizers",
    "quantizers.config",
    "quantizers.base",
    "quantizers.stored_range",
    "quantizers.inferable",
    "quantizers.ste",
    "quantizers.moving_average",
    "substitution",
    "remaking",
    "layer_weights",
    "weight_paths",
    "supported",
    "packed_weights",
    "quantizing_layer",
    "construction",
    "conversion",
    "wrapper",
    "holder",
    "copying",
    "inner_layers",
    "subclassed",
    "models",
    "placement",
    "specs",
    "rules",
    "recipes",
    "range_search",
    "streams",
    "calibration",
    "correction",
    "folding",
    "quantize",
    "callbacks",
    "report_rows",
    "report_reasons",
    "report_walk",
    "report",
    "inspection",
    "files",
    "migration",
    "testing",
    "",
    "demo",
    "cli",
    "__main__",
]
"""Modules under keras_qwrap, `""` the package itself; each may import only those before it."""


def module_name(path: Path) -> str:
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
OPTIONAL = {"", "demo", "cli", "__main__"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_modules(tree: ast.Module) -> set[str]:
    """The modules of this package that a file imports, wherever in the file it does."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"relative import in line {node.lineno}: write it in full")
            children = [f"{node.module}.{alias.name}" for alias in node.names]
            inside = [c for c in children if c.removeprefix("keras_qwrap.") in SOURCES]
            targets = inside or [node.module]
        else:
            continue
        found |= {t for t in targets if t.split(".")[0] == "keras_qwrap"}
    return {t.removeprefix("keras_qwrap").removeprefix(".") for t in found}


def test_reading_order_names_every_module_once():
    assert len(set(READING_ORDER)) == len(READING_ORDER)
    assert set(SOURCES) <= set(READING_ORDER)
    assert set(READING_ORDER) - OPTIONAL <= set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_imports_only_modules_above_it(name):
    above = READING_ORDER[: READING_ORDER.index(name)]
    imported = imported_modules(parse(SOURCES[name]))
    assert imported <= set(above), f"{name} imports {sorted(imported - set(above))}"


def test_imports_are_seen_in_every_spelling():
    """Guards the parser of this file: a spelling that it missed would hide an import."""
    spellings = {
        "import keras_qwrap.wrapper": {"wrapper"},
        "import keras_qwrap as qi": {""},
        "from keras_qwrap import wrapper": {"wrapper"},
        "from keras_qwrap.quantizers import ste as s": {"quantizers.ste"},
        "from keras_qwrap.quantizers.ste import STEWeightQATQuantizer": {"quantizers.ste"},
        "from keras_qwrap import KerasQuantizationWrapper": {""},
        "def f():\n    import keras_qwrap.files": {"files"},
        "import keras, numpy": set(),
    }
    assert {text: imported_modules(ast.parse(text)) for text in spellings} == spellings


def test_only_substitution_names_non_public_keras():
    private = ("keras.src", "tensorflow.python", "keras._")
    naming = {
        name
        for name, path in SOURCES.items()
        if any(word in path.read_text(encoding="utf-8") for word in private)
    }
    assert naming == {"substitution"}


@pytest.mark.parametrize("name", SOURCES)
def test_no_assert_and_no_bare_except(name):
    """`python -O` drops assertions; a bare except swallows KeyboardInterrupt."""
    tree = parse(SOURCES[name])
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
        bare = isinstance(node, ast.ExceptHandler) and node.type is None
        assert not bare, f"bare except in line {node.lineno}"


def test_every_module_says_what_it_is_for():
    silent = [n for n, p in SOURCES.items() if p.stat().st_size and not ast.get_docstring(parse(p))]
    assert [name for name in silent if name != "_version"] == []


def test_top_level_of_the_repository():
    """Judged by what git tracks; without git, as in an unpacked release, there is no checkout."""
    listing = subprocess.run(
        ["git", "-c", "safe.directory=*", "ls-files"], cwd=ROOT, capture_output=True, text=True
    )
    tracked = {line.split("/")[0] for line in listing.stdout.splitlines()}
    allowed = {"README.md", "LICENSE", "CHANGELOG.md", "setup.cfg", "setup.py"}
    allowed |= {"keras_qwrap", "tests", "benchmarks"}
    assert {name for name in tracked if not name.startswith(".")} <= allowed
    assert (ROOT / ".git").exists() == bool(tracked)


def third_party_imports(tree: ast.Module) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found - set(sys.stdlib_module_names) - {"keras_qwrap"}


@pytest.mark.parametrize("name", sorted(set(SOURCES) - {"demo", "cli", "__main__"}))
def test_the_core_needs_only_the_required_packages(name):
    """Extras stay extras, and the lines that need TensorFlow sit in one file."""
    allowed = {"keras", "numpy", "h5py"} | ({"tensorflow"} if name == "fusion" else set())
    assert third_party_imports(parse(SOURCES[name])) <= allowed


@pytest.mark.slow
def test_importing_the_package_is_lean():
    """It loads nothing of weight that Keras does not load, and prints nothing."""
    code = (
        "import sys, keras; keras_alone = set(sys.modules)\n"
        "import keras_qwrap; more = set(sys.modules) - keras_alone\n"
        "print(sorted({name.split('.')[0] for name in more} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "['keras_qwrap']\n"
