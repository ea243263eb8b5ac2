"""The house: rooms, the arrows between them, the size of a file and of a room, and what a module owes its reader."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

ROOMS: dict[str, str] = {
    "optim/shards": "",
    "optim/arguments": "",
    "optim/storage": "optim/shards",
    "optim/parameters": "optim/shards optim/arguments",
    "optim/orthogonalize": "optim/shards",
    "optim/linalg": "",
    "optim/low_rank/bases": "optim/shards optim/arguments optim/linalg",
    "optim/manifolds": "optim/shards optim/arguments optim/storage optim/linalg",
    "optim/core": "optim/shards optim/arguments optim/storage optim/parameters optim/manifolds",
    "optim/low_rank": "optim/shards optim/arguments optim/storage optim/parameters optim/core optim/linalg"
    " optim/low_rank/bases",
    "optim/spectral": "optim/shards optim/arguments optim/storage optim/parameters optim/core optim/linalg"
    " optim/low_rank",
    "optim/methods/low_rank": "optim/core optim/low_rank",
    "optim/methods": "optim/shards optim/arguments optim/storage optim/parameters optim/core optim/manifolds"
    " optim/linalg optim/orthogonalize optim/low_rank optim/low_rank/bases optim/spectral optim/methods/low_rank",
    "optim/costs": "optim/shards optim/arguments optim/storage optim/parameters optim/core optim/manifolds"
    " optim/methods",
    "optim/frameworks": "optim/core optim/methods",
    "optim": "optim/shards optim/storage optim/parameters optim/core optim/methods optim/costs optim/frameworks"
    " optim/spectral",
    "optim/__main__": "optim/costs",
    # lowrank_train. Every room may import ``optim``, the public names; what else of it is named.
    "common": "",
    "reports": "common",
    "files": "common optim optim/shards optim/storage",
    "text": "common files",
    "models/families": "common",
    "layers": "common models/families optim/shards optim/arguments optim/core optim/linalg optim/spectral"
    " optim/methods",
    "config": "common files text layers optim optim/arguments",
    "data": "common files text config",
    "models": "common files text config layers data models/families optim optim/shards optim/arguments optim/storage",
    "peft": "common files text config layers data models optim/arguments",
    "plan": "common config layers models peft optim",
    "memory": "common reports files config layers models models/families plan optim optim/shards optim/arguments"
    " optim/storage optim/costs",
    "train": "common reports files text config layers data models peft plan memory optim optim/shards optim/storage",
    "spectra": "common reports files text config layers data models models/families train optim/spectral"
    " optim/linalg optim/costs",
    "hyperbolic": "common files config layers train optim optim/core",
    "hyperbolic/graphs": "common reports config train hyperbolic",
    "hyperbolic/translation": "common reports text config data train hyperbolic",
    "compress": "common reports files config data layers models models/families spectra optim/spectral optim/costs",
    "bench": "common reports files config layers models plan memory train spectra compress hyperbolic hyperbolic/graphs"
    " hyperbolic/translation optim optim/core optim/costs",
    "bench/steps": "common config layers models bench optim optim/costs",
    "benchmarks": "common bench bench/steps optim/__main__ optim/arguments",
    "commands": "common config train memory compress spectra hyperbolic hyperbolic/graphs hyperbolic/translation"
    " benchmarks",
    "__main__": "common commands optim/arguments",
    "launch": "commands",
    "lowrank_train": "layers",  # the face of the package, which imports what is asked for
}
"""Room -> the rooms it may import. What is not here is refused; rooms stand above all that they import."""

MOST_MODULES, MOST_LINES, LONGEST_CHAIN = 12, 400, 26

STILL_TOO_LARGE: dict[str, int] = {}
"""Folders and files above the limit, with what they may have at most. Nothing is added here."""

OPTIM_MAY_IMPORT = {"torch", "geoopt", "lowrank_train"}
DISTRIBUTED_ALLOWED = {
    "optim/parameters/stacks.py",
    "lowrank_train/common/ranks.py",
    "lowrank_train/common/rendezvous.py",
    "lowrank_train/files/checkpoint_files.py",
    "lowrank_train/models/export.py",
    "lowrank_train/models/fsdp.py",
    "lowrank_train/train/checkpoint.py",
    "lowrank_train/train/loop.py",
}
"""Beside the room ``optim/shards``."""

KNOW_FOREIGN_CLASSES = {"optim/parameters/wrappers.py", "optim/core/groups.py", "lowrank_train/layers/low_rank.py"}
"""Modules that know classes of other packages by name, because importing those packages would cost too much."""


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def sources(*directories: str) -> list[Path]:
    """All modules of top-level folders; ``lowrank_train/optim`` is a link to ``optim`` and is not followed."""
    found = (path for directory in directories for path in (ROOT / directory).rglob("*.py"))
    return sorted(path for path in found if not relative(path).startswith("lowrank_train/optim/"))


PRODUCT = sources("optim", "lowrank_train", "launch")


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = ("lowrank_train", *parts) if parts[0] == "optim" else parts
    return ".".join(inside).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PRODUCT}


def room_of(path: Path) -> str:
    """The folder of a module below ``lowrank_train``; a module without a folder is a room by itself."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "launch":
        return "launch"
    inside = parts[1:] if parts[0] == "lowrank_train" else parts
    if path.name == "__init__.py" or inside[:-1] not in ((), ("optim",)):
        return "/".join(inside[:-1]) or "lowrank_train"
    return "/".join(inside)[: -len(".py")]


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Every module an import names, ``from a import b`` as both ``a`` and ``a.b``; relative ones with their dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def arrows(tree: ast.Module) -> set[str]:
    """The modules of this project that a module imports, for its types too."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found.update(name if name in MODULES else node.module for name in names)
    return found & set(MODULES)


def uses_of_distributed(tree: ast.AST) -> list[str]:
    found = [name for name in imported_modules(tree) if name.split(".")[:2] == ["torch", "distributed"]]
    for node in ast.walk(tree):
        is_attribute = isinstance(node, ast.Attribute) and node.attr == "distributed"
        if is_attribute and isinstance(node.value, ast.Name) and node.value.id == "torch":
            found.append("torch.distributed")
    return found


def other_names_for_optim(tree: ast.AST) -> list[str]:
    """Imports that bind ``optim`` to something else than ``lowrank_train.optim``, or find ours under another name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            found += ["from torch import optim" for alias in node.names if alias.name == "optim"]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "optim":
            found.append(f"from {node.module} import")
        if isinstance(node, ast.Import):
            found += [f"import {a.name}" for a in node.names if a.name.split(".")[0] == "optim"]
            found += [f"import {a.name} as optim" for a in node.names if a.asname == "optim"]
    return found


