"""Our own files, damaged in every way a disk or an editor does it: one message that names the file.

Each reader is given its file empty, cut, of another kind, of other bytes, and none at all. It must raise a UserError
that names the file or its folder, or go on as its docstring says.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lowrank_train.bench.quality import NEEDED
from lowrank_train.bench.trainings import Trainer, required
from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import start
from lowrank_train.compress.command import _plan_of_file, _read_cache
from lowrank_train.config.loading import load_schema, save_config
from lowrank_train.config.run_config import load_config
from lowrank_train.config.schema import Config, DataConfig
from lowrank_train.data.blocks import TokenFile
from lowrank_train.data.token_folder import read_record
from lowrank_train.data.tokenizer import prepare_tokenizer, read_own_tokenizer
from lowrank_train.data.tokens import prepare_data
from lowrank_train.files.checkpoint_folder import read_about
from lowrank_train.files.checksums import CHECKSUMS
from lowrank_train.hyperbolic.graphs.config import GraphConfig
from lowrank_train.hyperbolic.graphs.data import load_graph
from lowrank_train.hyperbolic.graphs.record import GraphRecord
from lowrank_train.hyperbolic.run import load_saved
from lowrank_train.memory.records import step_time
from lowrank_train.train.metrics import read_metrics
from lowrank_train.train.report import _plot
from lowrank_train.train.run_folder import changed_settings, check_same_settings
from tests.runs import arguments, documents

LINEARS = {"model.layers.0.a": nn.Linear(4, 6), "model.layers.0.b": nn.Linear(6, 4)}
RECORD = {
    "status": "finished",
    "validation_loss": 1.0,
    "perplexity": 2.7,
    "provenance": {"commit": "0"},
    "data": {"sha1": "0"},
}


def damaged(whole: bytes) -> list[bytes | None]:
    """What may be found in place of a file; None: nothing."""
    half = len(whole) // 2
    flipped = bytearray(whole)
    flipped[half] ^= 0xFF
    as_json = [
        b"[]",
        b"{}",
        b"null",
        b"3",
        b'"text"',
        b'{"a": {"b": [1]}}',
        b"[[" * 3000,
        b"{" * 3000,
        b"\xef\xbb\xbf{}",
    ]
    return [
        b"",
        whole[:half],
        whole[:-1],
        bytes(flipped),
        whole + whole,
        b"\x00" * 64,
        bytes(range(256)),
        *as_json,
        None,
    ]


def text_tokenizer(folder: Path) -> None:
    prepare_tokenizer(DataConfig(vocab_size=300), lambda: iter(documents(20)), folder)


def metrics(folder: Path) -> None:
    assert all(isinstance(row["step"], int) for row in read_metrics(folder))


def with_config(folder: Path) -> tuple[Any, Any]:
    return changed_settings(folder, load_config([f"run_dir={folder}"]))


def graph_record(folder: Path) -> None:
    def trained(config: GraphConfig) -> Any:
        raise UserError(f"trained again in {config.run_dir}")

    Trainer(trained, required(GraphRecord)).train_each([load_schema(GraphConfig, [f"run_dir={folder}"])])


def write_graph(folder: Path) -> None:
    np.savez(folder / "graph.npz", edges=np.array([[0, 1], [1, 2]]), features=np.ones((3, 2)))


def network(folder: Path) -> None:
    load_saved(folder, lambda arguments: nn.Linear(**arguments))


def write_network(folder: Path) -> None:
    whole = {"network": {"in_features": 2, "out_features": 3}, "precision": "float32"}
    torch.save({**whole, "state": nn.Linear(2, 3).state_dict()}, folder / "network.pt")


READERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    # file -> what writes it into a folder, and what reads it from there
    "metrics.jsonl": (
        lambda folder: (folder / "metrics.jsonl").write_text(
            "".join(json.dumps({"step": i, "train/loss": 2.0, "eval/loss": None}) + "\n" for i in range(9))
        ),
        metrics,
    ),
    "data.json": (
        lambda folder: (folder / "data.json").write_text(
            json.dumps(
                {
                    "settings": {},
                    "found": {"dtype": "uint16", "train_tokens": 5, "validation_tokens": 3, "held_out_below": 0.1},
                }
            )
        ),
        read_record,
    ),
    "about.json": (lambda folder: (folder / "about.json").write_text(json.dumps({"a": 1})), read_about),
    "config.yaml": (lambda folder: save_config(Config(), folder / "config.yaml"), with_config),
    "config.yaml of a table": (
        lambda folder: save_config(Config(), folder / "config.yaml"),
        lambda folder: check_same_settings(folder, load_config([f"run_dir={folder}"]), "delete it"),
    ),
    "record.json": (
        lambda folder: (folder / "record.json").write_text(json.dumps({**dict.fromkeys(NEEDED, 1), **RECORD})),
        lambda folder: Trainer(print, NEEDED).earlier(load_config([f"run_dir={folder}"])),
    ),
    "record.json of a table": (
        lambda folder: (folder / "record.json").write_text(json.dumps(RECORD)),
        lambda folder: step_time(Config(), 1, folder),
    ),
    "record.json of a graph": (
        lambda folder: (folder / "record.json").write_text(json.dumps({"status": "finished"})),
        graph_record,
    ),
    "compress.json": (
        lambda folder: (folder / "compress.json").write_text(json.dumps({"model.layers.0.a": 2})),
        lambda folder: _plan_of_file(str(folder / "compress.json"), LINEARS, "all"),
    ),
    "spectra.safetensors": (
        lambda folder: save_file(
            {name: torch.ones(4, dtype=torch.float64) for name in LINEARS}, folder / "spectra.safetensors"
        ),
        lambda folder: _read_cache(folder / "spectra.safetensors", LINEARS),
    ),
    "tokenizer/tokenizer.json": (
        lambda folder: text_tokenizer(folder / "tokenizer"),
        lambda folder: read_own_tokenizer(folder / "tokenizer", "delete it"),
    ),
    "tokenizer/tokenizer_config.json": (
        lambda folder: text_tokenizer(folder / "tokenizer"),
        lambda folder: read_own_tokenizer(folder / "tokenizer", "delete it"),
    ),
    "graph.npz": (write_graph, lambda folder: load_graph(str(folder), "graph")),
    "network.pt": (write_network, network),
}
RECOVERS = {
    "metrics.jsonl",  # odd lines are left out
    "spectra.safetensors",  # decomposed again
    "config.yaml",  # what changed is not known, which is said
    "record.json of a table",  # a step of unknown time
}


@pytest.mark.parametrize("what", READERS)
def test_a_damaged_file_ends_in_one_message_that_names_it(tmp_path: Path, what: str) -> None:
    write, read = READERS[what]
    name = what.split(" ")[0]
    refused = 0
    write(tmp_path)
    whole = (tmp_path / name).read_bytes()
    for content in damaged(whole):
        file = tmp_path / name
        if content is None:
            file.unlink(missing_ok=True)
        else:
            file.write_bytes(content)
        message = _message(read, tmp_path)
        refused += message is not None
        assert message is None or (str(tmp_path) in message and len(message) < 1500)
    assert refused > 5 or what in RECOVERS


def _message(read: Callable[[Path], object], folder: Path) -> str | None:
    try:
        read(folder)
    except UserError as error:
        return str(error)
    return None


def test_metrics_with_odd_lines_are_plotted_without_them(tmp_path: Path) -> None:
    odd = ['{"step": "one"}', '{"step": 2, "train/loss": "low"}', "[]", '{"step": 3, "train/loss": [1]}', '{"st', "{}"]
    good = [json.dumps({"step": step, "train/loss": 2.0, "eval/loss": None}) for step in (1, 9)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([good[0], *odd, good[1], '{"step": 10, "tra']))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 9]
    _plot(read_metrics(tmp_path), tmp_path / "loss.png")


@pytest.mark.parametrize(
    "change",
    [
        {"edges": None},
        {"features": None},
        {"features": np.full((3, 2), np.nan)},
        {"features": np.array([["a", "b"]] * 3)},
        {"features": np.ones((3, 2), dtype=np.complex64)},
        {"features": np.ones(3)},
        {"features": np.ones((0, 2))},
        {"edges": np.array([0, 1])},
        {"edges": np.array([[0.5, 1.5]])},
        {"edges": np.array([[0, 2**62]])},
        {"edges": np.array([[-1, 0]])},
        {"labels": np.array([0, 1])},
        {"labels": np.array([0, 1, 10**15])},
        {"labels": np.array([0.0, np.nan, 1.0])},
        *({"labels": np.array([0, 1, 0]), "train_index": index} for index in (np.array([0.5]), np.array([[0]]))),
        {"features": None, "feature_indices": np.array([0, 9]), "num_features": np.array(2)},
        {"features": None, "feature_indices": np.array([0, 1]), "num_features": np.array(10**15)},
        {"features": None, "feature_indices": np.array([0, 1]), "num_features": np.array(-1)},
        {"features": None, "feature_indices": np.array([0, 1]), "num_features": np.array([1, 2])},
        {"features": None, "feature_indices": np.array(0), "num_features": np.array(2)},
    ],
    ids=lambda change: "-".join(f"{key}_{getattr(value, 'dtype', 'gone')}" for key, value in change.items()),
)
def test_graphs_with_arrays_that_do_not_fit(tmp_path: Path, change: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {"edges": np.array([[0, 1], [1, 2]]), "features": np.ones((3, 2))}
    arrays |= {"val_index": np.array([1]), "test_index": np.array([2])}
    arrays |= {"feature_indptr": np.array([0, 1, 2, 2]), "feature_values": np.ones(2), **change}
    np.savez(tmp_path / "graph.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(UserError, match=r"graph"):
        load_graph(str(tmp_path), "graph")


def test_cached_tokens_beyond_the_vocabulary(text: Path, tmp_path: Path) -> None:
    config = load_config(arguments(text, tmp_path / "run"))
    folder = tmp_path / "run" / "data"
    with start("cpu", config.parallel.shards, config.parallel.replicas) as ranks:
        made = prepare_data(config, ranks, folder)
        assert isinstance(made.train, TokenFile)
        (folder / CHECKSUMS).unlink()
        prepare_data(config, ranks, folder)  # of an earlier version, and whole
        for name in ("train.bin", "validation.bin"):
            whole = (folder / name).read_bytes()
            (folder / name).write_bytes(whole[:8] + b"\xff\xff" + whole[10:])
            with pytest.raises(UserError, match=rf"{name} is damaged: it holds the token 65535; expected less than"):
                prepare_data(config, ranks, folder)
            (folder / name).write_bytes(whole)
    assert asdict(config)["run_dir"] == str(tmp_path / "run")
