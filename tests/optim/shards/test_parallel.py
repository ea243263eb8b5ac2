"""Tensor and sequence parallelism, with and without FSDP2, DDP and ZeRO: one process's numbers, or refused by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.nn.parallel import DistributedDataParallel

from lowrank_train import optim
from tests.distributed import run_distributed
from tests.optim.models import MixedModel, assert_equal, build, gradient, prepare, tolerance, trainable, whole
from tests.tiers import only_first_quick

MATRIX_METHODS = optim.names(of_matrices=True)
OF_WHOLE_MODELS = ("sst", "relora")
"""Methods that read their parameters between steps too."""
A_FEW = ("adamw", "dct_adamw", "muon", "scale")
STEPS = 4


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and state, whole, whatever their placements."""
    found = {name: whole(param) for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        found.update({f"{name}.{key}": whole(value) for key, value in optimizer.state[param].items()})
    return found


# ------------------------------------------------------------------------------------------- every method, by placement


def mixed_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return prepare(name, MixedModel())


def placed(value: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> Tensor:
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def place(model: nn.Module, mesh: DeviceMesh, choose: Callable[[int, nn.Parameter], list[Placement]]) -> None:
    """Distribute parameters in place, as ``parallelize_module`` does."""
    for i, (name, param) in enumerate(model.named_parameters()):
        path, _, key = name.rpartition(".")
        value = placed(param.detach(), mesh, choose(i, param))
        setattr(model.get_submodule(path), key, nn.Parameter(value, requires_grad=param.requires_grad))


def gradients_with_other_placements(model: nn.Module, step: int) -> None:
    """Sums of unequal parts, whole tensors, other shards, and now and then the parameter's own."""
    for i, (name, param) in enumerate(trainable(model).items()):
        value = gradient(name, param.shape, step)
        if not isinstance(param, DTensor):
            param.grad = value
            continue
        mesh = param.device_mesh
        last, kind = mesh.ndim - 1, (i + step) % 4
        if kind == 0:
            rank, size = mesh.get_local_rank(last), mesh.size(last)
            part = value * ((rank + 1) * 2 / (size * (size + 1)))
            placements: list[Placement] = [Replicate()] * last + [Partial()]
            grad: Tensor = DTensor.from_local(part, mesh, placements, run_check=False)
        elif kind == 1:
            grad = placed(value, mesh, [Replicate()] * mesh.ndim)
        elif kind == 2:
            grad = placed(value, mesh, [Replicate()] * last + [Shard(param.ndim - 1)])
        else:
            grad = placed(value, mesh, list(param.placements))
        param.grad = grad


def stepped(name: str, arrange: Callable[[nn.Module], Any] | None = None, **settings: Any) -> dict[str, Tensor]:
    model = mixed_model(name)
    if arrange is not None:
        arrange(model)
    optimizer = build(name, model, **settings)
    for step in range(STEPS):
        gradients_with_other_placements(model, step)
        optimizer.step()
    return everything(model, optimizer)


def one_axis(name: str, model: nn.Module) -> None:
    """Rows, columns and whole, one after the other; rows where a method needs whole ones."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    by_rows = optim.find(name).layers is not None

    def choose(i: int, param: nn.Parameter) -> list[Placement]:
        if by_rows or i % 3 == 0:
            return [Shard(0)]
        return [Shard(param.ndim - 1) if i % 3 == 1 else Replicate()]

    place(model, mesh, choose)


def two_axes(name: str, model: nn.Module) -> None:
    """As FSDP2 after tensor parallelism; rows stay whole where a method needs that."""
    mesh = init_device_mesh("cpu", (2, 2))
    by_rows = optim.find(name).layers is not None

    def choose(i: int, param: nn.Parameter) -> list[Placement]:
        if name in OF_WHOLE_MODELS:
            return [Shard(0), Shard(0)]
        if param.shape[0] % 4 == 0 and (by_rows or i % 2 or param.ndim < 2):
            return [_StridedShard(0, split_factor=2), Shard(0)]
        if by_rows or param.ndim < 2:
            return [Shard(0), Replicate()]
        return [Shard(0), Shard(1)] if i % 3 else [Shard(1), Shard(0)]

    place(model, mesh, choose)


def on_one_axis() -> dict[str, dict[str, Tensor]]:
    return {name: stepped(name, lambda model, name=name: one_axis(name, model)) for name in optim.names()}


def on_two_axes() -> dict[str, dict[str, Tensor]]:
    results: dict[str, Any] = {}
    for name in optim.names():
        if name in OF_WHOLE_MODELS:
            with pytest.raises(ValueError, match=r"cannot train '.*' of shape .*sharded over several mesh axes"):
                stepped(name, lambda model, name=name: two_axes(name, model))
        else:
            results[name] = stepped(name, lambda model, name=name: two_axes(name, model))
    return results


@pytest.mark.parametrize("world_size", only_first_quick([2, 3]))
def test_gradients_with_other_placements_than_their_parameters(world_size: int) -> None:
    for results in run_distributed(on_one_axis, world_size):
        for name in optim.names():
            assert_equal(results[name], stepped(name), tolerance(name))


@pytest.mark.slow
def test_parameters_sharded_over_two_mesh_axes() -> None:
    by_rank = run_distributed(on_two_axes, 4)
    assert by_rank[0].keys() == set(optim.names()) - set(OF_WHOLE_MODELS)
    for results in by_rank:
        for name, result in results.items():
            assert_equal(result, stepped(name), tolerance(name))


def rounded_and_in_bits() -> dict[str, dict[str, Tensor]]:
    return {f"{name} {key}": low_precision(name, key, two_axes) for name, key in LOW_PRECISION}


LOW_PRECISION = [("adamw", "8bit"), ("adamw", "bfloat16"), ("dct_adamw", "8bit"), ("muon", "bfloat16")]


class Wide(nn.Module):
    """Large enough for moments in bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 160, dtype=torch.bfloat16)
        self.second = nn.Linear(160, 64, dtype=torch.bfloat16)


def low_precision(name: str, key: str, arrange: Callable[[str, nn.Module], None] | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model: nn.Module = Wide()
    if arrange is not None:
        arrange(name, model)
    settings = {"stochastic_rounding": True, "state_dtype": key}
    optimizer = build(name, optim.param_groups(model, **settings))  # type: ignore[arg-type]
    for step in range(3):
        for parameter, param in model.named_parameters():
            value = gradient(parameter, param.shape, step).to(param.dtype)
            param.grad = (
                placed(value, param.device_mesh, list(param.placements)) if isinstance(param, DTensor) else value
            )
        optimizer.step()
    return {parameter: whole(param).float() for parameter, param in model.named_parameters()}


def test_rounding_and_bits_on_two_mesh_axes_are_those_of_one_process() -> None:
    for results in run_distributed(rounded_and_in_bits, 4):
        for name, key in LOW_PRECISION:
            # sums in another order may round a number to its neighbour
            assert_equal(results[f"{name} {key}"], low_precision(name, key, None), 2e-3)


# ---------------------------------------------------------------------------------------------------------- plain loops


class Network(nn.Module):
    """A block as transformers have it; sizes that 3 ranks do not divide, or that 4 do."""

    def __init__(self, vocabulary: int, inner: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 8)
        self.before = nn.LayerNorm(8)
        self.up = nn.Linear(8, inner)
        self.down = nn.Linear(inner, 8)
        self.after = nn.LayerNorm(8)
        self.head = nn.Linear(8, vocabulary, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.after(x + self.down(torch.tanh(self.up(self.before(x))))))


SIZES = {2: (10, 12), 3: (11, 10), 4: (12, 16)}


def network(size: int) -> nn.Module:
    torch.manual_seed(0)
    return Network(*SIZES[size]).double()


def parallelize(model: nn.Module, mesh: DeviceMesh, *, sequence: bool) -> None:
    """torch's own tensor parallelism, with sequence parallelism or without."""
    x = Shard(0) if sequence else Replicate()
    plan: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=x, use_local_output=False),
        "up": ColwiseParallel(input_layouts=x, use_local_output=False),
        "down": RowwiseParallel(output_layouts=x, use_local_output=False),
        "head": ColwiseParallel(input_layouts=x, output_layouts=Replicate()),
        "before": SequenceParallel(sequence_dim=0, use_local_output=False),
        "after": SequenceParallel(sequence_dim=0, use_local_output=False),
    }
    parallelize_module(model, mesh, plan)


