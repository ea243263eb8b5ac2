"""What surrounds a call of ``step`` does not change its numbers: autocast is off inside, and nothing is compiled.

A step is in-place work on state of fixed types. Autocast would turn its float32 products into bfloat16 ones;
torch.compile would trace Python that counts steps, compile it anew as the counts change, and round differently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["eagerly", "without_autocast"]

eagerly = torch._disable_dynamo  # type: ignore[attr-defined]
"""Decorates what torch.compile calls and does not trace. ``torch.compiler.disable`` does the same, but it would import
the compiler, for more than a second, together with this package."""


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn autocast off for the CPU and the accelerator; the user's choice comes back on leaving."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu"} if accelerator is None else {"cpu", accelerator.type}
    with ExitStack() as stack:
        for kind in kinds:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
