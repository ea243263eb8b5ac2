"""Built before the model is sharded, moved, converted or resized, an optimizer trains what the model has then."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from lowrank_train import optim
from tests.distributed import run_distributed
from tests.optim.models import (
    assert_equal,
    build_without_weights,
    gradient,
    laid_out_as,
    prepare,
    states,
    tiny_llama,
    trainable,
    weights,
)
from tests.tiers import only_first_quick

every_name = pytest.mark.parametrize("name", optim.names())


class Network(nn.Module):
    """Runs; a vocabulary, a tall and a wide matrix, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.inner = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.inner(self.embedding(tokens))))


def new_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return prepare(name, Network())


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = (torch.arange(6) * (step + 2)) % 7
    target = gradient("target", torch.Size((6, 11)), step).to(next(model.parameters()).dtype)
    return (model(tokens) - target).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int = 0, last: int = 4) -> None:
    """A plain loop."""
    for step in range(first, last):  # with new directions at step 3
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {**weights(model), **states(model, optimizer)}


def shard(model: nn.Module) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.inner, mesh=mesh)  # type: ignore[arg-type]
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def fill(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Whole values into the (sharded) parameters, as a loader of weights does."""
    for key, param in model.named_parameters():
        param.copy_(laid_out_as(param, values[key]))


# ------------------------------------------------------------------------------------------------------------- replaced


DEFERRED = optim.names()[::2]
"""For these the state is deferred in between."""
ZEROED = optim.names()[::3]
"""For these the loop begins with zero_grad."""


def built_around_sharding(name: str) -> dict[str, dict[str, Tensor]]:
    """What training gives, by when the optimizer was built."""
    initial = {key: param.detach() for key, param in new_model(name).named_parameters()}
    results = {}

    def finish(label: str, model: nn.Module, optimizer: optim.MatrixOptimizer) -> None:
        train(model, optimizer)
        results[label] = everything(model, optimizer)

    model = new_model(name)
    shard(model)
    finish("after", model, build_without_weights(name, model))

    model = new_model(name)
    optimizer = build_without_weights(name, model)
    if name in DEFERRED:
        optimizer.defer_state()
    shard(model)
    if name in ZEROED:
        optimizer.zero_grad()
    finish("before", model, optimizer)

    model = new_model(name)
    shard(model)
    loss_of(model, 0)  # an evaluation leaves the root gathered
    finish("while gathered", model, build_without_weights(name, model))

    for label in ("meta, shard, build, to_empty", "meta, build, shard, to_empty"):
        model = new_model(name).to("meta")
        made = []
        for action in label.split(", ")[1:]:
            if action == "build":
                made.append(build_without_weights(name, model))
            elif action == "shard":
                shard(model)
            else:
                model.to_empty(device="cpu")
        fill(model, initial)
        finish(label, model, made[0])
    moved = results["after"]
    results["moved"] = {key: moved[key] != initial[key] for key in trainable(new_model(name))}
    return results


@pytest.mark.slow
def test_before_sharding_is_after_sharding() -> None:
    """Bit for bit, weights and state, in a plain loop: nobody but the optimizer looks the parameters up."""
    for by_name in run_distributed(lambda: {name: built_around_sharding(name) for name in optim.names()}, 2):
        for name, results in by_name.items():
            after = results.pop("after")
            moved = results.pop("moved")
            assert len(results) == 4
            assert all(differs.any() for differs in moved.values()), name
            for label, result in results.items():
                try:
                    assert_equal(result, after)
                except AssertionError as error:
                    raise AssertionError(f"{name}, {label}: {error}") from error


def plain_parameters() -> list[str]:
    """Without names nothing can be found; what must not be is silence."""
    told = []
    model = new_model("adamw")
    unnamed = [
        optim.AdamW(model.parameters(), lr=1e-2),
        optim.DCTAdamW([{"params": list(model.inner.parameters())[:1], "role": "matrix"}], lr=1e-2, rank=2),
    ]
    shard(model)
    for optimizer in unnamed:
        optimizer.step()  # no model has gradients, so nothing is lost
    loss_of(model, 0).backward()
    for optimizer in unnamed:
        with pytest.raises(RuntimeError, match="no parameter of this optimizer has a gradient") as caught:
            optimizer.step()
        told.append(str(caught.value))
    sharded = optim.AdamW(model.parameters(), lr=1e-2)
    sharded.step()
    return told


def test_parameters_without_names_that_are_lost_are_an_error() -> None:
    for told in run_distributed(plain_parameters, 2):
        assert all("optim.param_groups(model)" in message for message in told)


def test_steps_without_gradients_are_no_error() -> None:
    """Of bare tensors, of a part of a model, of a frozen one, and where another model trains."""
    other = new_model("adamw")
    loss_of(other, 0).backward()
    bare = optim.AdamW([nn.Parameter(torch.zeros(5, 3))])
    model = new_model("adamw")
    part = optim.create("dct_adamw", model.inner, lr=1e-2)  # type: ignore[arg-type]
    unnamed = optim.AdamW(model.inner.parameters())  # type: ignore[union-attr]
    model.norm(torch.ones(8)).sum().backward()  # type: ignore[operator]
    before = weights(model)
    for optimizer in (bare, part, unnamed):
        optimizer.step()
    assert_equal(weights(model), before)


def new_head(model: nn.Module) -> None:
    head = nn.Linear(8, 11, bias=False)
    with torch.no_grad():
        head.weight.copy_(model.head.weight)  # type: ignore[union-attr, operator]
    model.head = head


def assigned(model: nn.Module) -> None:
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def through_meta(model: nn.Module) -> None:
    values = {key: param.detach().clone() for key, param in model.named_parameters()}
    model.to("meta").to_empty(device="cpu")
    fill(model, values)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "dtype": lambda model: model.double(),
    "assign": assigned,
    "to_empty": through_meta,
    "new module": new_head,
}


@every_name
def test_what_happens_to_the_model_before_the_first_step_might_have_happened_before(name: str) -> None:
    for change in CHANGES.values():
        results = []
        for early in (True, False):
            model = new_model(name)
            if early:
                change(model)
            optimizer = build_without_weights(name, model)
            if not early:
                change(model)
            train(model, optimizer)
            results.append(everything(model, optimizer))
        assert_equal(results[1], results[0])


@every_name
def test_what_happens_to_the_model_later_is_an_error_that_names_the_parameter(name: str) -> None:
    for kind, change in CHANGES.items():
        model = new_model(name)
        optimizer = build_without_weights(name, model)
        train(model, optimizer, 0, 1)
        change(model)
        before = weights(model)
        loss_of(model, 1).backward()
        message = {"dtype": r"'embedding.weight' has another dtype torch.float64 \(was torch.float32\)"}
        with pytest.raises(RuntimeError, match=message.get(kind, r"'(embedding|head).weight'.*were replaced after")):
            optimizer.step()
        assert_equal(weights(model), before)
        optimizer.zero_grad()
        optimizer.state_dict()  # what was learnt can still be saved


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_name
def test_a_model_that_moves_to_the_gpu_takes_its_state_along(name: str) -> None:
    model = new_model(name)
    optimizer = build_without_weights(name, model)
    model.cuda()
    for param in trainable(model).values():
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(value.is_cuda for state in optimizer.state.values() for key, value in state.items() if "exp" in key)
    model.cpu()
    with pytest.raises(RuntimeError, match=r"device cpu \(was cuda"):
        optimizer.step()


# -------------------------------------------------------------------------------------------------------------- resized


def llama(name: str, tied: bool) -> nn.Module:
    torch.manual_seed(0)
    return prepare(name, tiny_llama(tied=tied))


def llama_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    tokens = torch.arange(24).view(2, 12) % 11
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@every_name
@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings(name: str, tied: bool) -> None:
    """Grown and shrunk: before the first step as if built afterwards; later an error, also after a state was loaded."""
    for size in (61, 12):
        results, resized = [], []
        for early in (True, False):
            model = llama(name, tied)
            if early:
                model.resize_token_embeddings(size, mean_resizing=False)  # type: ignore[operator]
                resized.append(copy.deepcopy(model.state_dict()))
            optimizer = build_without_weights(name, model)
            if not early:
                model.resize_token_embeddings(size, mean_resizing=False)  # type: ignore[operator]
                model.load_state_dict(resized[0])  # new rows are drawn
            llama_steps(model, optimizer, 2)
            results.append(everything(model, optimizer))
        assert_equal(results[1], results[0])

    for loaded in (False, True):
        model = llama(name, tied)
        optimizer = build_without_weights(name, model)
        llama_steps(model, optimizer, 1)
        if loaded:
            saved = optimizer.state_dict()
            optimizer = build_without_weights(name, model)
            optimizer.load_state_dict(saved)
        model.resize_token_embeddings(12, mean_resizing=False)  # type: ignore[operator]
        with pytest.raises(
            RuntimeError, match=r"'model.embed_tokens.weight' has another shape \(12, 8\) \(was \(29, 8"
        ):
            llama_steps(model, optimizer, 1)


@every_name
def test_a_state_for_the_old_size_is_refused_after_resizing(name: str) -> None:
    model = llama(name, False)
    optimizer = build_without_weights(name, model)
    llama_steps(model, optimizer, 1)
    saved, other = optimizer.state_dict(), llama(name, False)
    optimizer = build_without_weights(name, other)
    other.resize_token_embeddings(12, mean_resizing=False)  # type: ignore[operator]
    if optim.find(name).updates.keys() >= {"embedding"}:  # without state nothing tells
        return
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' has shape \(29, 8\); expected \(12, 8\)"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("name", optim.names(of_matrices=True))
def test_a_matrix_that_shrinks(name: str) -> None:
    """Hyperparameters are checked again; a gradient of the old shape is refused."""
    model = new_model("adamw")
    ranked = " rank=" in optim.describe(name)
    optimizer = optim.create(name, model, lr=1e-2, **({"rank": 6} if ranked else {}))
    loss_of(model, 0).backward()
    before = weights(model)
    for linear, (rows, columns) in ((model.inner[0], (4, 8)), (model.inner[2], (8, 4))):  # type: ignore[index]
        linear.weight.data = linear.weight.data[:rows, :columns].clone()
        linear.bias.data = linear.bias.data[:rows].clone()
    with pytest.raises((ValueError, RuntimeError), match=r"'inner.0.weight'"):
        optimizer.step()
    assert torch.equal(model.embedding.weight, before["embedding.weight"])  # type: ignore[arg-type]
    optimizer = optim.create(name, model, lr=1e-2)
    with pytest.raises(RuntimeError, match=r"gradient of 'inner.0.weight' has shape \(12, 8\).*run backward\(\) again"):
        optimizer.step()


# ---------------------------------------------------------------------------------------------------------- in backward


@pytest.mark.parametrize("name", only_first_quick(optim.names(), 4))
def test_updates_in_backward_follow_the_model_too(name: str) -> None:
    tokens = torch.arange(24).view(2, 12) % 11
    results = []
    for resized in ("before", "after"):
        model = llama(name, True)
        if resized == "before":
            model.resize_token_embeddings(12, mean_resizing=False)  # type: ignore[operator]
        optimizer = build_without_weights(name, model)
        handle = optim.attach_to_backward(model, optimizer)
        if resized == "after":
            model.resize_token_embeddings(12, mean_resizing=False)  # type: ignore[operator]
        for _ in range(2):
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        results.append(everything(model, optimizer))
    assert_equal(*results)
    model.resize_token_embeddings(11, mean_resizing=False)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"'model.embed_tokens.weight' has another shape"):
        model(input_ids=tokens, labels=tokens).loss.backward()
    handle.detach()


def attached_around_sharding() -> list[str]:
    told = []
    for name in ("dct_adamw", "adamw", "muon"):
        results = []
        for order in ("shard, build, attach", "build, shard, gather, attach", "meta, shard, build, attach, fill"):
            model = new_model(name)
            values = {key: param.detach() for key, param in model.named_parameters()}
            for action in order.split(", "):
                if action == "meta":
                    model.to("meta")
                elif action == "shard":
                    shard(model)
                elif action == "build":
                    optimizer = build_without_weights(name, model)
                elif action == "gather":
                    loss_of(model, 0)
                elif action == "attach":
                    optim.attach_to_backward(model, optimizer)
                else:
                    model.to_empty(device="cpu")
                    fill(model, values)
            for step in range(3):
                loss_of(model, step).backward()
                optimizer.step()
            results.append(everything(model, optimizer))
        for result in results[1:]:
            assert_equal(result, results[0])

        model = new_model(name)
        optimizer = build_without_weights(name, model)
        optim.attach_to_backward(model, optimizer)
        shard(model)
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match=r"'.*' was replaced \(sharded\) after attach_to_backward") as caught:
            optimizer.step()
        told.append(str(caught.value))
    return told


def test_attached_before_or_after_sharding() -> None:
    for told in run_distributed(attached_around_sharding, 2):
        assert len(told) == 3


def test_a_model_that_is_gone_is_not_kept() -> None:
    model = new_model("adamw")
    optim.param_groups(model)
    reference = weakref.ref(model)
    assert not isinstance(model, FSDPModule)
    del model
    gc.collect()
    assert reference() is None
