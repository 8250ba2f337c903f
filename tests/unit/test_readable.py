"""Lines that must be read twice get names: what the code does not hold."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_POSITIONAL = 5
MOST_FIELDS = 4
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def complaints(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """What in a file must be read twice, by line."""
    for node in ast.walk(tree):
        inside = list(ast.walk(node))[1:]
        if isinstance(node, ast.IfExp) and any(isinstance(other, ast.IfExp) for other in inside):
            yield node.lineno, "a conditional expression inside another"
        has_walrus = any(isinstance(other, ast.NamedExpr) for other in inside)
        if isinstance(node, COMPREHENSIONS) and has_walrus:
            yield node.lineno, "a walrus in a comprehension"
        if isinstance(node, ast.Call) and len(node.args) > MOST_POSITIONAL:
            yield node.lineno, f"a call with {len(node.args)} positional arguments"
        if isinstance(node, ast.ClassDef) and is_wide_dataclass(node):
            yield node.lineno, f"dataclass {node.name} is not keyword-only"


def is_wide_dataclass(node: ast.ClassDef) -> bool:
    """Whether a dataclass of many fields takes them by position."""
    fields = sum(isinstance(item, ast.AnnAssign) for item in node.body)
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    written = next((text for text in decorators if text.startswith("dataclass")), None)
    return written is not None and fields > MOST_FIELDS and "kw_only=True" not in written


def test_no_line_must_be_read_twice() -> None:
    found = []
    for path in sorted((ROOT / "orpo_ray").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.relative_to(ROOT)
        found += [f"{name}:{line}: {what}" for line, what in complaints(tree)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = a if b else (c if d else e)", "conditional expression"),
        ("x = [y for z in s if (y := f(z))]", "walrus"),
        ("f(1, 2, 3, 4, 5, 6)", "6 positional"),
        ("@dataclass(frozen=True)\nclass A:\n a: int\n b: int\n c: int\n d: int\n e: int", "A is"),
    ],
)
def test_the_check_sees_each_kind(text: str, says: str) -> None:
    assert [what for _, what in complaints(ast.parse(text)) if says in what]