def uses_of_class_names(tree: ast.AST) -> list[str]:
    """Decisions by the name of a class: comparisons, look-ups and string methods of ``__name__``."""
    found = []
    for node in ast.walk(tree):
        sides: list[ast.AST] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.Subscript):
            sides = [node.slice]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "with" in node.func.attr:
            sides = [node.func.value]
        if any(isinstance(side, ast.Attribute) and side.attr == "__name__" for side in sides):
            found.append(ast.unparse(node))
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
    lazy = [node for block in tree.body if isinstance(block, ast.If) for node in block.body]  # of a module __getattr__
    for node in [*tree.body, *lazy]:
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


def test_there_is_something_to_check() -> None:
    assert {"optim/core/optimizer.py", "optim/low_rank/bases/dct.py"} <= {relative(path) for path in PRODUCT}


def test_arrows_between_rooms_are_those_of_the_table() -> None:
    refused = [
        f"{relative(path)} imports {name}: {room_of(path)} -> {room_of(MODULES[name])}"
        for path in PRODUCT
        for name in sorted(arrows(parsed(path)))
        if room_of(MODULES[name]) not in {room_of(path), "lowrank_train", *ROOMS.get(room_of(path), "").split()}
    ]
    assert not refused, "\n".join(refused)


def test_every_room_is_in_the_table_and_above_what_it_imports() -> None:
    assert {room_of(path) for path in PRODUCT} <= set(ROOMS)
    order = list(ROOMS)
    for room, others in ROOMS.items():
        for other in others.split():
            assert order.index(other) < order.index(room), f"{room} -> {other} points up"


