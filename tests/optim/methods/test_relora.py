"""ReLoRA against its slow reference; what a restart keeps, and what it forgets."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from lowrank_train import optim
from lowrank_train.layers.lora import add_adapters
from lowrank_train.optim.costs.sent import weight_traffic
from lowrank_train.optim.methods.relora import ReLoRA
from tests.distributed import run_distributed
from tests.optim.models import assert_equal, gradient, laid_out_as, states, weights
from tests.optim.sharded import AllReduces
from tests.reference.relora import ReferenceReLoRA

RESTART_EVERY = 4
_B = "first.lora_B.default.weight"
STEPS = 14  # restarts after 4, 8 and 12
SETTINGS: dict[str, Any] = {"lr": 1e-2, "restart_every": RESTART_EVERY, "warmup_steps": 3, "weight_decay": 0.1}


class Block(nn.Module):
    """Two layers to adapt, one of them with a bias and rows that do not divide, beside an embedding and a norm."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, dtype=dtype)
        self.first = nn.Linear(6, 17, dtype=dtype)
        self.second = nn.Linear(17, 5, bias=False, dtype=dtype)
        self.norm = nn.LayerNorm(5, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.norm(self.second(self.first(self.embedding(tokens)).tanh()))
        return hidden


def adapted(dtype: torch.dtype = torch.float64, *, alpha: float | None = None, rank: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return add_adapters(Block(dtype), rank, layers="first|second", alpha=alpha)


def build(model: nn.Module, **arguments: Any) -> ReLoRA:
    return ReLoRA(model, **{**SETTINGS, **arguments})


def run(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for name, param in model.named_parameters():
            if param.requires_grad:
                param.grad = laid_out_as(param, gradient(name, param.shape, step).to(param.dtype))
        optimizer.step()


def factors(model: nn.Module, layer: str = "first") -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
    """A, B, W."""
    names = ("lora_A.default.weight", "lora_B.default.weight", "base_layer.weight")
    a, b, w = (model.get_parameter(f"{layer}.{name}") for name in names)
    return a, b, w


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {**weights(model), **states(model, optimizer)}


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(("alpha", "warmup_steps"), [(None, 3), (5.0, 0), (1.0, 6)])
def test_equals_reference_over_three_restarts(alpha: float | None, warmup_steps: int) -> None:
    """The layer's gradients are autograd's, the reference's its own; the draws are torch's Kaiming."""
    torch.manual_seed(0)
    rank, seed = 3, 7
    x, y = (gradient(name, torch.Size((4, size)), 0) for name, size in (("x", 9), ("y", 6)))
    model = nn.Sequential(nn.Linear(9, 6, bias=False, dtype=torch.float64))
    weight = model[0].weight.detach().numpy().copy()
    add_adapters(model, rank, layers="", alpha=alpha, seed=seed)
    settings = {**SETTINGS, "warmup_steps": warmup_steps, "betas": (0.8, 0.97), "eps": 1e-6}
    optimizer = ReLoRA(model, alpha=alpha, seed=seed, **settings)

    def draw(restart: int) -> Any:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/0/{restart}".encode()))
        empty = torch.empty(rank, 9, dtype=torch.float64)
        return nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator).numpy()

    reference = ReferenceReLoRA(weight, draw, rank, alpha=alpha or rank, **settings)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (model(x) - y).square().sum().backward()
        optimizer.step()
        reference.step(lambda H: 2 * (x.numpy() @ H.T - y.numpy()).T @ x.numpy())
        for param, expected in zip(factors(model, "0"), (reference.A, reference.B, reference.W), strict=True):
            np.testing.assert_allclose(param.detach().numpy(), expected, rtol=0, atol=1e-12)
    assert reference.restarts == 3
    assert optimizer.figures()["restarts"] == 3


def test_without_a_restart_it_is_adamw_bitwise() -> None:
    ours, theirs = adapted(torch.float32), adapted(torch.float32)
    run(ours, build(ours, restart_every=1000), 0, STEPS)
    run(theirs, optim.AdamW(optim.param_groups(theirs), lr=SETTINGS["lr"], weight_decay=0.1), 0, STEPS)
    assert_equal(weights(ours), weights(theirs))


def test_all_but_the_adapters_is_adamw_across_restarts() -> None:
    ours, theirs = adapted(), adapted()
    run(ours, build(ours), 0, STEPS)
    run(theirs, optim.AdamW(optim.param_groups(theirs), lr=SETTINGS["lr"], weight_decay=0.1), 0, STEPS)
    expected = weights(theirs)
    for name, value in weights(ours).items():
        adapter = "lora" in name or name.endswith("base_layer.weight")
        assert torch.equal(value, expected[name]) != adapter, name


def test_the_rate_of_the_adapters_rises_after_a_restart_only() -> None:
    """Adam's steps are as long as the rate while all gradients are alike."""
    model = adapted()
    optimizer = build(model, restart_every=5, warmup_steps=4, weight_decay=0.0, lr=torch.tensor(1e-2))
    adapter, other = [], []
    for step in range(10):
        before = weights(model)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
        if step != 4:  # the update of a step that ends in a restart is in W
            adapter.append((weights(model)[_B] - before[_B]).abs().max())
        other.append((weights(model)["norm.weight"] - before["norm.weight"]).abs().max())
    assert torch.stack(adapter[:8]).tolist() == pytest.approx([1e-2] * 4 + [2.5e-3, 5e-3, 7.5e-3, 1e-2])
    assert torch.stack(other).tolist() == pytest.approx([1e-2] * 10)


# ------------------------------------------------------------------------------------------------------------ a restart


@pytest.mark.parametrize("alpha", [None, 7.5])
def test_a_restart_leaves_the_outputs_and_forgets_the_rest(alpha: float | None) -> None:
    model, tokens = adapted(alpha=alpha), torch.arange(11)
    optimizer = build(model, alpha=alpha)
    run(model, optimizer, 0, RESTART_EVERY - 1)
    twin = copy.deepcopy(model)
    without = ReLoRA(twin, **{**SETTINGS, "restart_every": 1000}, alpha=alpha)
    without.load_state_dict(_with(optimizer.state_dict(), restart_every=1000))
    run(model, optimizer, RESTART_EVERY - 1, RESTART_EVERY)
    run(twin, without, RESTART_EVERY - 1, RESTART_EVERY)
    assert factors(twin)[1].any()
    torch.testing.assert_close(model(tokens), twin(tokens), rtol=0, atol=1e-13)
    for layer in ("first", "second"):
        a, b, w = factors(model, layer)
        old_a, _, old_w = factors(twin, layer)
        assert not torch.isclose(a, old_a).any()
        assert a.abs().max() <= 1 / math.sqrt(a.shape[1])
        assert not b.any()
        assert not torch.equal(w, old_w)
        for param in (a, b):
            state = optimizer.state[param]
            assert state["step"] == RESTART_EVERY
            assert not any(state[key].any() for key in ("exp_avg", "exp_avg_sq", "age"))
    assert optimizer.state[model.norm.weight]["exp_avg"].any()


def test_the_factors_train_again_after_a_restart() -> None:
    """Where A became zero with B, as published code can do, both gradients would be zero for ever."""
    model, tokens = adapted(), torch.arange(11)
    optimizer = build(model, restart_every=2)
    for step in range(6):
        optimizer.zero_grad()
        model(tokens)[:, 0].square().sum().backward()
        for layer in ("first", "second"):
            a, b, _ = factors(model, layer)
            assert b.grad.any()
            assert b.any() == a.grad.any() == (step % 2 == 1)
        optimizer.step()


def test_every_draw_is_another() -> None:
    model = adapted()
    optimizer = build(model, restart_every=1)
    draws = []
    for step in range(4):
        draws += [factors(model, layer)[0].detach()[:, :6].clone() for layer in ("first", "second")]
        run(model, optimizer, step, step + 1)
    assert all(not torch.isclose(x, y).any() for i, x in enumerate(draws) for y in draws[:i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_summed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    model = adapted(dtype, alpha=2.0)
    optimizer = build(model, alpha=2.0, restart_every=2)
    run(model, optimizer, 0, 1)
    twin = copy.deepcopy(model)
    adamw = optim.AdamW(optim.param_groups(twin), lr=SETTINGS["lr"], weight_decay=0.1)
    adamw.load_state_dict(_as_adamw(optimizer.state_dict(), adamw))
    run(model, optimizer, 1, 2)
    run(twin, adamw, 1, 2)
    a, b, w = factors(twin)
    expected = (w.float() + 2 / 3 * (b.float() @ a.float())).to(dtype)
    torch.testing.assert_close(factors(model)[2], expected, rtol=torch.finfo(dtype).eps, atol=0)
    assert (factors(model)[2] == expected).float().mean() > 0.95  # a product summed otherwise may round otherwise
    assert not torch.equal(w, expected)


# ------------------------------------------------------------------------------------------------------ state, resuming


@pytest.mark.parametrize("stop", [2, 4, 6, 9])
def test_resumes_bit_for_bit_in_the_middle_of_an_interval(stop: int) -> None:
    model = adapted()
    optimizer = build(model, seed=3)
    run(model, optimizer, 0, stop)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    run(model, optimizer, stop, STEPS)
    torch.manual_seed(1)
    again = add_adapters(Block(), 3, layers="first|second", seed=9)
    resumed = build(again, seed=3)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(again, resumed, stop, STEPS)
    assert_equal(everything(again, resumed), everything(model, optimizer))


@pytest.mark.parametrize(("key", "value"), [("alpha", 6.0), ("seed", 1), ("restart_every", 5)])
def test_a_checkpoint_of_other_settings_is_refused(key: str, value: Any) -> None:
    saved = build(adapted()).state_dict()
    model = adapted(alpha=value) if key == "alpha" else adapted()
    with pytest.raises(ValueError, match=f"the checkpoint was written with {key}="):
        build(model, **{key: value}).load_state_dict(saved)


def test_state_is_adamws_and_a_clock() -> None:
    model = adapted(torch.float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    adapters = [p for name, p in model.named_parameters() if "lora" in name]
    expected = sum(8 * p.numel() + 4 for p in trained) + 4 * len(adapters)
    assert optim.state_bytes(build(model)) == expected == optim.predicted_state_bytes("relora", model)
    assert all(not build(model).state[factors(model, layer)[2]] for layer in ("first", "second"))


# -------------------------------------------------------------------------------------------------------------- sharded


def trained(prepare: Callable[[nn.Module], None] = lambda model: None) -> dict[str, Tensor]:
    model = adapted(alpha=4.0)
    prepare(model)
    optimizer = ReLoRA(optim.param_groups(model), alpha=4.0, **SETTINGS)
    run(model, optimizer, 0, STEPS)
    return everything(model, optimizer)


def shard(model: nn.Module) -> None:
    world_size = dist.get_world_size()
    sizes, names = ((2, 2), ("replicate", "shard")) if world_size == 4 else ((world_size,), ("shard",))
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("world_size", [2, 3, 4], ids=["2", "3", "2x2"])
def test_sharded_equals_one_process(world_size: int) -> None:
    expected = trained()
    for result in run_distributed(lambda: trained(shard), world_size):
        assert_equal(result, expected, 1e-12)


def test_a_rank_without_rows_restarts_too() -> None:
    def worker(prepare: Callable[[nn.Module], None] = shard) -> dict[str, Tensor]:
        model = adapted(rank=1)
        prepare(model)
        optimizer = build(model)
        run(model, optimizer, 0, STEPS)
        return everything(model, optimizer)

    expected = worker(lambda model: None)
    for result in run_distributed(worker, 2):
        assert_equal(result, expected, 1e-12)


def test_only_a_restart_communicates_and_only_a() -> None:
    def worker() -> list[list[int]]:
        model = adapted()
        shard(model)
        optimizer = build(model)
        seen = []
        for step in range(RESTART_EVERY + 1):
            with AllReduces() as reduces:
                run(model, optimizer, step, step + 1)
            seen.append(reduces.bytes)
        return seen

    quiet: list[list[int]] = [[]]
    restart = [[3 * 6 * 8, 3 * 17 * 8]]
    assert run_distributed(worker, 2) == [quiet * (RESTART_EVERY - 1) + restart + quiet] * 2
    optimizer = build(adapted())
    promised = [weight_traffic(optimizer, s.param, s.group, 2) for s in optimizer.slots()]
    assert sum(traffic.step_bytes for traffic in promised) == 0
    assert sum(traffic.refresh_bytes for traffic in promised) == sum(restart[0])


@pytest.mark.parametrize("kind", ["lora_A", "lora_B", "base_layer"])
def test_layers_sharded_within_their_rows_are_refused_at_once(kind: str) -> None:
    """Before or after the optimizer is made; not at the first restart, when many steps would be lost."""

    def worker() -> None:
        for before in (True, False):
            model = add_adapters(nn.Sequential(nn.Linear(6, 4)), 2, layers="")
            columns = {param for name, param in model.named_parameters() if kind in name and param.ndim == 2}
            optimizer = None if before else build(model)
            fully_shard(
                model,
                mesh=init_device_mesh("cpu", (2,)),
                shard_placement_fn=lambda param, columns=columns: Shard(int(param in columns)),
            )
            if optimizer is not None:  # as frameworks exchange them
                sharded = dict(model.named_parameters())
                for group in optimizer.param_groups:
                    group["params"] = [sharded[name] for name in group["param_names"]]
            with pytest.raises(ValueError, match=r"sharded along dimension 1; .* shard it along dimension 0"):
                run(model, optimizer or build(model), 0, 1)

    run_distributed(worker, 2)


def test_saved_on_one_process_and_resumed_on_two() -> None:
    expected = trained()
    model = adapted(alpha=4.0)
    optimizer = ReLoRA(model, alpha=4.0, **SETTINGS)
    run(model, optimizer, 0, 6)
    values, saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    def worker() -> dict[str, Tensor]:
        again = adapted(alpha=4.0)
        again.load_state_dict(values)
        shard(again)
        resumed = ReLoRA(optim.param_groups(again), alpha=4.0, **SETTINGS)
        resumed.load_state_dict(saved)
        run(again, resumed, 6, STEPS)
        return everything(again, resumed)

    for result in run_distributed(worker, 2):
        assert_equal(result, expected, 1e-12)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"restart_every": 0}, r"restart_every=0; expected a whole number >= 1"),
        ({"restart_every": 2.5}, r"restart_every=2\.5; expected a whole number >= 1"),
        ({"warmup_steps": -1}, r"warmup_steps=-1; expected a whole number >= 0"),
        ({"warmup_steps": True}, r"warmup_steps=True; expected a whole number >= 0"),
        ({"seed": -1}, r"seed=-1; expected a whole number >= 0"),
        ({"alpha": 0}, r"alpha=0; expected a number > 0, or None for the rank"),
        ({"alpha": math.inf}, r"alpha=inf; expected a number > 0"),
        ({"alpha": 6}, r"alpha=6 scales B A by 2, and the layer 'first' by 1; .*: give alpha=3$"),
        ({"lr": -1.0}, r"lr=-1\.0; expected a number >= 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(adapted(), **arguments)


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no layers with adapters.*add_adapters\(model, rank=\.\.\.\)"):
        build(Block())


def test_incomplete_adapters_are_refused() -> None:
    groups = [group for group in optim.param_groups(adapted()) if group["role"] != "frozen"]
    with pytest.raises(ValueError, match=r"'first\.lora_A\.default\.weight' came without 'first\.base_layer\.weight'"):
        ReLoRA(groups)
    nameless = [{"params": [nn.Parameter(torch.ones(2, 2))], "role": "lora_a"}]
    with pytest.raises(ValueError, match=r"'parameter 0' has role 'lora_a'; expected a name ending in"):
        ReLoRA(nameless)


def test_factors_of_a_layer_with_different_settings_are_refused() -> None:
    groups = optim.param_groups(adapted(), rules={r"first.*lora_B": {"restart_every": 7}})
    with pytest.raises(ValueError, match="'first' has restart_every=200 for A and 7 for B"):
        ReLoRA(groups)


def _with(saved: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {**saved, "param_groups": [{**group, **settings} for group in saved["param_groups"]]}


def _as_adamw(saved: dict[str, Any], adamw: torch.optim.Optimizer) -> dict[str, Any]:
    state = copy.deepcopy(saved["state"])
    for own in state.values():
        if "age" in own:
            own["step"] = own.pop("age")
    return {"state": state, "param_groups": adamw.state_dict()["param_groups"]}
