"""Settings every test shares."""

import os

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
