"""The house of docs/concepts.md: a room imports only rooms above it."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
# From the top. A module belongs to the longest prefix of its name; what has no room of its own is the method.
ROOMS = (
    "rdm_rl",
    "families",
    "networks",
    "student",
    "rewards",
    "evaluation",
    "trainers",
    "digits",
    "scenes",
    "demo",
    "cli",
)


def room(module: str) -> int:
    parts = module.split(".")
    return ROOMS.index(parts[1]) if len(parts) > 1 and parts[1] in ROOMS else 0


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package by name, found through the mapping of packages to folders."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    for package in settings["packages"]:
        folder = settings["package-dir"].get(package, package.replace(".", "/"))
        for file in sorted((ROOT / folder).glob("*.py")):
            name = package if file.stem == "__init__" else f"{package}.{file.stem}"
            yield name, ast.parse(file.read_text(encoding="utf-8"))


def imported(node: ast.AST) -> Iterator[str]:
    """What a part of a module imports when it runs: imports for type checkers alone are left out."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        children: list[ast.AST] = list(node.orelse)
    else:
        children = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.module is not None:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in children:
        yield from imported(child)


def test_a_room_imports_only_rooms_above_it() -> None:
    arrows = [(name, other) for name, tree in modules() for other in imported(tree) if other.startswith("rdm_rl")]
    assert len(arrows) > 200
    assert [arrow for arrow in arrows if room(arrow[1]) > room(arrow[0])] == []