def loop(model: nn.Module, optimizer: torch.optim.Optimizer, size: int, *, attached: bool = False) -> list[float]:
    losses = []
    for step in range(STEPS):
        tokens = (torch.arange(12) * (step + 2)) % SIZES[size][0]
        target = gradient("target", torch.Size((12, SIZES[size][0])), step)
        loss = (model(tokens) - target).square().mean()
        loss.backward()
        optimizer.step()
        if not attached:
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def arranged(kind: str) -> nn.Module:
    """The model under some kind of parallelism, for as many ranks as there are."""
    size = dist.get_world_size()
    model = network(size)
    if kind == "DDP":
        return DistributedDataParallel(model)
    if kind == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    elif kind in ("TP", "SP"):
        parallelize(model, init_device_mesh("cpu", (size,)), sequence=kind == "SP")
    else:
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "tensor"))
        parallelize(model, mesh["tensor"], sequence=kind.startswith("SP"))
        fully_shard([model.up, model.down], mesh=mesh["data"])  # type: ignore[arg-type]
        fully_shard(model, mesh=mesh["data"])
    return model


ATTACHED: dict[str, dict[str, Any]] = {
    "adamw": {"clip": "parameter"},
    "dct_adamw": {"clip": "parameter"},
    "low_rank_adamw": {"clip": "global"},
}


