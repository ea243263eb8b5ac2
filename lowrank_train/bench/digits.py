"""A multilayer perceptron on scikit-learn's handwritten digits: full, LoRA, ReLoRA* and SST side by side, in minutes.

After appendix J of Zhao et al. (arXiv 2405.15481), which trains 784-512-512-512-C on MNIST, 100 epochs, rank 16, an
epoch per iteration; here 64-128-128-128-10 on 1,437 images of 8 x 8 pixels, rank 4, the same share of the width. The
last layer, whose smaller side is the number of classes, stays dense. Every method gets the same learning rates and the
best of them by mean test accuracy over the seeds.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_train import optim
from lowrank_train.bench.optimizer_step import output_folder, positive
from lowrank_train.common.errors import UserError
from lowrank_train.common.progress import show_progress
from lowrank_train.common.record import provenance
from lowrank_train.common.small_files import write_text
from lowrank_train.layers.lora import add_adapters
from lowrank_train.layers.spectral import to_spectral
from lowrank_train.optim.core.coverage import unwarned

__all__ = ["METHODS", "measure_digits", "train_digits"]

WIDTH, RANK, CLASSES, BATCH = 128, 4, 10, 64
HIDDEN_LAYERS = r"^[024]$"

Data = tuple[Tensor, Tensor, Tensor, Tensor]


def _full(model: nn.Module, lr: float, steps_per_epoch: int) -> optim.MatrixOptimizer:
    return optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)


def _lora(model: nn.Module, lr: float, steps_per_epoch: int) -> optim.MatrixOptimizer:
    add_adapters(model, RANK, layers=HIDDEN_LAYERS)
    return optim.create("adamw", model, lr=lr, weight_decay=0.0)


def _relora(model: nn.Module, lr: float, steps_per_epoch: int) -> optim.MatrixOptimizer:
    add_adapters(model, RANK, layers=HIDDEN_LAYERS)
    with unwarned():  # the output layer is left to AdamW, as in the paper
        return optim.create("relora", model, lr=lr, restart_every=steps_per_epoch, warmup_steps=2, weight_decay=0.0)


def _sst(model: nn.Module, lr: float, steps_per_epoch: int) -> optim.MatrixOptimizer:
    to_spectral(model, RANK, layers=HIDDEN_LAYERS)
    with unwarned():
        return optim.SST(model, lr=lr, resample_every=steps_per_epoch, warmup_steps=2)


METHODS: dict[str, Callable[[nn.Module, float, int], optim.MatrixOptimizer]] = {
    "full": _full,
    "lora": _lora,
    "relora": _relora,
    "sst": _sst,
}
"""Convert a model in place and give its optimizer, from (model, learning rate, steps per epoch)."""


def train_digits(name: str, data: Data, *, lr: float, epochs: int, seed: int) -> tuple[float, float, int]:
    """Train one method.

    Args:
        name: one of ``METHODS``.
        data: images (n, 64) and classes (n,) to train on, and those to test on.
        lr: learning rate, constant.
        epochs: passes over the training images; also the number of iterations of ReLoRA* and SST.
        seed: of initial weights and of the order of the images.

    Returns:
        Accuracy in per cent and mean cross-entropy on the test images, and the number of trainable parameters.
    """
    images, classes, test_images, test_classes = data
    torch.manual_seed(seed)
    widths = [images.shape[1], WIDTH, WIDTH, WIDTH]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))
    optimizer = METHODS[name](model, lr, len(images) // BATCH)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=order).split(BATCH)[: len(images) // BATCH]:
            functional.cross_entropy(model(images[batch]), classes[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        scores = model(test_images)
    accuracy = 100 * float((scores.argmax(1) == test_classes).float().mean())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return accuracy, float(functional.cross_entropy(scores, test_classes)), trained


def measure_digits(arguments: Sequence[str]) -> str:
    """Train every method at every rate and seed ``arguments`` ask for; write digits.json and digits.md into ``--out``.

    Returns:
        The table, in Markdown.

    Raises:
        UserError: numbers out of range, an unwritable folder; scikit-learn, which brings the images, is missing.
    """
    parser = argparse.ArgumentParser(prog="launch/benchmark.py digits", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=100, help="default: 100")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2], help="default: 1e-3 3e-3 1e-2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", default="runs/digits", help="folder of digits.json and digits.md")
    given = parser.parse_args(arguments)
    positive("--epochs", given.epochs)
    if not all(0 < lr < math.inf for lr in given.lr):
        raise UserError(f"--lr {' '.join(map(str, given.lr))}; expected numbers > 0")
    folder = output_folder(given.out)
    data = _images()
    jobs = [(name, lr, seed) for name in METHODS for lr in given.lr for seed in given.seeds]
    runs = []
    for name, lr, seed in show_progress(jobs, "training", "runs", active=True):
        accuracy, loss, trained = train_digits(name, data, lr=lr, epochs=given.epochs, seed=seed)
        runs.append({"method": name, "lr": lr, "seed": seed, "accuracy": accuracy, "loss": loss, "trained": trained})
    figures = {"what": __doc__, "provenance": provenance(torch.device("cpu")), **vars(given), "runs": runs}
    write_text(folder / "digits.json", json.dumps(figures, indent=2) + "\n")
    table = _table(runs, given.lr)
    write_text(folder / "digits.md", f"# Digits\n\n{table}\n")
    return table


def _table(runs: list[dict[str, Any]], rates: Sequence[float]) -> str:
    lines = ["| method | test accuracy, % | of each seed | test loss | lr | trainable parameters |"]
    lines += ["| --- | ---: | --- | ---: | ---: | ---: |"]
    for name in METHODS:
        by_rate = {lr: [run for run in runs if run["method"] == name and run["lr"] == lr] for lr in rates}
        best = max(rates, key=lambda lr: statistics.mean(run["accuracy"] for run in by_rate[lr]))
        own = by_rate[best]
        accuracies = ", ".join(f"{run['accuracy']:.1f}" for run in own)
        mean, loss = (statistics.mean(run[key] for run in own) for key in ("accuracy", "loss"))
        lines.append(f"| {name} | {mean:.2f} | {accuracies} | {loss:.3f} | {best:g} | {own[0]['trained']:,} |")
    return "\n".join(lines)


def _images() -> Data:
    """A fixed fifth is for testing."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise UserError(f"the digits come with scikit-learn ({error}); pip install scikit-learn") from None
    images, classes = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(classes)[order]
    test = len(images) // 5
    return x[test:], y[test:], x[:test], y[:test]
