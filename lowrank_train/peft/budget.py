"""AdaLoRA's budget (Zhang et al., arXiv 2303.10512): which singular values stay, decided anew in the course of a run.

peft's allocator scores whole factors by |w g| and its variation, and knows nothing of shards. It is shown whole copies,
the same on every rank, and the singular values it set to zero are written back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_train.models.fsdp import fill, gathered

__all__ = ["RankBudget"]

_SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What the allocator remembers of every factor."""


class RankBudget:
    """The budget of one adapted model.

    Args:
        wrapper: peft's.
    """

    def __init__(self, wrapper: Any) -> None:
        self.tuner = wrapper.base_model

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Update the ranks after the optimizer's step ``step`` (from 1), while the gradients are there."""
        factors = {name: p for name, p in model.named_parameters() if ".lora_" in name and p.requires_grad}
        view = _Whole(factors)
        kept, self.tuner.model = self.tuner.model, view
        try:
            self.tuner.update_and_allocate(step)
        finally:
            self.tuner.model = kept
        for name, param in factors.items():
            if ".lora_E." in name:
                fill(param.detach(), view.tensors[name].detach())

    def penalty(self) -> Tensor:
        """Return AdaLoRA's term of the loss: ``orth_reg_weight`` times the factors' mean distance from orthonormal.

        The distances are |P P^T - I|_F and |Q^T Q - I|_F (equation 4 of the paper); the parameters must be whole.
        """
        distances = []
        for name, param in self.tuner.model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                gram = param @ param.mT if ".lora_A." in name else param.mT @ param
                distances.append(torch.linalg.norm(gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)))
        return self.tuner.peft_config["default"].orth_reg_weight * torch.stack(distances).mean()

    def state_dict(self) -> dict[str, Tensor]:
        """Return scores and the present choice, whole, equal on all ranks."""
        allocator = self.tuner.rankallocator
        state = {f"{kind}/{name}": value for kind in _SCORES for name, value in getattr(allocator, kind).items()}
        pattern = self.tuner.peft_config["default"].rank_pattern or {}
        return {**state, **{f"pattern/{name}": torch.tensor(kept) for name, kept in pattern.items()}}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue with saved scores."""
        self.tuner.rankallocator.reset_ipt()
        pattern = {}
        for key, value in state.items():
            kind, _, name = key.partition("/")
            if kind == "pattern":
                pattern[name] = value.tolist()
            else:
                getattr(self.tuner.rankallocator, kind)[name] = value
        self.tuner.peft_config["default"].rank_pattern = pattern

    def __deepcopy__(self, memo: dict[int, Any]) -> RankBudget:
        raise TypeError("a budget belongs to one model")


class _Whole(nn.Module):
    """What the allocator asks of a model: factors and their gradients, by name."""

    def __init__(self, factors: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.tensors: dict[str, nn.Parameter] = {}
        for name, param in factors.items():
            whole = nn.Parameter(gathered(param.detach()).clone())
            if param.grad is not None:
                whole.grad = gathered(param.grad)
            self.tensors[name] = whole

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Those it was given, by the names they have in the model."""
        yield from self.tensors.items()
