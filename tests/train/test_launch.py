"""The front door as the README opens it: torchrun, the quickstart recipe, real text."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowrank_train.config.run_config import load_config
from lowrank_train.train.metrics import read_metrics
from tests.runs import ROOT, Launched, losses

pytestmark = pytest.mark.slow

QUICKSTART = ["launch/pretrain.py", "configs/quickstart.yaml"]
TINY = [
    "data.vocab_size=300",
    "model.overrides.hidden_size=32",
    "model.overrides.intermediate_size=48",
    "model.overrides.num_hidden_layers=2",
    "model.overrides.num_attention_heads=2",
    "optimizer.rank=8",
    "evaluation.tokens=1000",
    "seq_len=32",
    "tokens_per_step=256",
    "micro_batch=4",
    "steps=12",
    "schedule.warmup_steps=3",
    "device=cpu",
]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The quickstart on the embedded text, with a model and a number of steps as small as they get."""
    run_dir = tmp_path_factory.mktemp("launched") / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return run_dir, run([*torchrun, *QUICKSTART, *TINY, f"run_dir={run_dir}"])


def test_the_quickstart_trains_on_the_embedded_text(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, process = launched
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    found = losses(run_dir)
    assert len(found) == 12
    assert found[-1] < found[0]
    record = json.loads((run_dir / "record.json").read_text())
    assert record["status"] == "finished"
    assert record["world_size"] == 2
    assert record["data"]["data.path"] == "embedded"
    assert record["data"]["train_tokens"] > 1_000_000
    assert record["optimizer"]["name"] == load_config([str(ROOT / "configs/quickstart.yaml")]).optimizer["name"]
    assert record["optimizer_state_bytes"] == record["predicted_optimizer_state_bytes"]


def test_it_ends_with_a_table_and_shows_progress(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, process = launched
    for expected in ("perplexity", "tokens/s", "loss", "peak memory", "checkpoint", "TensorBoard", "plot", "12/12"):
        assert expected in process.stderr
    assert str(run_dir / "huggingface") in process.stderr
    assert process.stderr.count("llama_9m: ") == 1  # one rank speaks


def test_the_exported_model_writes_text(launched: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    run_dir, _ = launched
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "huggingface")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "huggingface")
    ids = tokenizer("import sys", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == "import sys"
    with torch.no_grad():
        assert model(ids).logits.shape == (1, ids.shape[1], 300)


def test_a_single_process_is_stopped_and_resumed_by_the_command_it_prints(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*QUICKSTART, *TINY, f"data.path={text}", f"run_dir={tmp_path / 'my run'}", "steps=100000"]
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and len(read_metrics(tmp_path / "my run")) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 0, said
    assert "Traceback" not in said
    done = json.loads((tmp_path / "my run" / "record.json").read_text())["steps"]
    assert done >= 1

    command = shlex.split(said.rsplit("resume with: ", 1)[1].splitlines()[0])
    assert command[0] == "python"
    assert command[1:] == [*words, "resume=auto"]
    monkeypatch.chdir(ROOT)
    again = Launched([*command[2:], f"steps={done + 2}"], tmp_path / "log")
    assert again.finish() == 0, again.output
    assert f"resuming from {tmp_path / 'my run'}/checkpoints/step-{done}" in again.output
    assert len(losses(tmp_path / "my run")) == done + 2


def test_without_the_package_it_says_how_to_install_it() -> None:
    """-I leaves out the checkout, -S what is installed."""
    process = run([sys.executable, "-I", "-S", "launch/pretrain.py", "--help"])
    assert process.returncode == 1
    assert "pip install -e ." in process.stderr
    assert "Traceback" not in process.stderr
