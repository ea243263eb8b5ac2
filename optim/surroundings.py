"""What surrounds a call of ``step`` does not change its numbers: autocast is off inside, and nothing is compiled.

A step is in-place work on state of fixed types. Autocast would turn its float32 products into bfloat16 ones;
torch.compile would trace Python that counts steps, compile again as the counts change, and round differently. New
tensors are made on the CPU or where they are said to be, whatever the default device is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["eagerly", "undisturbed"]

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
