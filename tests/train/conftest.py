"""Text and imports that the tests of the trainer share."""

import io
from pathlib import Path

import datasets  # noqa: F401  forked workers inherit what is imported here, the trainer's lazy imports included
import pytest
import torch
from matplotlib import pyplot

from lowrank_train import models, report  # noqa: F401  report chooses the backend without a window
from lowrank_train.config import ModelConfig
from tests.train.helpers import documents, write_jsonl


@pytest.fixture(scope="session", autouse=True)
def _warm() -> None:
    """Load model classes and fonts once, not in every forked worker."""
    figure, axes = pyplot.subplots(layout="constrained")
    axes.plot([1, 2], label="warm")
    axes.legend()
    figure.savefig(io.BytesIO())
    pyplot.close(figure)
    for name in ("llama_9m", "opt_125m"):
        models.skeleton(models.architecture(ModelConfig(name=name)), torch.float32)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 300 documents."""
    return write_jsonl(tmp_path_factory.mktemp("text") / "stories.jsonl", documents(300))
