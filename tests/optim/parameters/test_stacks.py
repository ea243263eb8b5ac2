"""A weight [..., m, n] is a stack of matrices: every optimizer trains it as it trains those one by one."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_train import optim
from lowrank_train.optim.arguments.caller import CoverageWarning
from lowrank_train.optim.costs.sent import Communication, communicated_bytes
from lowrank_train.optim.shards.layout import local
from tests.distributed import run_distributed
from tests.optim.models import all_whole, assert_equal, beside_layers, build, gradient, laid_out_as, tolerance
from tests.tiers import only_first_quick

pytestmark = pytest.mark.filterwarnings("ignore:the gradient of .* is zero")
STEPS = 7
SMALL = {"tall": (4, 10, 6), "wide": (4, 5, 9), "turned": (3, 6, 8), "square turned": (2, 5, 5), "two": (2, 3, 6, 4)}
WITH_ONE = {**SMALL, "alone": (1, 6, 4)}
"""A stack of one matrix counts its steps in one number, as a matrix does, but of another shape."""
LARGE = {"tall": (2, 80, 64), "turned": (2, 60, 72)}
STACKS = optim.names()
IN_BITS = [name for name in STACKS if not optim.find(name).works_between_steps]


def layout(name: str) -> str:
    return "in,out" if "turned" in name and "[" not in name else "out,in"


def groups_of(params: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """A group for each parameter."""
    return [
        {"params": [(name, param)], "role": "matrix", "weight_layout": layout(name)} for name, param in params.items()
    ]


def stacks_of(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(gradient(name, torch.Size(shape), -1).to(dtype)) for name, shape in shapes.items()}


def indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [tuple(index) for index in torch.ones(shape[:-2]).nonzero().tolist()]


def apart(tensors: dict[str, Any]) -> dict[str, Tensor]:
    """The matrices of stacks, (out, in), by the names that an optimizer calls them."""
    return {
        f"{name}[{', '.join(map(str, index))}]": (tensor[index].mT if "turned" in name else tensor[index]).contiguous()
        for name, tensor in tensors.items()
        for index in indices(tensor.shape)
    }


def gradients(stacks: dict[str, nn.Parameter], step: int) -> dict[str, Tensor | None]:
    """One expert is not used in the first steps, no expert of one stack in another."""
    found: dict[str, Tensor | None] = {}
    for name, param in stacks.items():
        value = gradient(name, param.shape, step).to(param.dtype)
        if step < 2:
            value[-1] = 0
        found[name] = None if (name, step) == ("tall", 4) else value
    return found


def trained(name: str, params: dict[str, nn.Parameter], steps: range, optimizer: Any = None, **arguments: Any) -> Any:
    """The optimizer after these steps, from the gradients of the stacks whether or not they are taken apart."""
    optimizer = optimizer or quietly(lambda: build(name, beside_layers(name, groups_of(params)), **arguments))
    for step in steps:
        for key, param in params.items():
            stack, _, index = key.partition("[")
            value = gradients({stack: STACK_OF[stack]}, step)[stack] if index else gradients(params, step)[key]
            if value is not None and index:
                value = value[tuple(map(int, index[:-1].split(", ")))]
                value = value.mT.contiguous() if "turned" in stack else value
            param.grad = None if value is None else laid_out_as(param, value.to(param.dtype))
        optimizer.step()
    return optimizer


STACK_OF: dict[str, nn.Parameter] = {}
"""The whole stacks that the matrices of a test belong to."""


def quietly(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        return make()


def assert_close(value: Tensor, expected: Tensor, exact: float, label: str) -> None:
    """To a tolerance in float64; of numbers rounded to codes or to bfloat16 all but a few, which fell the other way."""
    difference = (value.double() - expected.double()).abs()
    if value.dtype == torch.float64:
        assert difference.max() <= exact, label
    else:
        assert (difference > 1e-4).double().mean() < 0.02, label


KINDS = {
    "float64": (SMALL, torch.float64, {}),
    "8bit": (LARGE, torch.float32, {"state_dtype": "8bit"}),
    "4bit": (LARGE, torch.float32, {"state_dtype": "4bit"}),
    "stochastic": (SMALL, torch.bfloat16, {"stochastic_rounding": True}),
    "offloaded": (SMALL, torch.float64, {"offload_state": True}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STACKS)
def test_a_stack_is_trained_as_its_matrices_are_one_by_one(name: str, kind: str) -> None:
    shapes, dtype, arguments = KINDS[kind]
    cls = optim.find(name)
    if {"offload_state", "state_dtype"} & arguments.keys() and cls.works_between_steps:
        pytest.skip("works on its state between steps")
    if ("matrix" not in cls.updates and "stochastic_rounding" in arguments) or name == "adamw":
        pytest.skip("element by element: the noise is that of the whole weight")
    stacks = stacks_of(shapes, dtype)
    STACK_OF.clear()
    STACK_OF.update(stacks)
    one_by_one = {key: nn.Parameter(value.detach().clone()) for key, value in apart(stacks).items()}
    together = trained(name, stacks, range(STEPS), **arguments)
    single = trained(name, one_by_one, range(STEPS), **arguments)
    exact = tolerance(name)
    for key, value in apart({key: value.detach() for key, value in stacks.items()}).items():
        assert_close(value, one_by_one[key], exact, key)
    for stack, param in stacks.items():
        assert not torch.equal(param, stacks_of(shapes, dtype)[stack])
        group = together.param_groups[0] | {"weight_layout": layout(stack)}
        if not together.update_of(group).takes_apart(param, group):
            continue
        for key, value in together.state[param].items():
            for index in indices(param.shape):
                own = single.state[one_by_one[f"{stack}[{', '.join(map(str, index))}]"]][key]
                assert_close(value[index], own, exact, f"{stack}.{key}")
    assert optim.state_bytes(together) == optim.layout_bytes(together)


# ------------------------------------------------------------------------------------------------------------- sharded


class Collectives(TorchDispatchMode):
    """Names of the collectives that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def sharded_states(dim: int, dtype: torch.dtype, arguments: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = {}
    for name in IN_BITS if arguments else STACKS:
        stacks = {
            key: nn.Parameter(distribute_tensor(value.detach(), mesh, [Shard(dim)], src_data_rank=None))
            for key, value in stacks_of(SMALL if not arguments else LARGE, dtype).items()
        }
        optimizer = trained(name, stacks, range(STEPS - 1), **arguments)
        with Collectives() as calls:
            trained(name, stacks, range(STEPS - 1, STEPS), optimizer)
        if optim.find(name).layers is None and dim == 0:
            assert calls.names == [], name
            predicted = optim.layout_bytes(optimizer, world_size=dist.get_world_size(), shard=dist.get_rank())
            assert optim.state_bytes(optimizer) == predicted, name
        of_state = {f"{key}.{k}": value for key, p in stacks.items() for k, value in optimizer.state[p].items()}
        results[name] = all_whole({**stacks, **of_state})
    return results


def whole_states(name: str, dtype: torch.dtype, arguments: dict[str, Any]) -> dict[str, Tensor]:
    stacks = stacks_of(SMALL if not arguments else LARGE, dtype)
    optimizer = trained(name, stacks, range(STEPS), **arguments)
    of_state = {f"{key}.{k}": value for key, p in stacks.items() for k, value in optimizer.state[p].items()}
    return all_whole({**stacks, **of_state})


@pytest.mark.parametrize("dim", only_first_quick([0, 1, 2]))
def test_sharded_along_any_dimension_equals_one_process(dim: int) -> None:
    """Along the first, of 4 matrices on 3 ranks one has none; of 5 rows or columns a rank has 1."""
    expected = {name: whole_states(name, torch.float64, {}) for name in STACKS}
    for results in run_distributed(sharded_states, 3, dim, torch.float64, {}):
        for name in STACKS:
            assert_equal(results[name], expected[name], tolerance(name))


def test_quantised_stacks_sharded_equal_one_process() -> None:
    arguments = {"state_dtype": "8bit"}
    for results in run_distributed(sharded_states, 2, 0, torch.float32, arguments):
        for name in IN_BITS:
            expected = whole_states(name, torch.float32, arguments)
            for key, value in results[name].items():
                assert_close(value, expected[key], 1e-5, f"{name} {key}")


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_resumes_bit_for_bit(name: str) -> None:
    stacks = stacks_of(WITH_ONE, torch.float64)
    optimizer = trained(name, stacks, range(4))
    copies = {key: nn.Parameter(value.detach().clone()) for key, value in stacks.items()}
    resumed = quietly(lambda: build(name, beside_layers(name, groups_of(copies))))
    resumed.load_state_dict(optimizer.state_dict())
    trained(name, stacks, range(4, STEPS), optimizer)
    trained(name, copies, range(4, STEPS), resumed)
    for key, param in stacks.items():
        assert torch.equal(param, copies[key])
        for k, value in optimizer.state[param].items():
            assert torch.equal(value, resumed.state[copies[key]][k]), (key, k)


RESHARDED = ("dct_adamw", "fira", "muon", "scale")


def sharded_model(name: str) -> tuple[nn.Module, optim.MatrixOptimizer]:
    model, mesh = nn.Module(), init_device_mesh("cpu", (dist.get_world_size(),))
    for key, value in stacks_of(SMALL, torch.float64).items():
        shards = distribute_tensor(value.detach(), mesh, [Shard(0)], src_data_rank=None)
        model.register_parameter(key, nn.Parameter(shards))
    return model, build(name, groups_of(dict(model.named_parameters())))


def test_a_checkpoint_of_stacks_is_loaded_on_another_number_of_ranks(tmp_path: Path) -> None:
    """With each matrix's own clock, of which every rank holds those of its matrices."""

    def save() -> None:
        for name in RESHARDED:
            model, optimizer = sharded_model(name)
            trained(name, dict(model.named_parameters()), range(4), optimizer)
            model_state = {key: param.detach() for key, param in model.named_parameters()}
            files = {"model": model_state, "optim": get_optimizer_state_dict(model, optimizer)}
            dcp.save(files, checkpoint_id=str(tmp_path / name))

    def load() -> dict[str, dict[str, Tensor]]:
        found = {}
        for name in RESHARDED:
            model, optimizer = sharded_model(name)
            model_state = {key: param.detach() for key, param in model.named_parameters()}
            files = {"model": model_state, "optim": get_optimizer_state_dict(model, optimizer)}
            dcp.load(files, checkpoint_id=str(tmp_path / name))
            set_optimizer_state_dict(model, optimizer, files["optim"])
            params = dict(model.named_parameters())
            trained(name, params, range(4, STEPS), optimizer)
            of_state = {f"{key}.{k}": value for key, p in params.items() for k, value in optimizer.state[p].items()}
            found[name] = all_whole({**params, **of_state})
        return found

    run_distributed(save, 3)
    for found in run_distributed(load, 2):
        for name in RESHARDED:
            assert_equal(found[name], whole_states(name, torch.float64, {}), tolerance(name))


def in_backward(
    name: str, steps: int, passes: int, *, attached: bool, dim: int | None, clip: bool
) -> dict[str, Tensor]:
    torch.manual_seed(3)
    model = nn.Module()
    for key, value in stacks_of(SMALL, torch.float64).items():
        if dim is not None:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            value = nn.Parameter(distribute_tensor(value.detach(), mesh, [Shard(dim)], src_data_rank=None))
        model.register_parameter(key, value)
    params = dict(model.named_parameters())
    optimizer = quietly(lambda: build(name, beside_layers(name, groups_of(params))))
    if attached:
        beside = [group for group in optimizer.param_groups if group["role"] != "matrix"]
        for i, param in enumerate(param for group in beside for param in group["params"]):
            model.register_parameter(f"beside{i}", param)
        optim.attach_to_backward(
            model, optimizer, accumulation_steps=passes, max_norm=2.0 if clip else None, clip="parameter"
        )
    for step in range(steps):
        for i in range(passes):
            loss = torch.zeros((), dtype=torch.float64)
            for key, param in params.items():
                wanted = laid_out_as(param, gradient(key, param.shape, step * passes + i))
                loss = loss + (local(param) * local(wanted)).sum()
            loss.backward()
        if clip and not attached:
            for param in params.values():
                nn.utils.clip_grad_norm_([param], 2.0)
        optimizer.step()
        optimizer.zero_grad()
    return all_whole(params)


@pytest.mark.parametrize("name", only_first_quick(STACKS, 4))
def test_updates_fused_into_backward_are_those_of_the_loop(name: str) -> None:
    once = {attached: in_backward(name, 4, 1, attached=attached, dim=None, clip=False) for attached in (False, True)}
    assert_equal(once[True], once[False])
    assert_equal(in_backward(name, 2, 1, attached=True, dim=None, clip=True),
                 in_backward(name, 2, 1, attached=False, dim=None, clip=True), 1e-7)  # fmt: skip
    # directions come from the first of two passes, so the first update alone has those of the loop
    if "refresh_interval" not in inspect.signature(optim.find(name)).parameters:
        assert_equal(in_backward(name, 2, 2, attached=True, dim=None, clip=False),
                     in_backward(name, 2, 2, attached=False, dim=None, clip=False), 1e-12)  # fmt: skip


def test_fused_into_backward_a_rank_without_matrices_takes_part() -> None:
    def worker(dim: int) -> dict[str, dict[str, Tensor]]:
        return {name: in_backward(name, 3, 2, attached=True, dim=dim, clip=True) for name in ("dct_adamw", "muon")}

    for results in run_distributed(worker, 3, 0):
        for name, found in results.items():
            assert_equal(found, in_backward(name, 3, 2, attached=True, dim=None, clip=True), 1e-10)


def test_shards_are_advised_along_the_stack_and_cost_no_communication() -> None:
    groups = groups_of(stacks_of(SMALL, torch.float64))
    for name in STACKS:
        assert optim.find(name).shard_dim("matrix", (4, 10, 6), 2) == 0
        sent, least = (sent_by(name, beside_layers(name, each)) for each in (groups, groups[:1]))
        assert (sent.step_payload, sent.refresh_payload) == (least.step_payload, least.refresh_payload), name
        if optim.find(name).layers is None:
            assert sent.refresh_payload == 0, name


def sent_by(name: str, groups: list[dict[str, Any]]) -> Communication:
    return quietly(lambda: communicated_bytes(name, groups, world_size=2))