def attached_loop(model: nn.Module, name: str, size: int) -> tuple[list[float], list[float]]:
    """Losses and gradient norms, clipped."""
    settings = {"residual": "drop"} if name == "low_rank_adamw" else {}
    optimizer = build(name, model, **settings)
    handle = optim.attach_to_backward(model, optimizer, max_norm=0.5, **ATTACHED[name])
    losses = loop(model, optimizer, size, attached=True)
    assert handle.grad_norm is not None
    return losses, [float(handle.grad_norm)]


def loops(kinds: tuple[str, ...]) -> dict[tuple[str, str], Any]:
    size = dist.get_world_size()
    results: dict[tuple[str, str], Any] = {}
    for kind in kinds:
        for name in MATRIX_METHODS if kind.startswith("SP") else A_FEW:
            model = arranged(kind)
            optimizer = build(name, model)
            losses = loop(model, optimizer, size)
            results[kind, name] = losses, {k: whole(p) for k, p in model.named_parameters()}
        for name in ATTACHED if kind != "DDP" else ():
            results[f"{kind}, attached", name] = attached_loop(arranged(kind), name, size)
    return results


@pytest.mark.parametrize(
    ("kinds", "world_size"),
    only_first_quick(
        [
            (("TP",), 2),
            (("SP", "DDP"), 2),
            (("TP", "SP", "DDP", "FSDP2"), 3),
            (("TP + FSDP2", "SP + FSDP2"), 4),
        ]
    ),
)
def test_plain_loops_are_those_of_one_process(kinds: tuple[str, ...], world_size: int) -> None:
    by_rank = run_distributed(loops, world_size, kinds)
    alone: dict[str, tuple[list[float], dict[str, Tensor]]] = {}
    for name in MATRIX_METHODS:
        model = network(world_size)
        optimizer = build(name, model)
        alone[name] = loop(model, optimizer, world_size), {k: whole(p) for k, p in model.named_parameters()}
    fused = {name: attached_loop(network(world_size), name, world_size) for name in ATTACHED}
    for results in by_rank:
        for (kind, name), result in results.items():
            allowed = 100 * tolerance(name)  # the network amplifies what is allowed a step
            if kind.endswith("attached"):
                assert result[0] == pytest.approx(fused[name][0], abs=allowed), (kind, name)
                assert result[1] == pytest.approx(fused[name][1], abs=allowed), (kind, name)
                continue
            losses, weights = result
            assert losses == pytest.approx(alone[name][0], abs=allowed), (kind, name)
            assert_equal({k.removeprefix("module."): v for k, v in weights.items()}, alone[name][1], allowed)


# ------------------------------------------------------------------------------------------ checkpoints, ZeRO, refusals


def saved_and_loaded(folder: str) -> None:
    """Of tensor parallelism with FSDP2: saved on four ranks, loaded on four, and (by the parent) on one."""
    for name in ("adamw", "dct_adamw", "muon"):
        model = arranged("TP + FSDP2")
        optimizer = build(name, model)
        loop(model, optimizer, 4)
        states = get_state_dict(model, optimizer)
        dcp.save({"model": states[0], "optim": states[1]}, checkpoint_id=f"{folder}/{name}")
        expected = everything(model, optimizer)
        model = arranged("TP + FSDP2")
        optimizer = build(name, model)
        load(model, optimizer, f"{folder}/{name}")
        assert_equal(everything(model, optimizer), expected)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: str) -> None:
    states = get_state_dict(model, optimizer)
    loaded = {"model": states[0], "optim": states[1]}
    dcp.load(loaded, checkpoint_id=checkpoint)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"])


