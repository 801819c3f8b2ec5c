"""Every example that a reader may copy is executed, and prints what its comments say."""

import ast
import importlib
import inspect
import io
import pkgutil
import re
import textwrap
import tokenize
from pathlib import Path

import keras
import pytest

import keras_qwrap as qi

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCK = re.compile(r"^([ \t]*)```python\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
FEWEST_EXAMPLES = 33


def python_blocks(text: str) -> list[str]:
    return [textwrap.dedent(match.group(2)) for match in BLOCK.finditer(text)]


class _NumberedPrints(ast.NodeTransformer):
    """Turns `print(...)` into `_print(line, ...)`."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "print":
            line = ast.copy_location(ast.Constant(node.end_lineno), node)
            node.func = ast.copy_location(ast.Name("_print", ast.Load()), node.func)
            node.args.insert(0, line)
        return node


def comments_by_line(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = (token for token in tokens if token.type == tokenize.COMMENT)
    return {token.start[0]: token.string.removeprefix("#").strip() for token in found}


def run_example(source: str, namespace: dict) -> None:
    """Execute `source`; what a line prints must be the comment at its end, if it has one.

    A comment that ends with `...` gives the beginning only.
    """
    comments = comments_by_line(source)

    def check(line: int, *values: object, **options: object) -> None:
        if line not in comments:
            return
        stream = io.StringIO()
        print(*values, **(options | {"file": stream}))
        printed, expected = stream.getvalue().strip(), comments[line]
        if expected.endswith("..."):
            printed = printed[: len(expected) - 3] + "..."
        assert printed == expected, f"line {line} of the example:\n{source}"

    tree = ast.fix_missing_locations(_NumberedPrints().visit(ast.parse(source)))
    namespace["_print"] = check
    exec(compile(tree, "<example>", "exec"), namespace)


def public_objects() -> dict[str, object]:
    """Modules, functions, classes, methods and properties of the package by dotted name."""
    found: dict[str, object] = {"keras_qwrap": qi}
    for info in pkgutil.walk_packages(qi.__path__, "keras_qwrap."):
        if info.name.rpartition(".")[2] != "__main__":
            found[info.name] = importlib.import_module(info.name)
    for module_name, module in list(found.items()):
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module_name
            if own and not name.startswith("_") and callable(value):
                found[f"{module_name}.{name}"] = value
                found |= {f"{module_name}.{name}.{k}": v for k, v in own_members(value).items()}
    return found


def own_members(value: object) -> dict[str, object]:
    if not isinstance(value, type):
        return {}
    members = {k: v for k, v in vars(value).items() if not k.startswith("_")}
    return {k: v for k, v in members.items() if callable(v) or isinstance(v, property)}


def own_docstring(value: object) -> str:
    own = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
    return inspect.cleandoc(own or "")


EXAMPLES = {
    f"{name}-{index}": block
    for name, value in public_objects().items()
    for index, block in enumerate(python_blocks(own_docstring(value)))
}
PUBLIC = [name for name in qi.__all__ if callable(getattr(qi, name))]


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    run_example(EXAMPLES[name], {})
    assert list(tmp_path.iterdir()) == [], "the example left files behind"


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_example_imports_public_names_only(name):
    for node in ast.walk(ast.parse(EXAMPLES[name])):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("keras_qwrap"):
            public = node.module == "keras_qwrap.testing" or node.module == "keras_qwrap"
            assert public, f"line {node.lineno} of the example"


def test_examples_were_found():
    assert len(EXAMPLES) >= FEWEST_EXAMPLES


@pytest.mark.parametrize("name", PUBLIC)
def test_public_object_has_an_example(name):
    assert python_blocks(own_docstring(getattr(qi, name))), f"{name} has no example"


@pytest.mark.slow
@pytest.mark.tensorflow
def test_readme(tmp_path, monkeypatch):
    """All blocks in order and in one namespace, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    keras.utils.set_random_seed(0)
    blocks = python_blocks(README.read_text(encoding="utf-8"))
    assert blocks
    namespace: dict = {}
    for block in blocks:
        run_example(block, namespace)


def test_a_wrong_comment_fails():
    """Guards the checks of this file."""
    run_example("print(1, 2)  # 1 2\nprint('long text')  # long...", {})
    run_example("if True:\n    print(\n        3\n    )  # 3", {})
    for wrong in ("print(1)  # 2", "for i in (1, 2):\n    print(i)  # 1", "print('a')  # b..."):
        with pytest.raises(AssertionError, match="of the example"):
            run_example(wrong, {})


def test_blocks_are_found_indented_and_not():
    text = "a\n```python\nx = 1\n```\nb\n    ```python\n    y = 2\n    ```\n```bash\nls\n```\n"
    assert python_blocks(text) == ["x = 1\n", "y = 2\n"]
