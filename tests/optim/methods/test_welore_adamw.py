"""Ranks chosen from weights: against the slow reference; budgets, rules, stacks, shards, checkpoints, errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from lowrank_train import optim
from lowrank_train.optim import LowRankAdamW, WeLoreAdamW, param_groups, ranks_from_weights
from lowrank_train.optim.spectral.ranks import SCORES
from tests.distributed import run_distributed
from tests.optim.models import MixedModel, all_whole, assert_equal, build, run_steps, weights
from tests.reference.welore_adamw import chosen_ranks, cost

DECAY = {"flat": 0.97, "wide": 0.8, "steep": 0.4, "stack": 0.7}
SHAPES = {"flat": (12, 8), "wide": (7, 10), "steep": (9, 6), "stack": (3, 8, 5)}
STEPS = 7
PARTS: dict[str, Any] = {"basis": "subspace", "residual": "drop", "refresh_interval": 3}


class Model(nn.Module):
    """Its parameters are the matrices ``SHAPES``, with spectra that fall as ``DECAY`` says; and a vector."""

    def __init__(self, dtype: torch.dtype = torch.float64, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in SHAPES.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64)
            u, _, v = torch.linalg.svd(value, full_matrices=False)
            spectrum = DECAY[name] ** torch.arange(min(shape[-2:]), dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(((u * spectrum) @ v).to(dtype)))
        self.bias = nn.Parameter(torch.zeros(5, dtype=dtype))

    @property
    def parameter_roles(self) -> dict[str, str]:
        return dict.fromkeys(SHAPES, "matrix")


def create(model: nn.Module, **settings: Any) -> WeLoreAdamW:
    return WeLoreAdamW(param_groups(model), **{"lr": 1e-2, "rank": 3, "refresh_interval": 3, **settings})


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and state, whole, by name."""
    named = dict(model.named_parameters())
    of_state = {f"{name}.{key}": value for name, p in named.items() for key, value in optimizer.state[p].items()}
    return all_whole({**named, **of_state})


def matrix_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        value.numel() * value.element_size()
        for group in optimizer.param_groups
        if group["role"] == "matrix"
        for param in group["params"]
        for value in optimizer.state[param].values()
    )


# ------------------------------------------------------------------------------------------------------------ the ranks


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["energy", "relative", "minmax"])
@pytest.mark.parametrize("settings", [{}, {"rank": 2}, {"rank": 4, "multiple": 2}, {"budget_bytes": 9000, "floor": 2}])
def test_ranks_are_those_of_the_reference(seed: int, name: str, settings: dict[str, Any]) -> None:
    model = Model(seed=seed)
    arrays = [param.detach().numpy() for key, param in model.named_parameters() if key in SHAPES]
    settings = {"rank": 3, "multiple": 1, "floor": 1, "budget_bytes": None, **settings}
    budget = settings["budget_bytes"] or sum(cost(array.shape, settings["rank"]) for array in arrays)
    expected = chosen_ranks(arrays, name, budget, settings["multiple"], settings["floor"])
    assert list(create(model, score=name, **settings).ranks.values()) == expected
    assert len(set(expected)) > 1


def test_ranks_are_those_that_earlier_versions_chose_from_weights() -> None:
    """Found with ``source="weight"``, when ranks were still chosen during training, of the matrices alone."""
    model = Model()
    matrices = [(name, param) for name, param in model.named_parameters() if name in list(SHAPES)[:3]]
    for (score, rank), ranks in EARLIER.items():
        found = WeLoreAdamW([{"params": matrices, "role": "matrix"}], score=score, rank=rank).ranks
        assert tuple(found.values()) == ranks, (score, rank)


EARLIER: dict[tuple[str, int], tuple[int, ...]] = {
    ("energy", 2): (1, 3, 1),
    ("energy", 3): (3, 3, 2),
    ("energy", 4): (8, 3, 2),
    ("energy_per_cost", 2): (1, 3, 2),
    ("energy_per_cost", 3): (3, 3, 2),
    ("energy_per_cost", 4): (5, 4, 2),
    ("minmax", 2): (2, 2, 1),
    ("minmax", 3): (4, 3, 1),
    ("minmax", 4): (5, 4, 2),
    ("relative", 2): (3, 1, 1),
    ("relative", 3): (8, 1, 1),
    ("relative", 4): (8, 4, 1),
    ("uniform", 3): (3, 3, 3),
}


