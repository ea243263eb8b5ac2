"""A multilayer perceptron on scikit-learn's handwritten digits: full, LoRA, ReLoRA* and SST side by side, in minutes.

After appendix J of Zhao et al. (arXiv 2405.15481), which trains 784-512-512-512-C on MNIST, 100 epochs, rank 16, an
epoch per iteration; here 64-128-128-128-10 on 1,437 images of 8 x 8 pixels, rank 4, the same share of the width. The
last layer, whose smaller side is the number of classes, stays dense. Every method gets the same learning rates and the
best of them by mean test accuracy over the seeds.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_train import optim
from lowrank_train.bench.grid import Grid, Group, Row, failures, groups, sweep_arguments, sweep_panel, table
from lowrank_train.bench.report import Report, origin, output_folder, publish, rate
from lowrank_train.bench.trainings import Trainer, keep_record
from lowrank_train.common.errors import UserError
from lowrank_train.common.record import provenance
from lowrank_train.config.settings import setting
from lowrank_train.layers.lora import add_adapters
from lowrank_train.layers.spectral import to_spectral
from lowrank_train.optim.core.coverage import unwarned

__all__ = ["METHODS", "DigitsConfig", "images_and_classes", "measure", "report", "train_digits"]

WIDTH, RANK, CLASSES, BATCH = 128, 4, 10, 64
HIDDEN_LAYERS = r"^[024]$"

FIGURES = ("accuracy", "loss", "trained")

Data = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass
class DigitsConfig:
    """One training."""

    method: str = setting("full", "one of METHODS")
    lr: float = setting(1e-3, "learning rate, constant")
    seed: int = setting(0, "of initial weights and of the order of the images")
    epochs: int = setting(100, "passes over the images; also the number of iterations of ReLoRA* and SST")
    run_dir: str | None = setting(None, "folder of the record", path=True)


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


def train_digits(config: DigitsConfig, data: Data) -> dict[str, float]:
    """Train one method.

    Args:
        config: of the training.
        data: images (n, 64) and classes (n,) to train on, and those to test on.

    Returns:
        ``accuracy`` in per cent and ``loss``, the mean cross-entropy, on the test images; ``trained``, the number of
        trainable parameters.
    """
    images, classes, test_images, test_classes = data
    torch.manual_seed(config.seed)
    widths = [images.shape[1], WIDTH, WIDTH, WIDTH]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, CLASSES))
    optimizer = METHODS[config.method](model, config.lr, len(images) // BATCH)
    order = torch.Generator().manual_seed(config.seed)
    for _ in range(config.epochs):
        for batch in torch.randperm(len(images), generator=order).split(BATCH)[: len(images) // BATCH]:
            functional.cross_entropy(model(images[batch]), classes[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        scores = model(test_images)
    accuracy = 100 * float((scores.argmax(1) == test_classes).float().mean())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"accuracy": accuracy, "loss": float(functional.cross_entropy(scores, test_classes)), "trained": trained}


def measure(arguments: Sequence[str]) -> str:
    """Train every method at every rate and seed ``arguments`` ask for; write digits.json, .md and .png into ``--out``.

    Returns:
        The table, in Markdown.

    Raises:
        UserError: numbers out of range, an unwritable folder; scikit-learn, which brings the images, is missing; a
            training in the folder was made with other settings.
    """
    given = sweep_arguments(arguments, "digits", __doc__, {"epochs": (100, "default: 100")}, [1e-3, 3e-3, 1e-2])
    folder, data = output_folder(given.out), images_and_classes()

    def config(method: str, lr: float, seed: int) -> DigitsConfig:
        return DigitsConfig(method, lr, seed, given.epochs, str(folder / f"{method}-lr={rate(lr)}-seed={seed}"))

    grid = Grid(
        rows=[Row({"method": method}, given.lr, given.seeds) for method in METHODS],
        config=config,
        trainer=Trainer(lambda config: keep_record(config, train_digits(config, data)), needs=FIGURES),
    )
    runs = [result.run() for result in grid.train()]
    figures = {"what": __doc__, "provenance": provenance(torch.device("cpu")), **vars(given), "runs": runs}
    return publish(folder, "digits", figures, report(figures))


def report(figures: Mapping[str, Any]) -> Report:
    """Return what digits.md shows, from the figures of digits.json."""
    rows = groups(figures["runs"], "method", score=lambda run: run["accuracy"])
    head = ["method", "test accuracy, %", "of each seed", "test loss", "lr", "trainable parameters"]

    def cells(row: Group) -> list[str]:
        accuracies = ", ".join(f"{accuracy:.1f}" for accuracy in row.values("accuracy"))
        figures = [f"{row.mean('accuracy'):.2f}", accuracies, f"{row.mean('loss'):.3f}"]
        return [*figures, f"{row.rate:g}", f"{row.values('trained')[0]:,}"]

    notes = [*failures(figures["runs"]), origin(figures["provenance"])]
    panel = sweep_panel("test accuracy, %", {row.label: (row.rates, row.scores) for row in rows})
    return Report("Digits", table(head, rows, cells), notes, [panel])


def images_and_classes() -> Data:
    """Return images and classes; a fixed fifth is for testing."""
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise UserError(f"the digits come with scikit-learn ({error}); pip install scikit-learn") from None
    images, classes = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images, dtype=torch.float32)[order] / 16, torch.tensor(classes)[order]
    test = len(images) // 5
    return x[test:], y[test:], x[:test], y[:test]
