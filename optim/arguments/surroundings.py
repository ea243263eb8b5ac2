"""What surrounds a call of ``step`` does not change its numbers: autocast is off inside, and nothing is compiled.

A step is in-place work on state of fixed types. Autocast would turn its float32 products into bfloat16 ones;
torch.compile would trace Python that counts steps, compile again as the counts change, and round differently. New
tensors are made on the CPU or where they are said to be, whatever the default device is. Tensors without numbers
(``FakeTensorMode``) are not kept from one call to the next: fake and real tensors must not meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache, wraps

import torch
from torch import Tensor

__all__ = ["eagerly", "kept", "tensors_hold_numbers", "undisturbed"]

eagerly = torch._disable_dynamo  # type: ignore[attr-defined]
"""Decorates what torch.compile calls and does not trace. ``torch.compiler.disable`` does the same, but it would import
the compiler, for more than a second, together with this package."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Turn autocast off and let the CPU be the default device; the user's choices come back on leaving."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    with ExitStack() as stack:
        for kind in kinds:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def tensors_hold_numbers() -> bool:
    """Return whether a new tensor is a plain one: not so in modes that make tensors of other classes, as fake ones."""
    return type(torch.empty(0)) is Tensor


def kept(
    build: Callable[[int, torch.device, torch.dtype], Tensor],
) -> Callable[[int, torch.device, torch.dtype], Tensor]:
    """Decorate a function that builds a constant matrix: its last 16 results are kept if they hold numbers."""
    cached = lru_cache(maxsize=16)(build)

    @wraps(build)
    def made(d: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        return cached(d, device, dtype) if tensors_hold_numbers() else build(d, device, dtype)

    return made