@pytest.mark.parametrize("score", sorted(SCORES))
def test_equal_spectra_get_equal_ranks(score: str) -> None:
    """Whichever way a matrix lies, and in a stack of two."""
    weight = torch.randn(12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    params = [("one", nn.Parameter(weight.clone())), ("turned", nn.Parameter(weight.mT.clone()))]
    params += [("two", nn.Parameter(torch.stack([weight, weight]))), ("other", nn.Parameter(weight**3))]
    groups = [{"params": [each], "role": "matrix"} for each in params]
    ranks = WeLoreAdamW(groups, rank=3, score=score).ranks
    assert ranks["one"] == ranks["turned"]
    if score != "energy_per_cost":  # two matrices cost twice as much
        assert ranks["one"] == ranks["two"]


def test_the_control_is_galore_at_the_uniform_rank() -> None:
    ours, galore = Model(), Model()
    optimizer = create(ours, score="uniform", scale=0.25, eps=1e-6, moments="keep")
    other = optim.GaLoreAdamW(param_groups(galore), lr=1e-2, rank=3, refresh_interval=3, weight_decay=0.0)
    assert set(optimizer.ranks.values()) == {3}
    run_steps(ours, optimizer, 0, STEPS)
    run_steps(galore, other, 0, STEPS)
    assert_equal(weights(ours), weights(galore), 1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_whole_budget_is_adamw(dtype: torch.dtype) -> None:
    ours, adamw = Model(dtype), Model(dtype)
    optimizer = create(ours, budget_bytes=10**9)
    assert optimizer.ranks == {name: min(shape[-2:]) for name, shape in SHAPES.items()}
    assert "by WeLoreAdamW in all directions, which is AdamW" in repr(optimizer)
    run_steps(ours, optimizer, 0, STEPS)
    run_steps(adamw, build("adamw", adamw, weight_decay=0.0), 0, STEPS)
    assert_equal(weights(ours), weights(adamw), 1e-12 if dtype == torch.float64 else 1e-5)


def test_the_rules_give_another_optimizer_the_same_ranks_and_training() -> None:
    ours, other = Model(), Model()
    optimizer = create(ours)
    rules = ranks_from_weights(other, rank=3)
    twin = LowRankAdamW(param_groups(other, rules=rules), lr=1e-2, weight_decay=0.0, **PARTS)
    assert len(set(optimizer.ranks.values())) > 2
    found = {name: group["rank"] for group in twin.param_groups for name in group["param_names"] if name in SHAPES}
    assert found == optimizer.ranks
    groups = param_groups(other, rules=rules)
    assert optim.predicted_state_bytes("low_rank_adamw", groups, **PARTS) == optim.state_bytes(twin)
    run_steps(ours, optimizer, 0, STEPS)
    run_steps(other, twin, 0, STEPS)
    assert_equal(everything(ours, optimizer), everything(other, twin))


def test_int8_weights_are_read_as_the_numbers_they_stand_for() -> None:
    model, plain = MixedModel(torch.bfloat16), MixedModel(torch.float32)
    names = [name for group in param_groups(model) if group["role"] == "matrix" for name, _ in group["params"]]
    optim.keep_in_int8(model, names)
    wide = {key: p.wide(torch.float32) if key in names else p.float() for key, p in model.state_dict().items()}
    plain.load_state_dict(wide)
    found = optim.create("welore_adamw", model, rank=1, stochastic_rounding=True, state_dtype="float32", score="minmax")
    assert found.ranks == optim.create("welore_adamw", plain, rank=1, score="minmax").ranks


# -------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("score", sorted(SCORES))
@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 3},
        {"budget_bytes": 6000},
        {"multiple": 2, "floor": 2},
        {"budget_bytes": 5555, "state_dtype": "bfloat16"},
    ],
)
def test_the_budget_is_never_exceeded_and_bytes_are_predicted(score: str, settings: dict[str, Any]) -> None:
    model = Model()
    optimizer = create(model, score=score, **settings)
    uniform = create(Model(), score="uniform", rank=3, state_dtype=settings.get("state_dtype"))
    assert matrix_bytes(optimizer) <= (settings.get("budget_bytes") or matrix_bytes(uniform))
    arguments = {"rank": 3, "score": score, **settings}
    counted = optim.state_bytes(optimizer)
    assert counted == optim.layout_bytes(optimizer)
    assert counted == optim.predicted_state_bytes("welore_adamw", model, ranks=optimizer.ranks, **arguments)
    without_weights = optim.predicted_state_bytes("welore_adamw", model, **arguments)
    others = counted - matrix_bytes(optimizer)
    assert without_weights - others <= (settings.get("budget_bytes") or matrix_bytes(uniform))
    assert settings != {"rank": 3} or without_weights == optim.state_bytes(uniform) >= counted
    run_steps(model, optimizer, 0, STEPS)
    assert optim.state_bytes(optimizer) == counted


