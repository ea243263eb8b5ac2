"""Text and imports that the tests of the trainer share."""

import io
import tempfile
from pathlib import Path

import datasets  # noqa: F401  forked workers inherit what is imported here, the trainer's lazy imports included
import pytest
import torch
from matplotlib import pyplot

from lowrank_train.config.schema import ModelConfig
from lowrank_train.models import build as models
from tests.train.helpers import documents, write_jsonl


@pytest.fixture(scope="session", autouse=True)
def _warm() -> None:
    """Load model classes, fonts and transformers' table of old weight names once, not in every forked worker."""
    figure, axes = pyplot.subplots(layout="constrained")
    axes.plot([1, 2], label="warm")
    axes.legend()
    figure.savefig(io.BytesIO())
    pyplot.close(figure)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("llama_9m", "opt_125m"):
            overrides = {"vocab_size": 8, "num_hidden_layers": 1}
            config = ModelConfig(name=name, overrides=overrides)
            models.skeleton(models.architecture(config), torch.float32).to_empty(device="cpu").save_pretrained(folder)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 300 documents."""
    return write_jsonl(tmp_path_factory.mktemp("text") / "stories.jsonl", documents(300))