@pytest.mark.slow
def test_checkpoints_of_two_mesh_axes_load_on_one_process(tmp_path: Path) -> None:
    run_distributed(saved_and_loaded, 4, str(tmp_path))
    for name in ("adamw", "dct_adamw", "muon"):
        model, alone = network(4), network(4)
        optimizer = build(name, model)
        load(model, optimizer, f"{tmp_path}/{name}")
        other = build(name, alone)
        loop(alone, other, 4)
        assert_equal(everything(model, optimizer), everything(alone, other), 100 * tolerance(name))


def hugging_face(folder: str) -> dict[str, dict[str, Tensor]]:
    """Weights after some steps; with several ranks under the model's own plan of tensor parallelism."""
    from transformers import LlamaForCausalLM

    results = {}
    size = dist.get_world_size()
    for name in (*A_FEW, "apollo"):
        plan: dict[str, Any] = {}
        if size > 1:
            os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE=str(size))
            plan = {"tp_plan": "auto", "device_mesh": init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))}
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, **plan)
        if size > 1:
            assert isinstance(model.model.layers[0].mlp.up_proj.weight, DTensor)
        optimizer = build(name, model)
        for step in range(STEPS):
            tokens = (torch.arange(24).view(2, 12) * (step + 2)) % 31
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results[name] = {key: whole(param) for key, param in model.named_parameters()}
    return results


@pytest.mark.slow
def test_tp_plan_of_hugging_face(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM  # before the forks, which inherit it

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).double().save_pretrained(tmp_path)
    (alone,) = run_distributed(hugging_face, 1, str(tmp_path))
    for results in run_distributed(hugging_face, 2, str(tmp_path)):
        for name, weights in results.items():
            # the loss is computed in float32, whose rounding a gradient near zero amplifies
            assert_equal(weights, alone[name], 1e-4)


def zero() -> dict[str, list[float]]:
    """torch's ZeroRedundancyOptimizer around plain parameters, as its documentation writes it."""
    results = {}
    for name in ("adamw",):
        model = network(2)
        wrapped = DistributedDataParallel(model)
        optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), optimizer_class=optim.find(name), lr=1e-2)
        results[name] = loop(wrapped, optimizer, 2)
    for name in set(MATRIX_METHODS) - {"adamw"}:
        model = network(2)
        with pytest.raises(ValueError, match="param_groups"):
            ZeroRedundancyOptimizer(model.parameters(), optimizer_class=optim.find(name), lr=1e-2)
    return results


def test_zero_redundancy_optimizer() -> None:
    for results in run_distributed(zero, 2):
        for name, losses in results.items():
            model = network(2)
            expected = loop(model, optim.create(name, list(model.parameters()), lr=1e-2), 2)  # type: ignore[arg-type]
            assert losses == pytest.approx(expected, abs=1e-12)


def refused() -> list[str]:
    """Before the first update, by name: pieces that cannot be gathered, points that are cut, mixed gradients."""
    told = []
    mesh = init_device_mesh("cpu", (2, 2))
    uneven = nn.Sequential(nn.Linear(8, 6))
    place(uneven, mesh, lambda i, param: [_StridedShard(0, split_factor=2), Shard(0)])
    with pytest.raises(ValueError, match=r"'0.weight' of shape \(6, 8\).*2 x 2 ranks.*different lengths") as caught:
        optim.create("dct_adamw", uneven, lr=1e-2)
    told.append(str(caught.value))
    optim.create("adamw", uneven, lr=1e-2)  # number by number

    model = prepare("riemannian_adamw", nn.Sequential(nn.Linear(8, 8)), rank=3)
    place(model, mesh, lambda i, param: [Shard(0), Shard(param.ndim - 1)])
    with pytest.raises(ValueError, match=r"'0.weight'.* holds a point per row and is sharded along dimension 1"):
        optim.create("riemannian_adamw", model, lr=1e-2)

    model = nn.Sequential(nn.Linear(8, 8))
    place(model, mesh, lambda i, param: [Replicate(), Partial()])
    with pytest.raises(ValueError, match="its value is a partial sum"):
        optim.create("dct_adamw", model, lr=1e-2)
    return told


def test_what_is_refused_names_the_parameter() -> None:
    run_distributed(refused, 4)
