"""Settings every test shares, the text that runs are trained on, and what forked runs inherit."""

import io
import os
import tempfile
from pathlib import Path

# Before torch and transformers are imported: tests never look for files outside the machine, and workers are forked,
# which tokenizers' threads do not survive.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

# Small tensors gain nothing from threads, and a thread pool does not survive the fork of the multi-rank tests.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Only ``pytest -m gpu`` sees devices: where there is one, autograd keeps a thread for it that no fork survives.

    A build of torch for CUDA pretends that there is one as soon as it makes fake tensors without.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch._C._ensureCUDADeviceGuardSet = lambda: None  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 300 documents."""
    from tests.runs import documents, write_jsonl

    return write_jsonl(tmp_path_factory.mktemp("text") / "stories.jsonl", documents(300))


@pytest.fixture(autouse=True)
def _warm(request: pytest.FixtureRequest) -> None:
    """Before a test of the trainer, load once what every forked run would load again; ``optim`` needs none of it."""
    if "optim" not in request.path.relative_to(Path(__file__).parent).parts:
        request.getfixturevalue("loaded")


@pytest.fixture(scope="session")
def loaded() -> None:
    """Datasets, fonts, model classes and transformers' table of old weight names."""
    import datasets  # noqa: F401
    from matplotlib import pyplot

    from lowrank_train.config.schema import ModelConfig
    from lowrank_train.models import build as models

    figure, axes = pyplot.subplots(layout="constrained")
    axes.plot([1, 2], label="warm")
    axes.legend()
    figure.savefig(io.BytesIO())
    pyplot.close(figure)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("llama_9m", "opt_125m"):
            config = ModelConfig(name=name, overrides={"vocab_size": 8, "num_hidden_layers": 1})
            models.skeleton(models.architecture(config), torch.float32).to_empty(device="cpu").save_pretrained(folder)
