"""Training on a graph: build, then one loop over epochs, each a step on the whole graph."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import optim
from lowrank_train import parallel
from lowrank_train.checkpoint import find_checkpoint, last_good
from lowrank_train.config import ParallelConfig
from lowrank_train.errors import Diverged, UserError
from lowrank_train.hyperbolic.graph_config import GraphConfig, load_graph_config
from lowrank_train.hyperbolic.graph_record import GraphRecord
from lowrank_train.hyperbolic.graph_report import write_graph_report
from lowrank_train.hyperbolic.graph_run import GraphRun, build_graph_run, network_arguments
from lowrank_train.metrics import Metrics
from lowrank_train.parallel import Ranks
from lowrank_train.record import peak_memory_gib, provenance
from lowrank_train.run_folder import RunFolder, changed_settings
from lowrank_train.signals import Stop, stop_signals

__all__ = ["train_graph"]


def train_graph(config: GraphConfig) -> GraphRecord:
    """Run (or resume) one training as configured; writes everything into ``config.run_dir``.

    Returns:
        The record of the run, also written as record.json; ``status`` tells whether it finished.

    Raises:
        UserError: bad input, more than one rank, a failed checkpoint, a loss that is not finite.
    """
    with parallel.start(ParallelConfig(), "cpu") as ranks:
        if ranks.world_size > 1:
            raise UserError(
                f"a graph is trained in one process, not in {ranks.world_size}; start launch/hyperbolic.py with python"
            )
        folder = RunFolder(Path(str(config.run_dir)))
        checkpoint = find_checkpoint(config.resume, folder.path / "checkpoints")
        run = build_graph_run(config, ranks)
        if checkpoint is not None:
            run.restore(checkpoint)
        changes = changed_settings(folder.path, config, load_graph_config) if run.progress.epoch else {}
        if changes and run.progress.finished:
            key, (then, now) = next(iter(changes.items()))
            raise UserError(
                f"{folder.path} holds a run that is finished at epoch {run.progress.epoch}; {key} was {then}, is "
                f"{now}: set run_dir to another folder"
            )
        folder.write_config(config)
        metrics = Metrics(folder.path, start=run.progress.epoch, steps=config.epochs, active=True)
        metrics.say(_greeting(run, checkpoint))
        for key, (then, now) in changes.items():
            metrics.say(f"changed since the last session: {key} {then} -> {now}")
        with stop_signals() as stop:
            try:
                _loop(run, metrics, stop)
            finally:
                metrics.close()
            return _finish(run, ranks)


def _loop(run: GraphRun, metrics: Metrics, stop: Stop) -> None:
    config, progress, network = run.config, run.progress, run.network
    parameters = [p for p in network.parameters() if p.requires_grad]
    while not progress.finished and not stop.requested:
        began = time.perf_counter()
        network.train()
        loss = run.task.loss(network, run.points(), config.margin)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if config.clip is None else config.clip))
        if not (math.isfinite(loss.item()) and math.isfinite(norm)):
            _give_up(run)
        run.optimizer.step()
        run.optimizer.zero_grad()
        progress.epoch += 1

        validation, points = _evaluate(run)
        took = time.perf_counter() - began
        progress.seconds += took
        figures = run.optimizer.figures()
        metrics.advance(loss.item(), 1 / took, {**validation, **figures}, unit="epochs/s")
        progress.finished = progress.epoch >= config.epochs or (
            progress.waiting >= config.patience and progress.epoch > config.min_epochs
        )
        if progress.epoch % config.log_every == 0 or progress.finished:
            scalars = {
                "train/loss": loss.item(),
                "train/grad_norm": norm,
                "train/learning_rate": float(run.optimizer.defaults["lr"]),
                **{f"eval/{name}": score for name, score in validation.items()},
                "points/manifold_error": run.network.geometry.error(points),
                "throughput/epochs_per_second": 1 / took,
                "memory/peak_gib": peak_memory_gib(torch.device("cpu")),
                **{f"optimizer/{name}": value for name, value in figures.items()},
            }
            metrics.log(progress.epoch, scalars)
        if metrics.failure is not None:
            raise UserError(
                f"cannot write metrics to {run.folder}: {metrics.failure}; {last_good(run.checkpoints.folder)}; free "
                "space and resume"
            )
        due = config.checkpoint_every > 0 and progress.epoch % config.checkpoint_every == 0
        if due or progress.finished or stop.requested:
            run.save()


@torch.no_grad()
def _evaluate(run: GraphRun) -> tuple[dict[str, float], torch.Tensor]:
    """Scores on validation, and the points; of a new best epoch also those on the test, and the network."""
    run.network.eval()
    points, progress = run.points(), run.progress
    validation = run.task.scores(run.network, points, "validation")
    selection = run.task.selection(validation)
    progress.waiting += 1
    if selection > progress.best_selection:
        progress.best_epoch, progress.best_selection, progress.waiting = progress.epoch, selection, 0
        run.validation, run.test = validation, run.task.scores(run.network, points, "test")
        run.best = {name: value.clone() for name, value in run.network.state_dict().items()}
    return validation, points


def _finish(run: GraphRun, ranks: Ranks) -> GraphRecord:
    config, progress, network = run.config, run.progress, run.network
    network.load_state_dict(run.best)
    network.eval()
    with torch.no_grad():
        points = run.points()
    if progress.finished:
        state = run.layers.plain_state_dict(run.best)
        saved = {"network": network_arguments(run), "precision": config.precision, "state": state}
        try:
            torch.save(saved, run.folder / "network.pt")
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write {run.folder / 'network.pt'}: {error}; free space and resume") from None
    record = GraphRecord(
        status="finished" if progress.finished else "interrupted",
        graph=config.data.graph,
        task=config.data.task,
        protocol=config.data.protocol,
        geometry=config.model.geometry,
        optimizer=dict(config.optimizer),
        headline=run.task.headline,
        test=run.test,
        validation=run.validation,
        epochs=progress.epoch,
        best_epoch=progress.best_epoch,
        seconds=progress.seconds,
        parameters=_plain_parameters(run),
        trainable_parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        manifold_error=network.geometry.error(points),
        time_error=network.geometry.time_error(points),
        optimizer_state_bytes=optim.state_bytes(run.optimizer),
        peak_memory_gib=peak_memory_gib(ranks.device),
        data={"nodes": run.graph.nodes, "edges": len(run.graph.edges), "sha1": run.graph.sha1, **run.task.facts()},
        seed=config.seed,
        precision=config.precision,
        config=asdict(config),
        provenance=provenance(ranks.device),
    )
    try:
        table = write_graph_report(record, run, points)
    except OSError as error:
        where = f"{last_good(run.checkpoints.folder)}; free space and resume"
        raise UserError(f"cannot write the report to {run.folder}: {error}; {where}") from None
    print(f"\n{table}\n", file=sys.stderr)
    return record


def _plain_parameters(run: GraphRun) -> int:
    return sum(value.numel() for value in run.layers.plain_state_dict(run.network.state_dict()).values())


def _give_up(run: GraphRun) -> None:
    raise Diverged(
        f"the loss or the gradient of epoch {run.progress.epoch + 1} is not finite; "
        f"{last_good(run.checkpoints.folder)}. Lower optimizer.lr or clip, and resume"
    )


def _greeting(run: GraphRun, checkpoint: Path | None) -> str:
    data, settings = run.config.data, ", ".join(f"{key} {value}" for key, value in run.config.optimizer.items())
    start = f"resuming from {checkpoint}" if checkpoint else f"writing to {run.folder}"
    return (
        f"{data.graph}, {data.task.replace('_', ' ')}, {data.protocol} protocol: {run.graph.nodes:,} nodes, "
        f"{len(run.graph.edges):,} edges; {run.config.model.geometry}; optimizer {settings}; {start}"
    )
