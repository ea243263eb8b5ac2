"""The configuration of a graph run: YAML files merged left to right, then ``key=value`` overrides, as everywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lowrank_train.config.settings import setting
from lowrank_train.hyperbolic.recipes import RecipeConfig, check_recipe, load_recipe, recipe_help

__all__ = ["GraphConfig", "GraphDataConfig", "GraphModelConfig", "graph_help_text", "load_graph_config"]


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
class GraphModelConfig:
    """The network."""

    geometry: Literal["lorentz", "euclidean"] = setting("lorentz", "the space it computes in")
    curvature: float = setting(
        1.0, "k > 0: points have <x, x> = -k, and space curvature -1/k", at_least=1e-6, at_most=1e6
    )
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


def load_graph_config(arguments: Sequence[str]) -> GraphConfig:
    """Build a configuration from YAML files and ``key=value`` overrides.

    Raises:
        UserError: unreadable file, unknown key (with the closest match), value of the wrong type or out of range.
    """
    config = load_recipe(GraphConfig, arguments)
    if config.run_dir is None:
        data, name = config.data, config.optimizer.get("name")
        config.run_dir = f"runs/{data.graph}-{data.task}-{data.protocol}-{config.model.geometry}-{name}"
    check_recipe(config)
    return config


def graph_help_text() -> str:
    """Return every key with its default and meaning."""
    return recipe_help(GraphConfig, "")
