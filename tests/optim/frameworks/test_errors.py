"""What must not be swapped in says so, and names the line to write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from lowrank_train import optim
from tests.optim.frameworks.harness import create, load_model, run_ranks


class DeepSpeedEngine(nn.Module):
    """Has the name of what is refused; the package is not installed."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_raw_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"pass optim.param_groups\(model\) instead of model.parameters\(\)"):
        optim.DCTAdamW(model.parameters(), lr=1e-3)
    with pytest.raises(ValueError, match=r"pass optim.param_groups\(model\)"):
        optim.create("dct_adamw", model.parameters(), lr=1e-3)


def test_deepspeed() -> None:
    engine = DeepSpeedEngine(nn.Sequential(nn.Linear(4, 4)))
    for model in (engine, nn.Sequential(engine)):
        with pytest.raises(ValueError, match=r"DeepSpeedEngine.*flat buffers.*FSDP2"):
            optim.create("dct_adamw", model, lr=1e-3)


def test_flattened_parameters_that_replace_matrices() -> None:
    """As DeepSpeed does with an optimizer it is handed."""
    optimizer = optim.create("dct_adamw", nn.Sequential(nn.Linear(4, 4, bias=False)), lr=1e-3)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(16))]
    with pytest.raises(ValueError, match=r"'0.weight' has role 'matrix'.*\(16,\).*FSDP2"):
        optimizer.step()


def test_fsdp1(material: Path) -> None:
    def message() -> str:
        with pytest.raises(ValueError, match="FSDP1 flattens") as caught:
            create(FullyShardedDataParallel(load_model(), device_id=torch.device("cpu")))
        return str(caught.value)

    assert "fully_shard" in run_ranks(message, 1, material)[0]


def test_updates_in_backward_with_ddp(material: Path) -> None:
    """Given the wrapper or the model inside it; wrapped after it was attached, too."""

    def refuse() -> list[str]:
        messages = []
        model = load_model()
        wrapped = DistributedDataParallel(model)
        for handed in (wrapped, model):
            with pytest.raises(ValueError, match="DistributedDataParallel") as caught:
                optim.attach_to_backward(handed, create(model))
            messages.append(str(caught.value))
        del wrapped, handed
        optim.attach_to_backward(model, create(model))  # the wrapper is gone
        later = load_model()
        optimizer = create(later)
        optim.attach_to_backward(later, optimizer)
        tokens = torch.load("my_tokens.pt")[0]
        DistributedDataParallel(later)(input_ids=tokens, labels=tokens).loss.backward()
        kept = DistributedDataParallel(later)
        with pytest.raises(ValueError, match="DistributedDataParallel") as caught:
            optimizer.step()
        messages.append(str(caught.value))
        assert kept.module is later
        # A bare model beside some other that is replicated
        free = load_model()
        optim.attach_to_backward(free, create(free)).detach()
        return messages

    for messages in run_ranks(refuse, 2, material):
        assert all("fully_shard" in message for message in messages)


def test_updates_in_backward_with_another_package() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"got a AdamW; expected an optimizer of this package.*optim.create"):
        optim.attach_to_backward(model, torch.optim.AdamW(model.parameters()))  # type: ignore[arg-type]


def test_one_parameter_in_two_groups() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    groups = [*optim.param_groups(model), *optim.param_groups(model)]
    with pytest.raises(ValueError, match="more than one parameter group"):
        optim.DCTAdamW(groups, lr=1e-3)


def test_one_parameter_with_two_roles() -> None:
    class Claims(nn.Linear):
        def __init__(self, role: str) -> None:
            super().__init__(4, 4, bias=False)
            self.parameter_roles = {"weight": role}

    model = nn.Sequential(Claims("matrix"), Claims("vector"))
    optim.param_groups(model)
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'weight' of a Claims has role 'vector'.*role 'matrix'"):
        optim.param_groups(model)


def test_sharding_after_the_first_step(material: Path) -> None:
    def late() -> None:
        model = load_model()
        optimizer = create(model)
        loss = model(input_ids=torch.load("my_tokens.pt")[0], labels=torch.load("my_tokens.pt")[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.param_groups[0]["params"] = [
            nn.Parameter(param.detach().clone()) for param in optimizer.param_groups[0]["params"]
        ]
        with pytest.raises(RuntimeError, match="shard the model first, or before the first step"):
            optimizer.step()

    run_ranks(late, 1, material)