def test_a_larger_budget_never_takes_rank() -> None:
    found = [tuple(create(Model(), budget_bytes=budget).ranks.values()) for budget in range(3000, 9000, 500)]
    assert all(a <= b for low, high in pairwise(found) for a, b in zip(low, high, strict=True))
    assert len(set(found)) > 4


def test_a_smaller_rank_in_8_bits_may_cost_more_and_the_higher_is_taken() -> None:
    """Of 300 x 131 rank 31 is stored whole, 32 is not."""
    param = nn.Parameter(torch.ones(131, 300))

    def of(**settings: Any) -> WeLoreAdamW:
        return WeLoreAdamW([{"params": [("w", param)], "role": "matrix"}], state_dtype="8bit", **settings)

    assert of(rank=30, score="uniform").ranks == {"w": 32}
    assert matrix_bytes(of(rank=30, score="uniform")) < matrix_bytes(of(ranks={"w": 30}))
    assert of(rank=16, score="uniform", multiple=5).ranks == {"w": 35}


def test_given_ranks_are_kept() -> None:
    model = Model()
    ranks = {"flat": 2, "wide": 3, "steep": 5, "stack": 1}  # for "steep" all directions take no more
    optimizer = create(model, ranks=ranks)
    assert optimizer.ranks == {**ranks, "steep": 6}
    run_steps(model, optimizer, 0, STEPS)
    assert optimizer.ranks == {**ranks, "steep": 6}


def test_groups_added_later_share_the_bytes_of_their_rank() -> None:
    model, budget = Model(), 8 * 10**5
    named = dict(model.named_parameters())
    optimizer = WeLoreAdamW([{"params": [("wide", named["wide"])], "role": "matrix"}], budget_bytes=budget, rank=3)
    assert optimizer.ranks == {"wide": 7}
    added = {"params": [(name, named[name]) for name in ("flat", "steep")], "role": "matrix"}
    optimizer.add_param_group(dict(added))
    assert optimizer.ranks == {"wide": 7, **WeLoreAdamW([dict(added)], rank=3).ranks}
    small = ("b", nn.Parameter(torch.ones(2, 9)))
    with pytest.raises(ValueError, match="rank=3 exceeds"):
        optimizer.add_param_group({"params": [("a", nn.Parameter(torch.ones(8, 9))), small], "role": "matrix"})
    assert set(optimizer.ranks) == {"wide", "flat", "steep"}
    assert len(optimizer.state) == 3


def test_a_model_without_matrices_is_adamw() -> None:
    model = nn.LayerNorm(4)
    optimizer = optim.create("welore_adamw", model)
    run_steps(model, optimizer, 0, 3)
    assert optimizer.ranks == {}


# -------------------------------------------------------------------------------------------------------------- sharded