def test_there_is_no_circle_and_no_long_chain() -> None:
    depths: dict[str, list[str]] = {}

    def chain(name: str, above: tuple[str, ...] = ()) -> list[str]:
        assert name not in above, f"a circle: {' -> '.join([*above[above.index(name) :], name])}"
        if name not in depths:
            below = [chain(other, (*above, name)) for other in arrows(parsed(MODULES[name])) - {name}]
            depths[name] = [name, *max(below, key=len, default=[])]
        return depths[name]

    longest = max((chain(name) for name in MODULES), key=len)
    assert len(longest) <= LONGEST_CHAIN, " -> ".join(longest)


def test_rooms_and_files_are_small() -> None:
    counts = {folder: len(list(folder.glob("[!_]*.py"))) for folder in {path.parent for path in PRODUCT}}
    crowded = {relative(folder): count for folder, count in counts.items()}
    assert not {name: n for name, n in crowded.items() if n > STILL_TOO_LARGE.get(name, MOST_MODULES)}
    lines = {relative(path): len(path.read_text().splitlines()) for path in PRODUCT}
    assert not {name: n for name, n in lines.items() if n > STILL_TOO_LARGE.get(name, MOST_LINES)}


def test_product_imports_no_test() -> None:
    assert not [relative(p) for p in PRODUCT if any(n.split(".")[0] == "tests" for n in imported_modules(parsed(p)))]


def test_optim_depends_on_torch_alone() -> None:
    allowed = OPTIM_MAY_IMPORT | sys.stdlib_module_names
    for path in sources("optim"):
        for name in imported_modules(parsed(path)):
            assert name.split(".")[0] in allowed, f"{relative(path)} imports {name}"
            ours = name.split(".")[0] == "lowrank_train"
            assert not ours or name.split(".")[1:2] == ["optim"], f"{relative(path)} imports {name}"


def test_distributed_stays_where_it_belongs() -> None:
    elsewhere = [p for p in sources("optim", "lowrank_train") if room_of(p) != "optim/shards"]
    found = {relative(path) for path in elsewhere if uses_of_distributed(parsed(path))}
    assert found <= DISTRIBUTED_ALLOWED, found - DISTRIBUTED_ALLOWED


def test_no_class_is_known_by_its_name() -> None:
    found = {relative(path): uses_of_class_names(parsed(path)) for path in PRODUCT}
    assert {path for path, uses in found.items() if uses} == KNOW_FOREIGN_CLASSES


def test_optim_has_one_name_everywhere() -> None:
    found = {relative(path): other_names_for_optim(parsed(path)) for path in [*PRODUCT, *sources("tests", "docs")]}
    assert not {path: names for path, names in found.items() if names}


def test_public_names_exist_and_are_documented() -> None:
    wrong = {relative(path): names_of_nothing(parsed(path)) + undocumented(parsed(path)) for path in PRODUCT}
    assert not {path: names for path, names in wrong.items() if names}


FRAGMENTS = {"as", "at", "by", "for", "from", "in", "likewise", "of", "on", "to", "with"}
"""Words that begin a docstring which is no sentence and names nothing."""


def fragments(tree: ast.Module) -> list[str]:
    """Public functions, classes and methods whose docstring has no subject, or says "likewise"."""
    public = set(public_names(tree))
    documented = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in tree.body if isinstance(node, documented) and node.name in public]
    nodes += [member for node in nodes if isinstance(node, ast.ClassDef) for member in node.body
              if isinstance(member, documented) and not member.name.startswith("_")]  # fmt: skip
    texts = {node.name: (ast.get_docstring(node) or "").lower() for node in nodes}
    return [name for name, text in texts.items() if text.split(" ")[0] in FRAGMENTS or "likewise" in text]


def test_public_docstrings_are_sentences() -> None:
    found = {relative(path): fragments(parsed(path)) for path in PRODUCT}
    assert not {path: names for path, names in found.items() if names}


def test_every_module_of_optim_says_what_is_public() -> None:
    modules = [path for path in sources("optim") if path.name != "__init__.py"]
    assert not [relative(path) for path in modules if not public_names(parsed(path))]


