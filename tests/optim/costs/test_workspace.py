"""What a step needs is said beside the code that needs it, and added up without knowing any optimizer."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowrank_train import optim
from lowrank_train.optim.core.update import Update
from lowrank_train.optim.costs.workspace import step_workspace
from lowrank_train.optim.low_rank.bases.base import Basis
from lowrank_train.optim.low_rank.bases.columns import FixedMatrix
from lowrank_train.optim.low_rank.residuals import Residual
from tests.optim.models import MixedModel, build, prepare

METHODS = optim.names(of_matrices=True)


def groups(*shapes: tuple[int, ...], device: str = "meta", **settings: Any) -> list[dict[str, Any]]:
    params = [(f"layer{i}.weight", nn.Parameter(torch.ones(shape, device=device))) for i, shape in enumerate(shapes)]
    return [{"params": params, "role": "matrix", **settings}]


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside take at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and made.untyped_storage()._cdata not in self.known | given:
                storage = made.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_of_a_step(name: str, *, maximize: bool) -> int:
    """Of the third step of two equal matrices."""
    optimizer = optim.create(name, groups((64, 32), (64, 32), device="cpu"), maximize=maximize)
    for step in range(3):
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.rand(64, 32) + step
        with Peak() as peak:
            optimizer.step()
    return peak.most


@pytest.mark.parametrize("name", METHODS)
def test_a_stack_needs_what_its_matrices_need(name: str) -> None:
    stack = optim.create(name, groups((3, 40, 24)))
    matrices = optim.create(name, groups((40, 24), (40, 24), (40, 24)))
    for settings in ({}, {"one_at_a_time": True}, {"on_cpu": True}):
        ours, theirs = step_workspace(stack, **settings), step_workspace(matrices, **settings)
        assert (ours.step, ours.refresh, ours.kept_bytes) == (theirs.step, theirs.refresh, theirs.kept_bytes)


def test_a_stack_that_is_sharded_by_matrices_needs_less_on_each_rank() -> None:
    stack = optim.create("muon", groups((4, 40, 24)))
    assert step_workspace(stack, world_size=2).step < step_workspace(stack).step


@pytest.mark.parametrize("name", METHODS)
def test_the_negated_gradients_are_those_that_a_step_makes(name: str) -> None:
    shapes = [(64, 32), (64, 32)]
    predicted = [
        step_workspace(optim.create(name, groups(*shapes, device="cpu", maximize=maximize)), on_cpu=True).step
        for maximize in (False, True)
    ]
    measured = [peak_of_a_step(name, maximize=maximize) for maximize in (False, True)]
    more, counted = measured[1] - measured[0], predicted[1] - predicted[0]
    assert more <= counted <= more + 4 * 64 * 32  # where the peak is before the last gradient, it is one too many


@pytest.mark.parametrize("contract", [Basis, FixedMatrix, Residual])
def test_a_part_that_does_not_say_what_it_needs_is_refused(contract: type) -> None:
    assert "workspace" in contract.__abstractmethods__


def test_an_update_without_needs_of_its_own_needs_nothing() -> None:
    assert Update.workspace(optim.AdamW.update_of({"role": "vector"}), []).step == 0


def test_block_sizes_and_the_path_of_the_transform_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = optim.create("dct_adamw", groups((4096, 128)), rank=64)
    before = step_workspace(optimizer), step_workspace(optimizer, on_cpu=True)
    monkeypatch.setattr("lowrank_train.optim.low_rank.bases.dct._FFT_MIN_RANK", 64)
    assert step_workspace(optimizer) == before[0]
    by_fft = step_workspace(optimizer, on_cpu=True)
    assert by_fft.kept_bytes == 0 < before[1].kept_bytes
    monkeypatch.setattr("lowrank_train.optim.shards.blocks._CPU_BLOCK_NUMBERS", 2**12)
    assert step_workspace(optimizer, on_cpu=True).step < by_fft.step
    monkeypatch.setattr("lowrank_train.optim.shards.blocks._DEVICE_BLOCK_NUMBERS", 2**12)
    assert step_workspace(optimizer).step < before[0].step


def test_what_is_kept_between_steps_counts_once_for_equal_sizes() -> None:
    one, three = (optim.create("apollo", groups(*[(40, 24)] * count), rank=4) for count in (1, 3))
    assert step_workspace(one).kept_bytes == step_workspace(three).kept_bytes == 4 * 24 * 4


def test_what_follows_the_updates_is_said_by_the_optimizer() -> None:
    for name in ("sst", "relora"):
        assert build(name, prepare(name, MixedModel())).end_bytes(1) > 0
    assert build("sst", prepare("sst", MixedModel()), resvd_every=0).end_bytes(1) == 0
    assert build("adamw", MixedModel()).end_bytes(1) == 0
