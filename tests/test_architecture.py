"""The arrows of the house: who may import whom, and what every module owes its reader."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("optim", "lowrank_train")
LAYERS = {"optim": (), "lowrank_train": ("optim",), "launch": ("optim", "lowrank_train")}
"""Each top-level directory and the others it may import."""

OPTIM_MAY_IMPORT = {"torch", "geoopt", "optim"}
PRIVATE_ALLOWED = {"optim/int8_weight.py": ["torch.autograd.grad_mode._unsafe_preserve_version_counter"]}
"""What ``optim`` imports of torch's private parts: FSDP2's own way to write into a weight without a new version."""
DISTRIBUTED_ALLOWED = {
    "optim/placements.py",
    "optim/sharding.py",
    "optim/stacks.py",
    "lowrank_train/parallel.py",
    "lowrank_train/rendezvous.py",
    "lowrank_train/checkpoint.py",
    "lowrank_train/checkpoint_files.py",
    "lowrank_train/trainer.py",
}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def sources(*directories: str) -> list[Path]:
    return sorted(path for directory in directories for path in (ROOT / directory).rglob("*.py"))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Every module an import names, ``from a import b`` as both ``a`` and ``a.b``; relative ones with their dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def backward_imports(tree: ast.AST, directory: str) -> list[str]:
    forbidden = {*LAYERS, "tests"} - {directory, *LAYERS[directory]}
    return [name for name in imported_modules(tree) if name.split(".")[0] in forbidden]


def uses_of_distributed(tree: ast.AST) -> list[str]:
    found = [name for name in imported_modules(tree) if name.split(".")[:2] == ["torch", "distributed"]]
    for node in ast.walk(tree):
        is_attribute = isinstance(node, ast.Attribute) and node.attr == "distributed"
        if is_attribute and isinstance(node.value, ast.Name) and node.value.id == "torch":
            found.append("torch.distributed")
    return found


def private_imports(tree: ast.AST) -> list[str]:
    """Names of torch in an import that have a part with a leading underscore."""
    parts = ((name, name.split(".")) for name in imported_modules(tree))
    return [name for name, (top, *rest) in parts if top == "torch" and any(part.startswith("_") for part in rest)]


def shadows_of_optim(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += ["from torch import optim" for alias in node.names if alias.name == "optim"]
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found += [f"import {a.name} as optim" for a in node.names if a.asname == "optim" and a.name != "optim"]
    return found


def undocumented(tree: ast.Module) -> list[str]:
    """Missing docstrings: of the module, and of each class and function of ``__all__`` defined here."""
    documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    public = set(public_names(tree))
    missing = [
        node.name
        for node in tree.body
        if isinstance(node, documented) and node.name in public and not ast.get_docstring(node)
    ]
    return missing if ast.get_docstring(tree) or not tree.body else ["the module", *missing]


def public_names(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return ast.literal_eval(node.value)
    return []


def names_of_nothing(tree: ast.Module) -> list[str]:
    """Entries of ``__all__`` that the module does not bind."""
    bound: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            bound.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound.update(alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            bound.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, (ast.AnnAssign, ast.TypeAlias) if sys.version_info >= (3, 12) else ast.AnnAssign):
            bound.add(ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.name))
    return [name for name in public_names(tree) if name not in bound]


# ------------------------------------------------------------------------------------------------------------ the house

every_source = pytest.mark.parametrize("path", sources(*LAYERS), ids=relative)
every_file = pytest.mark.parametrize("path", sources(*LAYERS, "tests"), ids=relative)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def test_there_is_something_to_check() -> None:
    assert {"optim/base.py", "optim/basis/dct.py"} <= {relative(path) for path in sources(*LAYERS)}


@every_source
def test_imports_never_point_backwards(path: Path) -> None:
    assert not backward_imports(parsed(path), path.relative_to(ROOT).parts[0])


@pytest.mark.parametrize("path", sources("optim"), ids=relative)
def test_optim_depends_on_torch_alone(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported_modules(parsed(path))}
    assert tops <= OPTIM_MAY_IMPORT | sys.stdlib_module_names | {""}


@pytest.mark.parametrize("path", sources("optim"), ids=relative)
def test_optim_imports_nothing_private_of_torch(path: Path) -> None:
    """A private module may move with any release, and then ``import optim`` would fail."""
    assert private_imports(parsed(path)) == PRIVATE_ALLOWED.get(relative(path), [])


@every_source
def test_distributed_stays_where_it_belongs(path: Path) -> None:
    if path.parts[len(ROOT.parts)] in PACKAGES and relative(path) not in DISTRIBUTED_ALLOWED:
        assert not uses_of_distributed(parsed(path))


@every_file
def test_our_optim_is_never_shadowed(path: Path) -> None:
    assert not shadows_of_optim(parsed(path))


@every_source
def test_public_names_exist_and_are_documented(path: Path) -> None:
    tree = parsed(path)
    assert not names_of_nothing(tree)
    assert not undocumented(tree)


@pytest.mark.parametrize("path", sources("optim"), ids=relative)
def test_every_module_of_optim_says_what_is_public(path: Path) -> None:
    assert public_names(parsed(path))


def test_every_package_is_in_the_wheel_with_its_types() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    existing = {
        ".".join(path.parent.relative_to(ROOT).parts) for top in PACKAGES for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == existing
    for top in PACKAGES:
        assert (ROOT / top / "py.typed").is_file()
        assert "py.typed" in setuptools["package-data"][top]


@pytest.mark.parametrize("directory", sorted({path.parent for path in sources(*PACKAGES)}), ids=relative)
def test_every_directory_with_modules_is_a_package(directory: Path) -> None:
    assert (directory / "__init__.py").is_file()


# ------------------------------------------------------------------------------------ each check can fail, and not more


@pytest.mark.parametrize(
    ("directory", "code", "refused"),
    [
        ("optim", "import lowrank_train.data", True),
        ("optim", "def f():\n    from launch import pretrain", True),
        ("optim", "from tests.distributed import run_distributed", True),
        ("lowrank_train", "from launch.pretrain import main", True),
        ("lowrank_train", "from optim.base import MatrixOptimizer", False),
        ("launch", "import optim, lowrank_train.config", False),
        ("optim", "from torch import launch_nothing", False),
    ],
)
def test_backward_imports_are_found(directory: str, code: str, refused: bool) -> None:
    assert bool(backward_imports(ast.parse(code), directory)) == refused


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("import torch.distributed as dist", True),
        ("from torch import distributed", True),
        ("from torch.distributed.tensor import DTensor", True),
        ("import torch\ntorch.distributed.barrier()", True),
        ("import torch\ntorch.distributions.Normal(0, 1)", False),
        ("from tests.distributed import run_distributed", False),
    ],
)
def test_uses_of_distributed_are_found(code: str, refused: bool) -> None:
    assert bool(uses_of_distributed(ast.parse(code))) == refused


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from torch._guards import detect_fake_mode", ["torch._guards", "torch._guards.detect_fake_mode"]),
        ("from torch.nn.modules.conv import _ConvNd", ["torch.nn.modules.conv._ConvNd"]),
        ("import torch._subclasses", ["torch._subclasses"]),
        ("from torch import Tensor, nn\nfrom optim.base import _private", []),
    ],
)
def test_private_parts_of_torch_are_found(code: str, found: list[str]) -> None:
    assert private_imports(ast.parse(code)) == found


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("from torch import optim", True),
        ("from torch import nn, optim as o", True),
        ("import torch.optim as optim", True),
        ("import optim", False),
        ("from torch.optim.optimizer import ParamsT", False),
    ],
)
def test_shadows_of_optim_are_found(code: str, refused: bool) -> None:
    assert bool(shadows_of_optim(ast.parse(code))) == refused


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ('"""M."""\n__all__ = ["f"]\ndef f(): pass', ["f"]),
        ('"""M."""\n__all__ = ["F"]\nclass F:\n    """F."""', []),
        ('"""M."""\n__all__ = []\ndef f(): pass', []),
        ('__all__ = ["F"]\nclass F: pass', ["the module", "F"]),
        ("", []),
    ],
)
def test_missing_docstrings_are_found(code: str, missing: list[str]) -> None:
    assert undocumented(ast.parse(code)) == missing


def test_names_of_nothing_are_found() -> None:
    code = '__all__ = ["a", "b", "c", "D", "e"]\nimport a\nfrom x import y as b\nc: int = 1\nclass D: pass'
    assert names_of_nothing(ast.parse(code)) == ["e"]
