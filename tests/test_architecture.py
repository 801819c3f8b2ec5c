"""The shape of the house: one-way imports, one file with non-public Keras."""

import ast
import subprocess
import sys
from pathlib import Path

import keras
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "keras_qwrap"

FLOORS = [
    "numerics",
    "quantizers",
    "layers",
    "models",
    "calibration",
    "files",
    "recipes",
    "reports",
    "export",
]
"""Folders of the package; a file may import from its own and from those before it."""

ABOVE = ["testing", "", "demo", "cli", "__main__"]
"""Modules above all floors, `""` the package itself; each may import only those before it."""


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


def height(name: str) -> int:
    """Of the floor that a module is on; `_version` is beneath all."""
    if name == "_version":
        return -1
    floor = name.split(".")[0]
    return FLOORS.index(floor) if floor in FLOORS else len(FLOORS) + ABOVE.index(name)


def inside(name: str) -> set[str]:
    """The modules on the same floor that a module imports."""
    return {n for n in imported_modules(parse(SOURCES[name])) if height(n) == height(name)}


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_imports_only_its_own_floor_and_those_beneath(name):
    above = {n for n in imported_modules(parse(SOURCES[name])) if height(n) > height(name)}
    assert above == set()


def test_no_circles_inside_a_floor():
    waiting = {name: inside(name) for name in SOURCES}
    while waiting:
        free = {name for name, needed in waiting.items() if not needed & set(waiting)}
        assert free, f"a circle among {sorted(waiting)}"
        waiting = {name: needed for name, needed in waiting.items() if name not in free}


def test_folders_have_nine_files_or_so():
    for floor in FLOORS:
        assert len([name for name in SOURCES if name.startswith(f"{floor}.")]) <= 12


def test_imports_are_seen_in_every_spelling():
    """Guards the parser of this file: a spelling that it missed would hide an import."""
    spellings = {
        "import keras_qwrap.layers.wrapper": {"layers.wrapper"},
        "import keras_qwrap as qi": {""},
        "from keras_qwrap.layers import wrapper": {"layers.wrapper"},
        "from keras_qwrap.quantizers import ste as s": {"quantizers.ste"},
        "from keras_qwrap.quantizers.ste import STEWeightQATQuantizer": {"quantizers.ste"},
        "from keras_qwrap import KerasQuantizationWrapper": {""},
        "def f():\n    import keras_qwrap.files.saving": {"files.saving"},
        "import keras, numpy": set(),
    }
    assert {text: imported_modules(ast.parse(text)) for text in spellings} == spellings


def test_only_one_file_names_non_public_keras():
    private = ("keras.src", "tensorflow.python", "keras._")
    naming = {
        name
        for name, path in SOURCES.items()
        if any(word in path.read_text(encoding="utf-8") for word in private)
    }
    assert naming == {INTERNALS}


INTERNALS = "layers.keras_internals"
ASKING = {"getattr", "hasattr", "setattr", "delattr"}


def is_own(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_names_of_ours() -> set[str]:
    """Those that a class outside of the one file defines: in its body, or as `self._x = ...`."""
    found = set()
    trees = [parse(path) for name, path in SOURCES.items() if name != INTERNALS]
    for cls in (n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)):
        for part in cls.body:
            targets = getattr(part, "targets", [getattr(part, "target", None)])
            found |= {getattr(part, "name", "")} | {getattr(t, "id", "") for t in targets}
        stored = [n for n in ast.walk(cls) if isinstance(n, ast.Attribute)]
        found |= {n.attr for n in stored if isinstance(n.ctx, ast.Store) and is_own(n.value)}
    return {name for name in found if is_private(name)}


def private_names_of_keras() -> set[str]:
    layer = keras.layers.Dense(2)
    tensor = keras.Input((2,))
    things = [layer, tensor, keras.Model(tensor, layer(tensor)), keras.Sequential([layer])]
    return {name for thing in (*things, layer.kernel) for name in dir(thing) if is_private(name)}


def foreign_names(tree: ast.Module, ours: set[str], of_keras: set[str]) -> list[str]:
    """Private attributes that code takes of what is not of this package."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            allowed = ours if is_own(node.value) else ours - of_keras
            of_python = ast.unparse(node.value) in sys.stdlib_module_names
            if node.attr not in allowed and not of_python:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Attribute) and node.attr == "__signature__":
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ASKING:
            text = getattr((getattr(node.args[1], "values", None) or node.args[1:])[0], "value", "")
            if isinstance(text, str) and is_private(text) and text not in ours - of_keras:
                found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def test_only_one_file_takes_private_attributes_of_keras():
    ours, of_keras = private_names_of_ours(), private_names_of_keras()
    found = {name: foreign_names(parse(path), ours, of_keras) for name, path in SOURCES.items()}
    assert [name for name, names in found.items() if names] == [INTERNALS], found


def test_private_attributes_are_seen_in_every_spelling():
    """Guards the parser above; `_mine` is a name of this package, `_outputs` also one of Keras."""
    spellings = {
        "x = layer._layers": 1,
        "layer._value = 3": 1,
        "getattr(layer, '_modules', {})": 1,
        "getattr(layer, f'_{name}')": 1,
        "call.__signature__ = signature": 1,
        "model._outputs": 1,
        "self._outputs + other._mine + getattr(layer, '_mine')": 0,
        "sys._getframe(1), layer.weights, cls.__name__, getattr(layer, name)": 0,
    }
    found = {
        text: len(foreign_names(ast.parse(text), {"_mine", "_outputs"}, {"_outputs"}))
        for text in spellings
    }
    assert found == spellings


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
    compiled = name == "numerics.compiled"
    allowed = {"keras", "numpy", "h5py"} | ({"tensorflow"} if compiled else set())
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
