"""The training benchmark: whole steps of several methods on the same model and tokens, interleaved in one process."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_train import optim
from lowrank_train.bench.grid import positive
from lowrank_train.bench.report import Report, markdown, origin, output_folder, publish
from lowrank_train.bench.steps.optimizer_step import find_device
from lowrank_train.common.errors import UserError
from lowrank_train.common.progress import show_progress
from lowrank_train.common.record import provenance
from lowrank_train.config import methods
from lowrank_train.config.schema import ModelConfig
from lowrank_train.layers.spectral import SpectralLinear
from lowrank_train.models.build import SIZES, architecture, skeleton
from lowrank_train.models.loss import token_loss

__all__ = ["measure", "report"]

BASELINE = "adamw"


@dataclass
class _Trained:
    """One method's model, with what a step needs."""

    name: str
    model: PreTrainedModel
    optimizer: optim.MatrixOptimizer
    step: Callable[[], None]
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of an ordinary step."""
        return statistics.median(self.seconds)


def measure(arguments: Sequence[str]) -> str:
    """Time whole training steps of ``arguments``, and write training.json and training.md into ``--out``.

    Returns:
        The table, in Markdown.

    Raises:
        UserError: arguments that do not fit together.
    """
    given = _parser().parse_args(arguments)
    for key in ("tokens", "seq_len", "rounds", "threads", "layers"):
        if getattr(given, key) is not None:
            positive(f"--{key.replace('_', '-')}", getattr(given, key))
    device = find_device(given.device)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.tokens % given.seq_len:
        raise UserError(f"--tokens {given.tokens} is not a multiple of --seq-len {given.seq_len}")
    folder = output_folder(given.out)
    names = [BASELINE, *(name for name in given.methods if name != BASELINE)]
    torch.manual_seed(0)
    plain = _model(given, device)
    vocabulary = plain.config.vocab_size
    blocks = torch.randint(0, vocabulary, (given.tokens // given.seq_len, given.seq_len + 1), device=device)
    trained = [_prepare(name, plain, blocks, given) for name in names]
    for each in trained:  # the first steps allocate, and choose directions
        each.step()
        each.step()
    for index in show_progress(range(given.rounds), "timing", "rounds", active=True):
        for offset in range(len(trained)):  # in another order each time
            each = trained[(index + offset) % len(trained)]
            each.seconds.append(_timed(each.step, device))
    rows = [_row(each, trained[0]) for each in trained]
    figures = {
        "what": "whole training steps (forward, backward, optimizer), interleaved in one process",
        "provenance": provenance(device),
        **vars(given),
        "rows": rows,
        "rounds_of_svd": [_round(each, device) for each in trained if isinstance(each.optimizer, optim.SST)],
    }
    return publish(folder, "training", figures, report(figures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launch/benchmark.py training-step",
        description="Time whole training steps of methods against dense AdamW, interleaved.",
    )
    parser.add_argument("--model", default="llama_60m", choices=SIZES, help="default: llama_60m, hidden 512")
    parser.add_argument("--layers", type=int, help="of the model, only so many; default: all")
    parser.add_argument("--vocab-size", type=int, default=32000, help="default: 32000")
    parser.add_argument("--tokens", type=int, default=4096, help="per step; default: 4096")
    parser.add_argument("--seq-len", type=int, default=256, help="default: 256")
    parser.add_argument("--rank", type=int, default=64, help="of the methods that have one; default: 64")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="autocast or not")
    parser.add_argument("--frozen-dtype", help="of SST's frozen vectors; default: that of the weights")
    parser.add_argument("--methods", nargs="+", metavar="NAME", default=["sst"], help="beside adamw; default: sst")
    parser.add_argument("--rounds", type=int, default=10, help="measurements of each; default: 10")
    parser.add_argument("--threads", type=int, help="on a CPU; default: torch's")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--out", default="runs/training-step", help="folder of training.json and training.md")
    return parser


def _model(given: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    overrides = {} if given.layers is None else {"num_hidden_layers": given.layers}
    config = architecture(ModelConfig(given.model, overrides), vocab_size=given.vocab_size, seq_len=given.seq_len)
    model = skeleton(config, torch.float32).to_empty(device=device)
    model.init_weights()
    return model


def _prepare(name: str, plain: PreTrainedModel, blocks: Tensor, given: argparse.Namespace) -> _Trained:
    """A converted copy of the model and its optimizer. Raises UserError for an unknown name, or an unfit rank."""
    model = copy.deepcopy(plain)
    settings = {"rank": given.rank, "frozen_dtype": given.frozen_dtype, "lr": 1e-4}
    try:
        method = methods.find(name)
        own = {key: value for key, value in settings.items() if key in method.arguments() and value is not None}
        method.parametrization(own).convert(model)
        optimizer = optim.create(method.optimizer, model, **method.optimizer_arguments(own))
    except ValueError as error:
        raise UserError(str(error)) from None

    def step() -> None:
        with torch.autocast(blocks.device.type, torch.bfloat16, enabled=given.precision == "bfloat16"):
            loss = token_loss(model, blocks[:, :-1], blocks[:, 1:], 1024) / given.tokens
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return _Trained(name, model, optimizer, step)


def _timed(work: Callable[[], None], device: torch.device) -> float:
    """Seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _row(each: _Trained, baseline: _Trained) -> dict[str, Any]:
    ratios = sorted(mine / other for mine, other in zip(each.seconds, baseline.seconds, strict=True))
    return {
        "name": each.name,
        "seconds": each.median,
        "ratio": statistics.median(ratios),
        "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
        "trainable_parameters": sum(p.numel() for p in each.model.parameters() if p.requires_grad),
        "state_bytes": optim.state_bytes(each.optimizer),
    }


