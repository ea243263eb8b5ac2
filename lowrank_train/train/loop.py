"""Pretraining: build, then one loop."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, get_total_norm

from lowrank_train import optim
from lowrank_train.common.clock import DeviceClock
from lowrank_train.common.errors import Diverged
from lowrank_train.common.ranks import start
from lowrank_train.common.record import RunRecord, peak_memory_gib, perplexity, provenance
from lowrank_train.config.schema import Config
from lowrank_train.data.export_files import export_dtype, source_folder
from lowrank_train.files.checkpoint_folder import find_checkpoint, last_good
from lowrank_train.memory.check import check_size, check_step
from lowrank_train.models import build as models
from lowrank_train.models.evaluate import evaluate
from lowrank_train.models.export import export_huggingface
from lowrank_train.peft.export import export_adapter
from lowrank_train.plan import Plan
from lowrank_train.text.labels import count_labels, positions, split
from lowrank_train.train.metrics import Metrics
from lowrank_train.train.report import write_report
from lowrank_train.train.run import Run
from lowrank_train.train.schedule import learning_rate_factor
from lowrank_train.train.session import hold_session, show_report

__all__ = ["train"]


def train(config: Config) -> RunRecord:
    """Run (or resume) one pretraining as configured; writes everything into ``config.run_dir``.

    Returns:
        The record of the run, also written as record.json; ``status`` tells whether it finished.

    Raises:
        UserError: bad input, a failed checkpoint, or losses that stay non-finite.
    """
    with start(config.device, config.parallel.shards, config.parallel.replicas) as ranks:
        check_size(config, ranks.world_size)
        plan = Plan.of(config, world_size=ranks.world_size)
        check_step(plan, ranks)
        return hold_session(config, ranks, build=lambda: Run.build(plan, ranks), train=_steps, finish=_finish)


def _steps(run: Run, metrics: Metrics) -> Iterator[None]:
    """Train, with an evaluation where one is due; yields after every step."""
    config, ranks, progress = run.config, run.ranks, run.progress
    rate_factor = learning_rate_factor(config.schedule, config.steps)
    optimizer_clock = DeviceClock(ranks.device)
    if progress.step == 0 or (run.finished and progress.validation_step != progress.step):
        _evaluate_and_log(run, metrics)

    while not run.finished:
        began = time.perf_counter()
        factor = rate_factor(progress.step)
        run.set_learning_rate(factor)
        loss, norm = _update_in_backward(run) if config.fused_backward else _update(run, optimizer_clock)
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            progress.train_loss = loss
        run.optimizer.zero_grad()
        progress.bad_in_a_row = 0 if finite else progress.bad_in_a_row + 1
        progress.skipped_steps += not finite
        progress.step += 1
        progress.tokens += config.tokens_per_step
        took = time.perf_counter() - began
        progress.seconds += took
        progress.optimizer_seconds += optimizer_clock.take()
        progress.peak_memory_gib = max(progress.peak_memory_gib, peak_memory_gib(ranks.device))

        figures = run.optimizer.figures()
        metrics.advance(loss, config.tokens_per_step / took, figures)
        if progress.step % config.log_every == 0 or not finite:
            scalars = {
                "train/loss": loss,
                "train/grad_norm": norm,
                "train/learning_rate": run.optimizer.defaults["lr"] * factor,
                "train/tokens": progress.tokens,
                "train/skipped_steps": progress.skipped_steps,
                "throughput/tokens_per_second": config.tokens_per_step / took,
                "memory/peak_gib": progress.peak_memory_gib,
                **({} if run.predicted is None else {"memory/predicted_gib": run.predicted.peak / 2**30}),
                **{f"optimizer/{name}": value for name, value in figures.items()},
            }
            metrics.log(progress.step, scalars)
        if progress.bad_in_a_row >= config.max_bad_steps:
            _give_up(run)
        every = config.evaluation.every
        if run.finished or (every > 0 and progress.step % every == 0):
            _evaluate_and_log(run, metrics)
        yield


def _update(run: Run, optimizer_clock: DeviceClock) -> tuple[float, float]:
    """One step; returns its mean loss and the norm of the gradient before clipping, the same on all ranks.

    Nothing is changed if one of them is not finite.
    """
    config, ranks = run.config, run.ranks
    total = torch.zeros((), device=ranks.device)
    for loss in _losses(run):
        loss.backward()
        total = total + loss.detach()
    norm = get_total_norm([p.grad for p in run.model.parameters() if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if config.clip is not None:
        together = [list(run.model.parameters())]
        for clipped in together if config.clip_by == "global" else [[p] for p in run.model.parameters()]:
            clip_grad_norm_(clipped, config.clip)
    mean = ranks.sum(total) / ranks.world_size
    figures: list[float] = torch.stack([mean, norm.to(mean.dtype)]).tolist()  # the step's one wait for the device
    if all(map(math.isfinite, figures)):
        with optimizer_clock:
            run.optimizer.step()
        if run.adapted is not None and run.adapted.budget is not None:
            run.adapted.budget.update(run.model, run.progress.step + 1)
    return figures[0], figures[1]


def _update_in_backward(run: Run) -> tuple[float, float]:
    """As ``_update``, where each parameter is updated while backward goes on.

    A loss that is not finite is seen before its backward pass, so that nothing is changed. Raises Diverged if a
    gradient was not: by then others have been used.
    """
    ranks, in_backward = run.ranks, run.in_backward
    assert in_backward is not None
    mean = 0.0
    for loss in _losses(run):
        part = (ranks.sum(loss.detach().clone()) / ranks.world_size).item()
        mean += part
        if not math.isfinite(part):
            in_backward.discard()
            return mean, math.nan
        loss.backward()
    run.optimizer.step()
    assert in_backward.grad_norm is not None
    norm = in_backward.grad_norm.item()
    if not math.isfinite(norm):
        run.checkpoints.wait()
        raise Diverged(
            f"a gradient of step {run.progress.step + 1} was not finite, and with fused_backward=true others have been "
            f"used already; {last_good(run.checkpoints.folder)}. Lower optimizer.lr, lengthen schedule.warmup_steps or "
            "lower clip, and resume"
        )
    return mean, norm


def _losses(run: Run) -> Iterator[Tensor]:
    """The part of each micro-batch in the step's mean loss.

    Each micro-batch's gradient is reduced at once: accumulating whole gradients instead would save messages and cost
    a model's worth of memory on every rank. Gradients are averaged over ranks, so each divides by its even share of
    the step's labels: a token weighs the same whichever rank it is on.
    """
    config, ranks = run.config, run.ranks
    sequences = config.tokens_per_step // config.seq_len
    blocks = ranks.each(lambda: run.data.train.take(sequences, ranks.rank, ranks.world_size))
    counted = int(ranks.sum(torch.tensor(count_labels(blocks))))  # on the CPU: no wait for the device
    share = counted / ranks.world_size if counted else 1.0
    parts = blocks.to(ranks.device).chunk(run.plan.passes)
    for part in parts:
        apart = positions(part) if config.data.separates else None
        loss = run.model.token_loss(*split(part), config.loss_chunk, apart) / share
        if run.adapted is not None and run.adapted.budget is not None:
            loss = loss + run.model.adapter_penalty() / len(parts)
        yield loss


def _evaluate_and_log(run: Run, metrics: Metrics) -> None:
    loss = evaluate(run.model, run.data.validation, run.config, run.ranks)
    progress = run.progress
    progress.validation_loss, progress.validation_step = loss, progress.step
    if progress.step == 0:
        progress.initial_validation_loss = loss
    metrics.log(progress.step, {"eval/loss": loss, "eval/perplexity": perplexity(loss)})


def _finish(run: Run) -> RunRecord:
    config, ranks, progress = run.config, run.ranks, run.progress
    if run.finished:
        _export(run)
    record = RunRecord(
        status="finished" if run.finished else "interrupted",
        model=config.model.name,
        parameters=models.parameter_count(run.model),
        optimizer=dict(config.optimizer),
        steps=progress.step,
        tokens=progress.tokens,
        seconds=progress.seconds,
        optimizer_seconds=progress.optimizer_seconds,
        tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
        train_loss=progress.train_loss,
        initial_validation_loss=progress.initial_validation_loss,
        validation_loss=progress.validation_loss,
        validation_step=progress.validation_step,
        validation_tokens=count_labels(run.data.validation),
        skipped_steps=progress.skipped_steps,
        predicted_peak_gib=None if run.predicted is None else run.predicted.peak / 2**30,
        peak_memory_gib=max(progress.peak_memory_gib, peak_memory_gib(ranks.device)),
        optimizer_state_bytes=optim.state_bytes(run.optimizer),
        predicted_optimizer_state_bytes=optim.layout_bytes(
            run.optimizer, world_size=run.plan.mesh.shards, shard=run.shard
        ),
        world_size=ranks.world_size,
        precision=config.precision,
        seed=config.seed,
        data=run.data.description,
        config=asdict(config),
        provenance=provenance(ranks.device),
        trained_parameters=run.trained_parameters,
    )
    show_report(run, lambda: write_report(record, run.folder, find_checkpoint("auto", run.checkpoints.folder)))
    return record


def _export(run: Run) -> None:
    name, tokenizer = run.config.model.name, run.data.tokenizer
    source, dtype = source_folder(name), export_dtype(name, run.config.export.dtype)
    if run.adapted is None:
        folder = run.folder / "huggingface"
        export_huggingface(run.model, run.plan.layers, tokenizer, folder, run.ranks, source=source, dtype=dtype)
        return
    assert source is not None  # an adapter is put into a trained model
    reason = export_adapter(run.adapted, tokenizer, run.folder, run.ranks, source=source, dtype=dtype)
    if reason is not None and run.ranks.is_first:
        print(
            f"adapter.name={run.config.adapter.name} cannot be merged into the model ({reason}); "
            f"{run.folder / 'adapter'} holds it in peft's format, to be used with the model",
            file=sys.stderr,
        )


def _give_up(run: Run) -> None:
    run.checkpoints.wait()
    run.check_finite()
    raise Diverged(
        f"the loss or the gradient was not finite for {run.progress.bad_in_a_row} steps in a row, up to step "
        f"{run.progress.step}; these steps changed nothing; {last_good(run.checkpoints.folder)}. Lower "
        "optimizer.lr, lengthen schedule.warmup_steps or lower clip, and resume"
    )
