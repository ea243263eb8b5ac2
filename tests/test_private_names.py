"""Private names of other packages: all are in the table of CONTRIBUTING.md, and each of them still exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from tests.test_architecture import PRODUCT, ROOT, parsed

ROWS = re.findall(r"^\| `([\w.]+)` \| (`[^|]*`) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
TABLE = {name: re.findall(r"`([\w./]+)`", files) for name, files in ROWS if name.rpartition(".")[2].startswith("_")}

OF_PYTHON = {"_getframe", "_exit", "_replace", "_asdict"}


def owner(name: str) -> tuple[Any, str]:
    """Return the innermost object of a dotted name that can be had, and what is left of the name."""
    parts = name.split(".")
    found, at = importlib.import_module(parts[0]), 1
    while at < len(parts):
        path = ".".join(parts[: at + 1])
        if not hasattr(found, parts[at]) and (not inspect.ismodule(found) or not _is_module(path)):
            break
        found = getattr(found, parts[at]) if hasattr(found, parts[at]) else importlib.import_module(path)
        at += 1
    return found, ".".join(parts[at:])


def _is_module(path: str) -> bool:
    try:
        return importlib.util.find_spec(path) is not None
    except ModuleNotFoundError:
        return False


def exists(name: str) -> bool:
    """Whether a name can be had, or is an attribute that the code of its class or of the class's module sets."""
    found, left = owner(name)
    if not left:
        return True
    if "." in left or not inspect.isclass(found):
        return False
    module = importlib.import_module(found.__module__)
    return re.search(rf"\b{left}\b", inspect.getsource(module)) is not None


def private_names(tree: ast.AST) -> set[str]:
    """Return private names that a module imports from other packages, and the private attributes that it asks for."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("lowrank_train"):
            found |= {alias.name for alias in node.names} | set((node.module or "").split("."))
        elif isinstance(node, ast.Import):
            found |= {part for alias in node.names for part in alias.name.split(".")}
    return {name for name in found if re.match(r"_[^_]", name)}


def own_names(tree: ast.AST) -> set[str]:
    """Return what a module defines: functions, classes, variables, attributes."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return found


@pytest.mark.parametrize("name", TABLE)
def test_a_private_name_of_the_table_still_exists(name: str) -> None:
    package = name.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    assert exists(name), f"{name} has vanished; it is used in {', '.join(TABLE[name])}"


def test_every_private_name_of_the_product_is_in_the_table() -> None:
    ours = set().union(*(own_names(parsed(path)) for path in PRODUCT)) | OF_PYTHON
    listed = {part for name in TABLE for part in name.split(".")}
    found = {path.relative_to(ROOT).as_posix(): private_names(parsed(path)) - ours - listed for path in PRODUCT}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize("name", TABLE)
def test_a_private_name_is_used_where_the_table_says(name: str) -> None:
    used = re.compile(rf"\b{name.rpartition('.')[2]}\b")
    files = {path.relative_to(ROOT).as_posix() for path in PRODUCT if used.search(path.read_text())}
    assert set(TABLE[name]) == files


@pytest.mark.parametrize(
    ("name", "there"),
    [
        ("torch.nn.Module._modules", True),
        ("torch.nn.Module._nothing", False),
        ("torch.autograd.grad_mode._nothing", False),
        ("torch._nothing.Module", False),
    ],
)
def test_a_vanished_name_is_noticed(name: str, there: bool) -> None:
    assert exists(name) == there


def test_private_names_are_found() -> None:
    code = "import torch._guards\nfrom torch.fx import _lazy\nfrom lowrank_train.x import _ours\nmodel._init_weights"
    assert private_names(ast.parse(code)) == {"_guards", "_lazy", "_init_weights"}


def test_the_table_is_read() -> None:
    assert len(TABLE) > 10
    assert all((ROOT / file).is_file() for files in TABLE.values() for file in files), Path(ROOT)
