"""A folder with a model, tokens and prompts, as the scripts of docs/swap.md expect to find in theirs."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from transformers import LlamaForCausalLM

from tests.optim.frameworks.harness import write_material


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("swap")
    transformers.utils.logging.disable_progress_bar()
    write_material(folder)
    LlamaForCausalLM.from_pretrained(folder / "my_model")  # lazy imports, once before all forks
    transformers.utils.logging.enable_progress_bar()
    return folder
