"""What the inputs of linear layers are like on some text: second moments for whitening, energies for outliers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_train.common.progress import show_progress

__all__ = ["input_energies", "input_moments", "outlier_shares"]

_MEMORY_BYTES = 4 * 2**30
"""Bytes of second moments gathered in one pass over the text; a model with more takes several passes."""


def input_moments(
    model: PreTrainedModel, linears: Mapping[str, nn.Linear], batches: list[Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield C = mean of x x^T over the tokens, (in, in) float64, of every layer; few at a time, in the order of
    ``linears``.

    Args:
        model: unsharded, in evaluation mode.
        linears: layers of it, by name.
        batches: (n, length) token ids.
    """
    waiting = list(linears.items())
    while waiting:
        chunk: list[tuple[str, nn.Linear]] = []
        size = 0
        while waiting and (not chunk or size + 8 * waiting[0][1].in_features ** 2 <= _MEMORY_BYTES):
            size += 8 * waiting[0][1].in_features ** 2
            chunk.append(waiting.pop(0))
        yield from _gathered(model, dict(chunk), batches, lambda x: x.mT @ x).items()


def input_energies(
    model: PreTrainedModel, linears: Mapping[str, nn.Linear], batches: list[Tensor]
) -> dict[str, Tensor]:
    """Return the mean of x^2 over the tokens, (in,) float64, of every layer; arguments as for ``input_moments``."""
    return _gathered(model, linears, batches, lambda x: x.square().sum(0))


def outlier_shares(linears: Mapping[str, nn.Linear], energies: Mapping[str, Tensor], threshold: float = 5.0) -> float:
    """Return the share of weights of a block of layers whose |W_ij| ||x_j|| exceeds ``threshold`` times its mean.

    Source: Yin et al., OWL (arXiv 2310.05175), the layerwise outlier distribution; their thresholds are 5 and 7.
    """
    importance = torch.cat(
        [
            (linear.weight.detach().abs() * energies[name].sqrt().to(linear.weight)).flatten()
            for name, linear in linears.items()
        ]
    )
    return float((importance > threshold * importance.mean()).double().mean())


@torch.no_grad()
def _gathered(
    model: PreTrainedModel, linears: Mapping[str, nn.Linear], batches: list[Tensor], measure: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    tokens = 0
    with _watching(linears, measure, sums):
        for batch in show_progress(batches, "calibrating", "batches"):
            model.base_model(input_ids=batch.to(model.device), use_cache=False)
            tokens += batch.numel()
    return {name: sums[name] / tokens for name in linears}


@contextmanager
def _watching(
    linears: Mapping[str, nn.Linear], measure: Callable[[Tensor], Tensor], sums: dict[str, Tensor]
) -> Iterator[None]:
    def watch(name: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            value = measure(inputs[0].detach().flatten(0, -2).double())
            sums[name] = sums[name] + value if name in sums else value

        return add

    hooks = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