def _round(each: _Trained, device: torch.device) -> dict[str, float]:
    """What a re-SVD of all layers takes, and its share of a round of the default schedule."""
    settings = each.optimizer.param_groups[0]
    steps = settings["resample_every"]
    iterations = max(
        -(-min(layer.in_features, layer.out_features) // layer.rank)
        for layer in each.model.modules()
        if isinstance(layer, SpectralLinear)
    )
    for group in each.optimizer.param_groups:
        group.update(resample_every=1, resvd_every=1)
    seconds = statistics.median(_timed(each.step, device) for _ in range(3)) - each.median
    return {
        "seconds": seconds,
        "steps_per_round": steps * iterations,
        "share_of_training": seconds / (seconds + steps * iterations * each.median),
    }


def report(figures: Mapping[str, Any]) -> Report:
    """Return what training.md shows, from the figures of training.json."""
    head = ["method", "s / step", "x adamw", "middle half", "trainable parameters", "optimizer state MiB"]
    rows = []
    for row in figures["rows"]:
        times = [
            f"{row['seconds']:.3f}",
            f"{row['ratio']:.3f}",
            " - ".join(f"{ratio:.3f}" for ratio in row["quartiles"]),
        ]
        rows.append([row["name"], *times, f"{row['trainable_parameters']:,}", f"{row['state_bytes'] / 2**20:.1f}"])
    layers = f"{figures['layers']} layers of " if figures["layers"] else ""
    notes = [
        f"{layers}{figures['model']}, {figures['tokens']:,} tokens a step in sequences of {figures['seq_len']}, "
        f"vocabulary {figures['vocab_size']:,}, rank {figures['rank']}, {figures['precision']}; {figures['rounds']} "
        "rounds on random tokens, medians of paired ratios.",
        *(
            f"A re-SVD of all layers: {found['seconds']:.2f} s, {100 * found['share_of_training']:.3f} % of a round of "
            f"{found['steps_per_round']:,} steps."
            for found in figures["rounds_of_svd"]
        ),
        origin(figures["provenance"]),
    ]
    return Report("Whole training steps", markdown(head, rows), notes)
