"""The configuration of a graph run: YAML files merged left to right, then ``key=value`` overrides, as everywhere."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lowrank_train.config.settings import setting
from lowrank_train.hyperbolic.recipes import RecipeConfig, SpaceConfig

__all__ = ["GraphConfig", "GraphDataConfig", "GraphModelConfig"]


@dataclass
class GraphDataConfig:
    """Which graph, which task, and how its parts are drawn."""

    folder: str = setting("data/graphs", "folder of the .npz files of graphs", path=True)
    graph: str = setting("disease_lp", "file in it, without .npz", path=True)
    task: Literal["link_prediction", "node_classification"] = setting("link_prediction", "what is learned")
    protocol: Literal["clean", "inherited"] = setting(
        "clean",
        "how parts are drawn; inherited: as HGCN's loader does, with its overlaps, to compare with published tables",
    )
    validation_share: float | None = setting(
        None, "of nodes or edges; null: 0.15 of nodes, 0.05 of edges", above=0, below=1
    )
    test_share: float | None = setting(
        None, "share of nodes or edges for testing; null: 0.15 of nodes, 0.10 of edges", above=0, below=1
    )
    split_seed: int = setting(1234, "of the draw of the parts", at_least=0, at_most=2**32 - 1)
    connected: bool = setting(True, "refuse a graph in several pieces; false: they are as they should be")
    normalize_features: bool = setting(True, "divide each row of features by its sum")
    degree_features: bool = setting(False, "append one-hot degrees, 0 to 5 and more, and ones")
    label_column: int | None = setting(
        None,
        "feature that is cut into the classes of node classification, and is no feature then; null: labels",
        at_least=0,
    )
    label_bins: list[float] = setting([], "ascending numbers at which it is cut")
    root: int | None = setting(
        None, "node that depths are counted from; null: one in the middle of the longest path", at_least=0
    )


@dataclass
class GraphModelConfig(SpaceConfig):
    """The network."""

    width: int = setting(
        16, "coordinates of a point, of which one is a time in the Lorentz model", at_least=2, at_most=10**6
    )
    convolutions: int = setting(2, "layers", at_least=1, at_most=1000)
    activation: Literal["none", "relu"] = setting("none", "between two of them")
    dropout: float = setting(0.0, "of what enters a linear map", at_least=0, below=1)
    attention: bool = setting(False, "weigh neighbours")


@dataclass
class GraphConfig(RecipeConfig):
    """One graph run."""

    data: GraphDataConfig = field(default_factory=GraphDataConfig)
    model: GraphModelConfig = field(default_factory=GraphModelConfig)
    margin: float = setting(2.0, "of the loss, in units of squared distance", above=0)
    epochs: int = setting(5000, "steps on the whole graph, at most", at_least=1)
    patience: int = setting(500, "epochs without a better score on validation after which training ends", at_least=1)
    min_epochs: int = setting(100, "epochs before which it does not", at_least=0)

    @property
    def name(self) -> str:
        """Graph, task, protocol, space and optimizer."""
        data = self.data
        return f"{data.graph}-{data.task}-{data.protocol}-{self.model.geometry}-{self.optimizer.get('name')}"
