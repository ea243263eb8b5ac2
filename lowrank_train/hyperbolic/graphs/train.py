"""Training on a graph: one loop over epochs, each a step on the whole graph, and the record at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from lowrank_train.hyperbolic.graphs.config import GraphConfig
from lowrank_train.hyperbolic.graphs.record import GraphRecord
from lowrank_train.hyperbolic.graphs.report import write_graph_report
from lowrank_train.hyperbolic.graphs.run import GraphRun, build_graph_run
from lowrank_train.hyperbolic.run import train_alone
from lowrank_train.train.metrics import Metrics
from lowrank_train.train.session import show_report

__all__ = ["train_graph"]


def train_graph(config: GraphConfig) -> GraphRecord:
    """Run (or resume) one training as configured; writes everything into ``config.run_dir``.

    Returns:
        The record of the run, also written as record.json; ``status`` tells whether it finished.

    Raises:
        UserError: bad input, more than one rank, a failed checkpoint, a loss that is not finite.
    """
    return train_alone(config, build_graph_run, _epochs, _finish)


def _epochs(run: GraphRun, metrics: Metrics) -> Iterator[None]:
    """Train, each epoch a step on the whole graph; yields after every epoch."""
    config, progress = run.config, run.progress
    while not run.finished:
        began = time.perf_counter()
        run.model.train()
        loss = run.task.loss(run.model, run.points(), config.margin)
        norm = run.step(loss)

        validation, points = _evaluate(run)
        took = time.perf_counter() - began
        progress.seconds += took
        metrics.advance(loss.item(), 1 / took, {**validation, **run.optimizer.figures()}, unit="epochs/s")
        progress.finished = progress.done >= config.epochs or (
            progress.waiting >= config.patience and progress.done > config.min_epochs
        )
        if progress.done % config.log_every == 0 or progress.finished:
            scalars = {
                **run.scalars(loss, norm, float(run.optimizer.defaults["lr"])),
                **{f"eval/{name}": score for name, score in validation.items()},
                "points/manifold_error": run.model.geometry.error(points),
                "throughput/epochs_per_second": 1 / took,
            }
            metrics.log(progress.done, scalars)
        yield


@torch.no_grad()
def _evaluate(run: GraphRun) -> tuple[dict[str, float], torch.Tensor]:
    """Scores on validation, and the points; of a new best epoch also those on the test, and the network."""
    run.model.eval()
    points, progress = run.points(), run.progress
    validation = run.task.scores(run.model, points, "validation")
    selection = run.task.selection(validation)
    progress.waiting += 1
    if selection > progress.best_selection:
        progress.best_epoch, progress.best_selection, progress.waiting = progress.done, selection, 0
        progress.validation, progress.test = validation, run.task.scores(run.model, points, "test")
        progress.best = {name: value.clone() for name, value in run.model.state_dict().items()}
    return validation, points


def _finish(run: GraphRun) -> GraphRecord:
    config, progress, network = run.config, run.progress, run.model
    network.load_state_dict(progress.best)
    network.eval()
    with torch.no_grad():
        points = run.points()
    if run.finished:
        run.write_network(progress.best)
    record = GraphRecord(
        **run.figures(),
        graph=config.data.graph,
        task=config.data.task,
        protocol=config.data.protocol,
        headline=run.task.headline,
        test=progress.test,
        validation=progress.validation,
        epochs=progress.done,
        best_epoch=progress.best_epoch,
        manifold_error=network.geometry.error(points),
        time_error=network.geometry.time_error(points),
        data={"nodes": run.graph.nodes, "edges": len(run.graph.edges), "sha1": run.sha1, **run.task.facts()},
    )
    show_report(run, lambda: write_graph_report(record, run, points))
    return record
