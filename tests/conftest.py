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


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
