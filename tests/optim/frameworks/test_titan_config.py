"""``optim.titan_config`` without torchtitan: what it does with the interface its containers have.

The containers themselves: test_torchtitan.py, where torchtitan can be imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lowrank_train import optim


@dataclasses.dataclass
class Pattern:
    """Of a ``ParamGroupConfig`` what is read."""

    pattern: str
    optimizer_kwargs: dict[str, Any]
    optimizer_name: str = "AdamW"


class Container:
    """Holds one optimizer per model part; its configuration builds it."""

    @dataclasses.dataclass(kw_only=True, slots=True)
    class Config:
        _owner: ClassVar[Any] = None
        param_groups: list[Pattern]
        implementation: str = "fused"

        def build(self, **runtime: Any) -> Any:
            return self._owner(config=self, **runtime)

    optimizers: list[torch.optim.Optimizer]

    def __init_subclass__(cls) -> None:
        if "Config" in cls.__dict__:
            cls.Config._owner = cls

    def _post_init(self, params: list[nn.Parameter]) -> None:
        self.params = params

    def __iter__(self) -> Iterator[torch.optim.Optimizer]:
        return iter(self.optimizers)


Container.Config._owner = Container


def parts() -> list[nn.Module]:
    return [nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))]


def config(*patterns: Pattern) -> Container.Config:
    settings = {"lr": 8e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "fused": True}
    return Container.Config(param_groups=[*patterns, Pattern(".*", settings)])


def test_settings_of_the_first_pattern_that_matches() -> None:
    built = optim.titan_config(config(Pattern("bias", {"lr": 1e-4, "weight_decay": 0.0})), "dct_adamw", rank=4)
    container = built.build(model_parts=parts())
    assert isinstance(container, Container)
    assert built.implementation == "fused"
    assert [type(optimizer) for optimizer in container] == [optim.DCTAdamW, optim.DCTAdamW]
    groups = {
        name: (group["role"], group["lr"], group["weight_decay"], group["rank"], group["betas"])
        for optimizer in container
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert groups["0.weight"] == ("matrix", 8e-4, 0.1, 4, (0.9, 0.95)), "of the second part"
    assert groups["1.bias"] == ("vector", 1e-4, 0.0, 4, (0.9, 0.999))
    assert groups["1.weight"] == ("vector", 8e-4, 0.1, 4, (0.9, 0.95)), "a norm, which the pattern decays"
    assert len(container.params) == 7


def test_settings_an_optimizer_lacks_are_left_out() -> None:
    container = optim.titan_config(config(), "muon", momentum=0.9).build(model_parts=parts()[1:])
    (optimizer,) = container
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}
    assert all("fused" not in group for group in optimizer.param_groups)


def test_mistakes_name_the_line() -> None:
    with pytest.raises(ValueError, match=r"got a dict; expected the Config of torchtitan's OptimizersContainer"):
        optim.titan_config({}, "dct_adamw")
    with pytest.raises(ValueError, match=r"takes no argument 'rang'; did you mean 'rank'"):
        optim.titan_config(config(), "dct_adamw", rang=4)
    narrow = Container.Config(param_groups=[Pattern("weight", {"lr": 1e-3})])
    with pytest.raises(ValueError, match=r"no pattern of param_groups matches '1.bias'.*pattern='\.\*'"):
        optim.titan_config(narrow, "dct_adamw").build(model_parts=parts()[:1])
    with pytest.raises(ValueError, match=r"rule 'router' matches no trainable parameter"):
        optim.titan_config(config(Pattern("router", {})), "dct_adamw").build(model_parts=parts())