def test_every_folder_is_a_package_that_says_what_it_is_for() -> None:
    for folder in {path.parent for path in sources("optim", "lowrank_train")}:
        assert (folder / "__init__.py").is_file(), folder
        assert ast.get_docstring(parsed(folder / "__init__.py")), folder


def test_packages_of_the_wheel_are_those_that_exist() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(setuptools["packages"]) == {module_name(p) for p in PRODUCT if p.name == "__init__.py"}


def test_a_wheel_installs_lowrank_train_alone(tmp_path: Path) -> None:
    """A top-level ``optim`` would break every project that has a folder of that name."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split("\n")
    if not any(files):
        pytest.skip("not a git checkout, so there is no list of the files that belong to it")
    for name in filter(None, files):
        if (ROOT / name).is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file() and not name.startswith(("tests/", "docs/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lowrank_train"}
    expected = {module_name(path).replace(".", "/") for path in PRODUCT if path.parts[len(ROOT.parts)] != "launch"}
    assert {n.removesuffix(".py").removesuffix("/__init__") for n in names if n.endswith(".py")} == expected
    assert "lowrank_train/optim/py.typed" in names
    assert "lowrank_train/py.typed" in names


# ------------------------------------------------------------------------------------ each check can fail, and not more


@pytest.mark.parametrize(
    ("path", "room"),
    [
        ("optim/__init__.py", "optim"),
        ("optim/__main__.py", "optim/__main__"),
        ("optim/core/optimizer.py", "optim/core"),
        ("optim/low_rank/bases/__init__.py", "optim/low_rank/bases"),
        ("lowrank_train/plan.py", "plan"),
        ("lowrank_train/train/loop.py", "train"),
        ("lowrank_train/hyperbolic/graphs/data.py", "hyperbolic/graphs"),
        ("launch/pretrain.py", "launch"),
    ],
)
def test_rooms_of_modules(path: str, room: str) -> None:
    assert room_of(ROOT / path) == room


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from lowrank_train.train.loop import train", {"lowrank_train.train.loop"}),
        ("from lowrank_train.train import loop", {"lowrank_train.train.loop"}),
        ("def f():\n    import lowrank_train.plan", {"lowrank_train.plan"}),
        ("from lowrank_train import optim", {"lowrank_train.optim"}),
        ("if TYPE_CHECKING:\n    from lowrank_train import plan", {"lowrank_train.plan"}),
        ("from torch import nn", set()),
    ],
)
def test_arrows_are_found(code: str, found: set[str]) -> None:
    assert arrows(ast.parse(code)) == found


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
    ("code", "refused"),
    [
        ("from torch import optim", True),
        ("from torch import nn, optim as o", True),
        ("import torch.optim as optim", True),
        ("import optim", True),
        ("import optim.core", True),
        ("from optim.core import groups", True),
        ("from lowrank_train import optim", False),
        ("from torch.optim.optimizer import ParamsT", False),
    ],
)
def test_other_names_for_optim_are_found(code: str, refused: bool) -> None:
    assert bool(other_names_for_optim(ast.parse(code))) == refused


@pytest.mark.parametrize(
    ("code", "refused"),
    [
        ("if type(basis).__name__ == 'ExactSVD': pass", True),
        ("type(x).__name__ in TABLE", True),
        ("TABLE[cls.__name__]", True),
        ("type(x).__name__.endswith('Norm')", True),
        ("f'got a {type(x).__name__}'", False),
        ("isinstance(x, ExactSVD)", False),
    ],
)
def test_uses_of_class_names_are_found(code: str, refused: bool) -> None:
    assert bool(uses_of_class_names(ast.parse(code))) == refused


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


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ('__all__ = ["f"]\ndef f():\n    """Of the matrix."""', ["f"]),
        ('__all__ = ["F"]\nclass F:\n    """A matrix."""\n    def g(self):\n        """As stored."""', ["g"]),
        ('__all__ = ["f"]\ndef f():\n    """Return a matrix.\n\n    Args:\n        x: likewise.\n    """', ["f"]),
        ('__all__ = ["f"]\ndef f():\n    """Return a matrix."""\ndef g():\n    """Of the matrix."""', []),
    ],
)
def test_docstrings_without_a_subject_are_found(code: str, found: list[str]) -> None:
    assert fragments(ast.parse(code)) == found
