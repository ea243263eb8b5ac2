"""The commands by name, and what works where only torch is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_train
from lowrank_train.__main__ import main
from lowrank_train.commands import COMMANDS
from lowrank_train.common import signals

EXTRAS = ("transformers", "tokenizers", "datasets", "omegaconf", "yaml", "matplotlib", "tqdm", "peft", "geoopt")
"""Packages that the extras install."""

BARE = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))"
"""In a new process: all of them are as if they were not installed."""


def in_a_bare_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", f"{BARE}\n{code}"], capture_output=True, text=True, timeout=120)


def test_optimizers_need_torch_alone() -> None:
    done = in_a_bare_process(
        "import torch\n"
        "from lowrank_train import optim\n"
        "model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))\n"
        "for name in optim.names():\n"
        "    if name in ('sst', 'relora', 'riemannian_adamw'):\n"
        "        continue\n"
        "    optimizer = optim.create(name, model, lr=1e-3)\n"
        "    before = model[0].weight.detach().clone()\n"
        "    model(torch.ones(2, 8)).sum().backward()\n"
        "    optimizer.step()\n"
        "    assert not torch.equal(before, model[0].weight), name\n"
        "private = [m for m in sys.modules if m.split('.')[0] == 'lowrank_train' and 'optim' not in m]\n"
        "assert private == ['lowrank_train'], private\n"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_whose_packages_are_absent_says_which_extra_has_them(name: str) -> None:
    done = in_a_bare_process(f"from lowrank_train.__main__ import main\nsys.exit(main([{name!r}, '--help']))")
    assert done.returncode == 2
    assert done.stderr.startswith("error: this command needs the package '"), done.stderr
    assert "pip install 'lowrank-train[" in done.stderr


def test_every_public_function_is_where_the_package_says() -> None:
    for name in lowrank_train.__all__:
        assert getattr(lowrank_train, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'to_spectrum'"):
        _ = lowrank_train.to_spectrum


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert "usage: launch/" + name.replace("-", "_") in capsys.readouterr().out


def test_without_a_command_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name}: " in said for name in COMMANDS)


def test_an_unknown_command_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrian"]) == 2
    assert "unknown command 'pretrian'; did you mean 'pretrain'?" in capsys.readouterr().err


def test_a_run_of_the_package_is_resumed_as_it_was_started() -> None:
    script = str(Path(lowrank_train.__file__).with_name("__main__.py"))
    assert signals.typed_command([script, "pretrain", "steps=3"]) == "python -m lowrank_train pretrain steps=3"
    assert signals.typed_command(["launch/pretrain.py", "steps=3"]) == "python launch/pretrain.py steps=3"