def shard(model: nn.Module, dim: int | None) -> None:
    """Along a dimension, unevenly; None: as FSDP2 does by default."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if dim is None:
        fully_shard(model, mesh=mesh)
        return
    for name, param in list(model.named_parameters()):
        value = distribute_tensor(param.detach(), mesh, [Shard(min(dim, param.ndim - 1))], src_data_rank=None)
        setattr(model, name, nn.Parameter(value))


def trained(dim: int | None, *, sharded: bool, first: bool = False) -> tuple[dict[str, int], dict[str, Tensor]]:
    model = Model()
    optimizer = create(model) if first else None
    if sharded:
        shard(model, dim)
    optimizer = optimizer or create(model)
    run_steps(model, optimizer, 0, STEPS)
    if sharded:
        shapes = {name: p.shape for name, p in model.named_parameters()}
        assert shapes == {name: p.shape for name, p in Model().named_parameters()}
    return optimizer.ranks, everything(model, optimizer)


@pytest.mark.parametrize(("world_size", "dim"), [(2, None), (2, 1), (3, 0), (4, 2), (4, None)])
def test_sharded_equals_one_process(world_size: int, dim: int | None) -> None:
    """Along the projected dimension, the other, a stack, and inside its matrices; some ranks hold nothing."""
    ranks, expected = trained(None, sharded=False)
    for found, values in run_distributed(lambda: trained(dim, sharded=True), world_size):
        assert found == ranks
        assert_equal(values, expected, 1e-10)


def test_built_before_fully_shard_it_keeps_its_ranks() -> None:
    ranks, expected = trained(None, sharded=False)
    for found, values in run_distributed(lambda: trained(None, sharded=True, first=True), 2):
        assert found == ranks
        assert_equal(values, expected, 1e-10)


# ---------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("settings", [{}, {"rank": 1}, {"budget_bytes": 10**6}, {"score": "uniform"}])
def test_a_resumed_optimizer_has_the_ranks_of_the_checkpoint(settings: dict[str, Any]) -> None:
    """Not those that trained weights would be given; then it goes on bit for bit, with schedulers as before."""
    model = Model()
    optimizer = create(model)
    run_steps(model, optimizer, 0, 4)
    with torch.no_grad():
        model.steep.copy_(torch.eye(9, 6))
        model.flat[:, 1:] = 0
    assert create(model).ranks != optimizer.ranks
    saved = pickle.loads(pickle.dumps((model.state_dict(), optimizer.state_dict())))
    twin = Model(seed=1)
    twin.load_state_dict(saved[0])
    resumed = create(twin, **settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(resumed, lambda step: 1.0)
    resumed.load_state_dict(copy.deepcopy(saved[1]))
    assert resumed.ranks == optimizer.ranks
    assert optim.state_bytes(resumed) == optim.layout_bytes(resumed)
    run_steps(model, optimizer, 4, STEPS)
    run_steps(twin, resumed, 4, STEPS)
    scheduler.step()
    assert_equal(everything(twin, resumed), everything(model, optimizer))


def test_copies_know_their_ranks() -> None:
    model = Model()
    optimizer = create(model)
    run_steps(model, optimizer, 0, 2)
    twin, copied = copy.deepcopy((model, optimizer))
    assert copied.ranks == optimizer.ranks
    run_steps(model, optimizer, 2, STEPS)
    run_steps(twin, copied, 2, STEPS)
    assert_equal(everything(twin, copied), everything(model, optimizer))


def spoilt(saved: dict[str, Any]) -> list[dict[str, Any]]:
    """With another basis, without one, and with a moment of another rank than the settings say."""
    basis, missing, shape = (copy.deepcopy(saved) for _ in range(3))
    for group in basis["param_groups"]:
        group["basis"] = "svd" if group["basis"] == "subspace" else group["basis"]
    low = next(i for group in saved["param_groups"] if group["basis"] == "subspace" and group["role"] == "matrix"
               for i in group["params"])  # fmt: skip
    del missing["state"][low]["basis"]
    shape["state"][low]["exp_avg"] = torch.zeros(2, 1)
    return [basis, missing, shape]


def test_a_checkpoint_that_does_not_fit_changes_nothing() -> None:
    model, twin = Model(), Model(seed=3)
    optimizer, other = create(model), create(twin, rank=2)
    run_steps(model, optimizer, 0, 2)
    run_steps(twin, other, 0, 2)
    assert other.ranks != optimizer.ranks
    before, ranks = everything(model, optimizer), optimizer.ranks
    for saved in spoilt(other.state_dict()):
        with pytest.raises(ValueError, match=r"it was written |state means something else"):
            optimizer.load_state_dict(saved)
        assert optimizer.ranks == ranks
        assert_equal(everything(model, optimizer), before)


def test_a_checkpoint_of_ranks_that_changed_is_refused_by_name() -> None:
    """It counted the steps of the model in every matrix."""
    model = Model()
    optimizer = create(model)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["model_step"] = torch.tensor(3.0)
    with pytest.raises(ValueError, match=r"by an earlier version of WeLoreAdamW.*load the weights alone"):
        optimizer.load_state_dict(saved)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_two_ranks_loads_in_one_process(tmp_path: Any) -> None:
    """With torch.distributed.checkpoint alone, as the class says."""

    def save() -> dict[str, int]:
        model = Model()
        shard(model, 1)
        optimizer = create(model)
        run_steps(model, optimizer, 0, 4)
        files = {"optim": get_optimizer_state_dict(model, optimizer), "model": model.state_dict()}
        dcp.save(files, checkpoint_id=tmp_path)
        return optimizer.ranks

    ranks, _ = run_distributed(save, 2)
    model, plain = Model(seed=5), Model()
    optimizer = create(model, ranks=ranks)
    state = {"optim": get_optimizer_state_dict(model, optimizer), "model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    set_optimizer_state_dict(model, optimizer, state["optim"])
    assert optimizer.ranks == ranks
    run_steps(model, optimizer, 4, STEPS)
    expected = create(plain)
    run_steps(plain, expected, 0, STEPS)
    assert_equal(everything(model, optimizer), everything(plain, expected), 1e-10)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "entropy"}, r"^score='entropy'; expected one of minmax, "),
        ({"basis": "nothing"}, r"basis='nothing'"),
        ({"residual": "apolo"}, r"^residual='apolo'; did you mean"),
        ({"budget_bytes": 0}, r"^budget_bytes=0; expected a whole number >= 1 or None$"),
        ({"budget_bytes": 1e6}, r"^budget_bytes=1000000\.0; expected a whole"),
        ({"multiple": 0}, r"^multiple=0; expected a whole number >= 1$"),
        ({"floor": True}, r"^floor=True; expected a whole number >= 1$"),
        ({"rank": 9}, r"^rank=9 exceeds min\(m, n\)=8 for 'flat'"),
        ({"budget_bytes": 100}, r"^a budget of 100 is too small: the least ranks cost .*; raise budget_bytes"),
        ({"rank": 1, "floor": 4}, r"^a budget of .* is too small.*lower floor"),
        ({"ranks": {**dict.fromkeys(SHAPES, 2), "d": 2}}, r"^ranks has an entry for 'd', which is no matrix"),
        ({"ranks": {"flat": 2, "wide": 2}}, r"^ranks has no entry for 'steep'; expected one for every matrix"),
        ({"ranks": dict.fromkeys(SHAPES, 6)}, r"^rank=6 exceeds min\(m, n\)=5 for 'stack'"),
        ({"ranks": dict.fromkeys(SHAPES, 0)}, r"^rank=0 for 'flat' of shape \(12, 8\); expected a whole number"),
        ({"ranks": dict.fromkeys(SHAPES)}, r"^rank=None for 'flat'; expected a whole number"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create(Model(), **settings)


@pytest.mark.parametrize("argument", ["source", "reallocate_every", "average_steps", "hysteresis"])
def test_what_chose_ranks_while_training_is_no_argument_any_more(argument: str) -> None:
    with pytest.raises(ValueError, match=f"optimizer 'welore_adamw' takes no argument '{argument}'"):
        optim.create("welore_adamw", Model(), **{argument: 1})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    model = Model()
    with torch.no_grad():
        model.wide[0, 0] = value
    for make in (create, ranks_from_weights):
        with pytest.raises(ValueError, match=r"^'wide' holds numbers that are not finite; expected weights"):
            make(model)
    assert create(model, score="uniform").ranks["wide"] == 3


def test_without_weights_there_are_no_ranks_to_train_with() -> None:
    """Bytes are predicted; a step, or anything else that would need the state, says what to do."""
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match=r"^'flat' has no values \(it is on meta\); expected the weights"):
        ranks_from_weights(model)
    assert set(create(model).ranks.values()) == {3}
    for settings, fits in (({}, False), ({"score": "uniform"}, True), ({"ranks": dict.fromkeys(SHAPES, 2)}, True)):
        model = Model().to("meta")
        optimizer = create(model, **settings)
        model.to_empty(device="cpu")
        model.load_state_dict(Model().state_dict())
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        if fits:
            optimizer.step()
            continue
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"^'flat' had no values .* build it when the model has its weights"):
                optimizer.step()


def test_a_model_without_matrices_has_no_rules() -> None:
    with pytest.raises(ValueError, match="the model has no parameter with role 'matrix'"):
        ranks_from_weights(nn.LayerNorm(4))
