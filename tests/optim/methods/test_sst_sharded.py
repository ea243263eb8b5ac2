"""SST under FSDP2 and HSDP makes the numbers of one process, through checkpoints too; it talks between iterations."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from lowrank_train import optim
from tests.distributed import run_distributed
from tests.optim.methods.test_sst import Decompositions, build, drawn_gradient, spectral_network, step_with, train
from tests.optim.models import assert_equal, set_gradients, states, weights
from tests.optim.shards.test_sharded import Collectives, one_dimensional_mesh, swap_parameters, two_by_two_mesh
from tests.tiers import only_first_quick

TOLERANCE = 1e-10
T3 = 2
STEPS = 5 * T3 + 1  # re-SVDs after steps 4 and 8, a draw with and one without following, and a step

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # of the model, and of the optimizer
    "paper": ({}, {}),
    "kept": ({"rank": 3}, {"keep_sigma_moments": True, "keep_vector_moments": True}),
    "float16": ({"frozen_dtype": "float16"}, {"sampling": "sequential", "weight_decay": 0.1}),
    "never decomposed": ({}, {"resvd_every": 0, "sampling": "uniform"}),
    "full rank": ({"rank": 4, "layers": "^wide$"}, {}),
    "8bit": ({"frozen_dtype": "8bit", "rank": 1}, {}),
}


def new(case: str) -> nn.Module:
    settings = dict(CASES[case][0])
    return spectral_network(settings.pop("rank", 2), **settings)


def optimizer_of(case: str, model: nn.Module) -> optim.SST:
    return build(model, **{"resvd_every": 2, "resample_every": T3, "warmup_steps": 2, **CASES[case][1]})


def shard(model: nn.Module, placement: str) -> None:
    """One layer on its own, then the rest; a 2 x 2 mesh for HSDP."""
    mesh = two_by_two_mesh() if placement == "hsdp" else one_dimensional_mesh()
    fully_shard(model.get_submodule("square"), mesh=mesh)
    fully_shard(model, mesh=mesh)


def values(model: nn.Module, optimizer: optim.SST) -> dict[str, Tensor]:
    return {**weights(model), **states(model, optimizer)}


def trained(case: str, placement: str | None) -> tuple[list[float], dict[str, Tensor], dict[str, float]]:
    """Losses, all tensors, figures; every rank sees the same data, so averaged gradients are those of one process."""
    model = new(case)
    if placement is not None:
        shard(model, placement)
    optimizer = optimizer_of(case, model)
    losses = train(model, optimizer, 0, STEPS)
    figures = {key: value for key, value in optimizer.figures().items() if "time" not in key}
    return losses, values(model, optimizer), figures


def all_trained(placement: str) -> dict[str, Any]:
    return {case: trained(case, placement) for case in CASES}


@cache
def alone(case: str) -> tuple[list[float], dict[str, Tensor], dict[str, float]]:
    """In one process; not to be changed."""
    return trained(case, None)


@pytest.mark.parametrize(("placement", "world_size"), only_first_quick([("rows", 2), ("rows", 3), ("hsdp", 4)]))
def test_sharded_equals_one_process(placement: str, world_size: int) -> None:
    """Of one active triplet, or one frozen, some ranks hold nothing."""
    for results in run_distributed(all_trained, world_size, placement):
        for case, (losses, tensors, figures) in results.items():
            expected = alone(case)
            assert len(set(losses)) == STEPS
            assert losses == pytest.approx(expected[0], abs=TOLERANCE), case
            try:
                assert_equal(tensors, expected[1], TOLERANCE)
            except AssertionError as error:
                raise AssertionError(f"{case}: {error}") from None
            assert figures == pytest.approx(expected[2], abs=TOLERANCE), case


def test_some_shards_are_empty_and_frozen_codes_are_codes() -> None:
    def worker() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        model = new("8bit")
        shard(model, "rows")
        found = {}
        for name, param in model.named_parameters():
            assert isinstance(param, DTensor)
            assert param.placements == (Shard(0),)
            found[name] = (tuple(param.to_local().shape), param.dtype)
        return found

    last = run_distributed(worker, 3)[2]
    assert last["tall.u_active"] == ((0, 10), torch.float64)
    assert last["wide.u_frozen"] == ((1, 4), torch.int8)
    assert last["square.v_frozen"] == ((3, 10), torch.int8)


# -------------------------------------------------------------------------------------------------------- communication


@pytest.mark.parametrize(("placement", "world_size"), [("rows", 2), ("hsdp", 4)])
def test_a_step_within_an_iteration_communicates_nothing(placement: str, world_size: int) -> None:
    def worker() -> list[list[str]]:
        model = new("8bit")
        shard(model, placement)
        optimizer = build(model, resample_every=T3, resvd_every=2, weight_decay=0.1)
        recorded = []
        for step in range(2 * T3):
            set_gradients_of_trained(model, step)
            with Collectives() as collectives:
                optimizer.step()
            recorded.append([call.operation for call in collectives.calls])
        return recorded

    for recorded in run_distributed(worker, world_size):
        for step, operations in enumerate(recorded):
            ends, decomposes = (step + 1) % T3 == 0, (step + 1) % (2 * T3) == 0
            assert bool(operations) == ends, step
            assert any("reduce_" in name and "all" not in name for name in operations) == decomposes, step
            assert any("broadcast" in name for name in operations) == decomposes, step


def set_gradients_of_trained(model: nn.Module, step: int) -> None:
    set_gradients(model, step)
    for param in model.parameters():
        if not param.requires_grad:
            param.grad = None


@pytest.mark.parametrize("keep", [False, True])
def test_a_draw_communicates_the_rows_that_change_places(keep: bool) -> None:
    """Of each of r triplets u, sigma, v, and 3 of its moments if kept, there and back; all sigma; active u and v,
    and a number, to say how orthogonal they are.
    """

    def worker() -> list[int]:
        model = new("paper")
        shard(model, "rows")
        optimizer = build(model, resample_every=T3, resvd_every=0, sampling="sequential", keep_sigma_moments=keep)
        for step in range(T3):
            set_gradients_of_trained(model, step)
            with Collectives() as collectives:
                optimizer.step()
        return [call.numbers for call in collectives.calls]

    shapes, r = [(10, 6), (10, 10), (4, 10)], 2
    exchanged = sum(2 * r * (out + 1 + width + 3 * keep) for out, width in shapes)
    asked = sum(min(out, width) + r * (out + width) + 1 for out, width in shapes)
    for numbers in run_distributed(worker, 2):
        assert sum(numbers) == exchanged + asked


def test_each_matrix_is_decomposed_by_one_rank() -> None:
    def worker() -> list[tuple[int, ...]]:
        model = new("paper")
        shard(model, "rows")
        optimizer = build(model, resample_every=T3, resvd_every=1)
        with pytest.MonkeyPatch.context() as patch:
            decompositions = Decompositions(patch)
            for step in range(T3):
                set_gradients_of_trained(model, step)
                optimizer.step()
        return decompositions.shapes

    by_rank = run_distributed(worker, 2)
    assert sorted(shape for shapes in by_rank for shape in shapes) == [(4, 10), (10, 6), (10, 10)]
    assert all(by_rank)


def test_a_decomposition_that_fails_on_one_rank_is_kept_by_all() -> None:
    def worker() -> tuple[int, dict[str, Tensor]]:
        model = new("paper")
        shard(model, "rows")
        optimizer = build(model, resample_every=T3, resvd_every=1)
        train(model, optimizer, 0, T3 - 1)
        error = torch.linalg.LinAlgError("no convergence") if dist.get_rank() == 1 else None
        with pytest.MonkeyPatch.context() as patch:
            Decompositions(patch, error)
            with pytest.warns(UserWarning, match="re-SVD"):
                train(model, optimizer, T3 - 1, T3)
        train(model, optimizer, T3, 3 * T3)
        return optimizer.resvd_failures, values(model, optimizer)

    first, second = run_distributed(worker, 2)
    assert first[0] == second[0] > 0
    assert_equal(first[1], second[1])
    assert all(value.isfinite().all() for value in first[1].values())


def test_a_gradient_missing_on_one_rank_does_not_hang() -> None:
    def worker() -> dict[str, Tensor]:
        model = new("paper")
        shard(model, "rows")
        optimizer = build(model, resample_every=T3, resvd_every=1)
        for step in range(2 * T3):
            set_gradients_of_trained(model, step)
            if dist.get_rank() == 1:
                model.get_parameter("square.u_active").grad = None
                model.get_parameter("tall.sigma_frozen").grad = None
            optimizer.step()
        return values(model, optimizer)

    first, second = run_distributed(worker, 2)
    assert_equal(first, second)


def test_vectors_cut_in_parts_are_refused_before_they_are_changed() -> None:
    """Along dimension 1: a rank would give its part of a vector length 1."""

    def worker() -> None:
        model = new("paper")

        def columns(param: nn.Parameter) -> Shard:
            return Shard(1 if param.ndim == 2 and param.shape[1] % 2 == 0 else 0)

        fully_shard(model, mesh=one_dimensional_mesh(), shard_placement_fn=columns)
        with pytest.raises(ValueError, match="sharded along dimension 1"):
            train(model, build(model), 0, 1)

    run_distributed(worker, 2)


# --------------------------------------------------------------------------------------------------------- construction


@pytest.mark.parametrize("through_state_dict", only_first_quick([False, True]))
def test_built_before_sharding_equals_built_after(through_state_dict: bool) -> None:
    def worker() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model = new("8bit")
        optimizer = optimizer_of("8bit", model)
        if through_state_dict:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        shard(model, "rows")
        swap_parameters(model, optimizer)
        train(model, optimizer, 0, STEPS)
        assert set(optimizer.state) == set(model.parameters())
        return values(model, optimizer), trained("8bit", "rows")[1]

    for before, after in run_distributed(worker, 2):
        assert_equal(before, after)


def test_unsharded_state_resumes_sharded() -> None:
    saved_at = T3 + 1

    def worker() -> dict[str, Tensor]:
        source = new("kept")
        source_optimizer = optimizer_of("kept", source)
        train(source, source_optimizer, 0, saved_at)
        model = new("kept")
        model.load_state_dict(source.state_dict())
        shard(model, "rows")
        optimizer = optimizer_of("kept", model)
        optimizer.load_state_dict(source_optimizer.state_dict())
        train(model, optimizer, saved_at, STEPS)
        return values(model, optimizer)

    for result in run_distributed(worker, 3):
        assert_equal(result, alone("kept")[1], TOLERANCE)


# ----------------------------------------------------------------------------------------------------------- checkpoint

SAVED_AT = T3 + 1  # within an iteration; a re-SVD at 2 T3 follows
SAVED_CASES = ("kept", "8bit")


def save(folder: str) -> dict[str, dict[str, Tensor]]:
    files, results = {}, {}
    for case in SAVED_CASES:
        model = new(case)
        shard(model, "rows")
        optimizer = optimizer_of(case, model)
        train(model, optimizer, 0, SAVED_AT)
        files[case] = state_of(model, optimizer)
        results[case] = values(model, optimizer)
    dcp.save(files, checkpoint_id=folder)
    return results


def state_of(model: nn.Module, optimizer: optim.SST) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optim": optimizer_state}


def load_and_continue(folder: str, placement: str | None) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    runs, files = {}, {}
    for case in SAVED_CASES:
        model = new(case)
        step_with(model, build(model, lr=0.5), drawn_gradient(7))  # other weights than those to be loaded
        model.zero_grad()
        if placement is not None:
            shard(model, placement)
        optimizer = optimizer_of(case, model)
        runs[case] = (model, optimizer)
        files[case] = state_of(model, optimizer)
    dcp.load(files, checkpoint_id=folder)
    results = {}
    for case, (model, optimizer) in runs.items():
        set_state_dict(model, optimizer, model_state_dict=files[case]["model"], optim_state_dict=files[case]["optim"])
        loaded = values(model, optimizer)
        train(model, optimizer, SAVED_AT, STEPS)
        results[case] = (loaded, values(model, optimizer))
    return results


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, dict[str, Tensor]]]:
    """Written by 2 ranks: its folder, and what was saved."""
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    first, second = run_distributed(save, 2, str(folder))
    for case in SAVED_CASES:
        assert_equal(first[case], second[case])
    return str(folder), first


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # what a plain process is told when it loads
@pytest.mark.parametrize(("placement", "world_size"), only_first_quick([(None, 0), ("rows", 1), ("rows", 3)]))
def test_a_checkpoint_of_two_ranks_continues_elsewhere(
    checkpoint: tuple[str, dict[str, dict[str, Tensor]]], placement: str | None, world_size: int
) -> None:
    folder, saved = checkpoint
    by_rank = run_distributed(load_and_continue, world_size, folder, placement) if world_size else None
    for results in by_rank or [load_and_continue(folder, None)]:
        for case in SAVED_CASES:
            loaded, final = results[case]
            assert_equal(loaded, saved[case])
            assert_equal(final, alone(case)[1], TOLERANCE)
