"""The optimizers are light: neither using nor testing them loads the trainer's libraries."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("transformers", "datasets", "peft", "accelerate", "lightning", "matplotlib", "omegaconf", "geoopt", "sklearn")

USE = "from lowrank_train import optim; optim.names()"
COLLECT = """
import pytest
assert pytest.main(["--collect-only", "-qq", "tests/optim", "--ignore=tests/optim/frameworks"]) == 0
"""


@pytest.mark.parametrize(
    ("code", "allowed"),
    [(USE, set()), (COLLECT, {"geoopt"})],  # geoopt is what the tests of manifolds compare with
    ids=["importing optim", "collecting its tests"],
)
def test_the_libraries_of_the_trainer_stay_out(code: str, allowed: set[str]) -> None:
    report = f"import sys; print('loaded:', *sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = done.stdout.rpartition("loaded:")[2].split()
    assert set(loaded) <= allowed


PRIVATE = {"torch.autograd.grad_mode._unsafe_preserve_version_counter"}
"""FSDP2 fills its parameters under it, and an int8 weight is filled as those are; torch has no public name for it."""


def private_imports(code: str) -> set[str]:
    """Names and modules of torch with a leading underscore that code imports."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("torch.") and "._" in name}


def test_private_names_of_torch_are_those_it_has_no_public_name_for() -> None:
    assert set().union(*(private_imports(path.read_text()) for path in (ROOT / "optim").rglob("*.py"))) == PRIVATE


def test_private_imports_are_found() -> None:
    code = "import torch._guards\nfrom torch.fx import _lazy, Graph\nfrom torch._C import x\nimport torch.nn"
    assert private_imports(code) == {"torch._guards", "torch.fx._lazy", "torch._C.x"}
