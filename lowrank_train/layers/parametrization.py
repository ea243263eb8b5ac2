"""How the matrices of a model are written as parameters: dense, spectral, or beside a frozen matrix.

A run builds the model on the meta device, converts it, shards it, and only then fills it: ``values`` says what a
converted layer holds, given the linear layer it replaces.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from lowrank_train.layers.choice import trained_layers
from lowrank_train.layers.spectral import SpectralLinear, factorise, plain_state, spectral_values, to_spectral

__all__ = ["Dense", "Parametrization", "Spectral"]


class Parametrization(ABC):
    """Abstract: a kind of layer that takes the place of ``nn.Linear``."""

    @abstractmethod
    def convert(self, model: nn.Module) -> None:
        """Replace layers of a model, in place; on meta only shapes are made. Raises ValueError for unfit settings."""

    @abstractmethod
    def converted(self, module: nn.Module) -> bool:
        """Return whether a module took the place of a linear layer."""

    @abstractmethod
    def values(self, index: int, target: nn.Module, linear: nn.Module) -> dict[str, Tensor]:
        """Return all parameters, whole, of a converted layer with the outputs of ``linear``.

        Args:
            index: of the layer among the converted ones.
            target: the converted layer; its own values are not read.
            linear: what it replaces.
        """

    @abstractmethod
    def plain_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the whole state dict of a converted model as that of the plain one."""


class Dense(Parametrization):
    """Matrices as they are."""

    def convert(self, model: nn.Module) -> None:
        """Change nothing."""

    def converted(self, module: nn.Module) -> bool:
        """Return False: no module is converted."""
        return False

    def values(self, index: int, target: nn.Module, linear: nn.Module) -> dict[str, Tensor]:
        """Raise an error: nothing asks for the values of a converted layer."""
        raise NotImplementedError

    def plain_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict unchanged."""
        return dict(state)


class Spectral(Parametrization):
    """W = U diag(sigma) V^T in attention and feed-forward layers, see ``lowrank_train.layers.spectral.to_spectral``."""

    def __init__(
        self,
        rank: int,
        *,
        sampling: Literal["multinomial", "uniform", "sequential", "top"] = "multinomial",
        seed: int = 0,
        gradient: Literal["enhanced", "plain"] = "enhanced",
        frozen_dtype: str | None = None,
        layers: str | None = None,
    ) -> None:
        self.rank, self.sampling, self.seed = rank, sampling, seed
        self.gradient, self.frozen_dtype, self.layers = gradient, frozen_dtype, layers

    def convert(self, model: nn.Module) -> None:
        """Replace layers by ``to_spectral``."""
        to_spectral(
            model,
            self.rank,
            layers=trained_layers(model, self.layers),
            sampling=self.sampling,
            seed=self.seed,
            gradient=self.gradient,
            frozen_dtype=self.frozen_dtype,
        )

    def converted(self, module: nn.Module) -> bool:
        """Return whether a module is a spectral layer."""
        return isinstance(module, SpectralLinear)

    def values(self, index: int, target: nn.Module, linear: nn.Module) -> dict[str, Tensor]:
        """Decompose the weight by its singular values. Raises ValueError for a weight that has none."""
        assert isinstance(target, SpectralLinear)
        assert isinstance(linear, nn.Linear)
        factors = factorise(linear.weight, self.rank, sampling=self.sampling, seed=self.seed, index=index)
        return spectral_values(target, factors, linear.bias)

    def plain_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state dict with factors multiplied out."""
        return plain_state(state)
