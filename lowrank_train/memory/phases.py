"""The bytes of a training step of one rank: those of each phase by term, and the peak over the phases."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace

from lowrank_train.common.units import show_bytes

__all__ = ["Phase", "StepMemory"]


@dataclass(frozen=True)
class Phase:
    """Bytes of one rank at the worst moment of a phase, by term."""

    weights: int = 0
    """This rank's shards."""
    gradients: int = 0
    """Shards of them that have been made."""
    optimizer_state: int = 0
    activations: int = 0
    """What waits for backward, and gradients of it."""
    logits: int = 0
    """Bytes of one chunk: logits, probabilities, their gradient."""
    gathered: int = 0
    """Whole parameters of groups, and buffers they travel in."""
    reductions: int = 0
    """Whole gradients, and buffers they travel in."""
    temporaries: int = 0
    """What an update, or a layer of factors, makes and frees; the cosine matrix or drawn directions between steps."""
    refresh: int = 0
    """Temporaries when a basis is chosen or factors are decomposed."""

    @property
    def total(self) -> int:
        """The sum of all terms."""
        return sum(asdict(self).values())

    def plus(self, **more: int) -> Phase:
        """Return the phase with more bytes of some terms."""
        return replace(self, **{name: getattr(self, name) + value for name, value in more.items()})


@dataclass(frozen=True)
class StepMemory:
    """Predicted peak of a training step of one rank."""

    forward: Phase
    backward: Phase
    step: Phase
    refresh: Phase

    @property
    def phases(self) -> dict[str, int]:
        """The total of each."""
        return {f.name: getattr(self, f.name).total for f in fields(self)}

    @property
    def phase(self) -> str:
        """Which one needs most."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak(self) -> int:
        """Bytes it needs."""
        return max(self.phases.values())

    @property
    def terms(self) -> dict[str, int]:
        """The bytes of the phase by term."""
        return asdict(getattr(self, self.phase))

    def in_words(self) -> str:
        """Return the peak, and its terms from the largest."""
        terms = sorted(self.terms.items(), key=lambda term: -term[1])
        parts = ", ".join(f"{name.replace('_', ' ')} {show_bytes(size)}" for name, size in terms if size)
        return f"{show_bytes(self.peak)} ({parts})"
