"""Training a translator: build, one loop over batches, and the translations of validation and test at the end."""

from __future__ import annotations

import math
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

import optim
from lowrank_train import parallel
from lowrank_train.checkpoint import find_checkpoint, last_good
from lowrank_train.config import ParallelConfig
from lowrank_train.errors import Diverged, UserError
from lowrank_train.hyperbolic.bleu import bleu, load_sacrebleu
from lowrank_train.hyperbolic.translation_config import TranslationConfig, load_translation_config
from lowrank_train.hyperbolic.translation_data import IGNORED, Batch, Pairs, padded
from lowrank_train.hyperbolic.translation_record import TranslationRecord
from lowrank_train.hyperbolic.translation_report import write_translation_report
from lowrank_train.hyperbolic.translation_run import (
    TranslationRun,
    build_translation_run,
    load_translator,
    network_arguments,
)
from lowrank_train.hyperbolic.translator import LINEAR_MAPS, Translator
from lowrank_train.metrics import Metrics
from lowrank_train.parallel import Ranks
from lowrank_train.record import peak_memory_gib, provenance
from lowrank_train.run_folder import RunFolder, changed_settings
from lowrank_train.signals import Stop, stop_signals

__all__ = ["train_translation", "translate"]

_SENTENCES = 250
"""Translated at a time."""


def train_translation(config: TranslationConfig) -> TranslationRecord:
    """Run (or resume) one training as configured; writes everything into ``config.run_dir``.

    Returns:
        The record of the run, also written as record.json; ``status`` tells whether it finished.

    Raises:
        UserError: bad input, sacrebleu is not installed, more than one rank, a failed checkpoint, a loss that is not
            finite.
    """
    load_sacrebleu()
    with parallel.start(ParallelConfig(), "cpu") as ranks:
        if ranks.world_size > 1:
            raise UserError(
                f"translation is trained in one process, not in {ranks.world_size}; start launch/hyperbolic.py with "
                "python"
            )
        folder = RunFolder(Path(str(config.run_dir)))
        checkpoint = find_checkpoint(config.resume, folder.path / "checkpoints")
        run = build_translation_run(config, ranks)
        if checkpoint is not None:
            run.restore(checkpoint)
        changes = changed_settings(folder.path, config, load_translation_config) if run.progress.step else {}
        if changes and run.finished:
            key, (then, now) = next(iter(changes.items()))
            raise UserError(
                f"{folder.path} holds a run that is finished at step {run.progress.step}; {key} was {then}, is {now}: "
                "set run_dir to another folder"
            )
        folder.write_config(config)
        metrics = Metrics(folder.path, start=run.progress.step, steps=config.steps, active=True)
        metrics.say(_greeting(run, checkpoint))
        for key, (then, now) in changes.items():
            metrics.say(f"changed since the last session: {key} {then} -> {now}")
        with stop_signals() as stop:
            try:
                _loop(run, metrics, stop)
            finally:
                metrics.close()
            return _finish(run, ranks)


def translate(network: Translator, pairs: Pairs, *, end: int, longest: int) -> list[list[int]]:
    """Tokens of the translations of all sources, in their order; sentences of like lengths are translated together."""
    network.eval()
    order = sorted(range(len(pairs.source)), key=lambda index: len(pairs.source[index]))
    written: dict[int, list[int]] = {}
    for start in range(0, len(order), _SENTENCES):
        indices = order[start : start + _SENTENCES]
        batch = padded(pairs, indices, end)
        words = network.translate(batch.source, batch.lengths, end=end, longest=longest)
        written.update(zip(indices, words, strict=True))
    return [written[index] for index in range(len(order))]


def batch_loss(network: Translator, batch: Batch, smoothing: float = 0.0, *, mean: bool = True) -> Tensor:
    """Cross-entropy of the targets, nats: per token, or the sum."""
    scores = network(batch.source, batch.lengths, batch.read)
    return nn.functional.cross_entropy(
        scores.flatten(0, 1),
        batch.labels.flatten(),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
        reduction="mean" if mean else "sum",
    )


def _loop(run: TranslationRun, metrics: Metrics, stop: Stop) -> None:
    config, progress, network = run.config, run.progress, run.network
    parameters = [p for p in network.parameters() if p.requires_grad]
    batches = run.training_batches()
    while not run.finished and not stop.requested:
        began = time.perf_counter()
        network.train()
        rate = run.set_learning_rate()
        batch = next(batches)
        loss = batch_loss(network, batch, config.label_smoothing)
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if config.clip is None else config.clip))
        if not (math.isfinite(loss.item()) and math.isfinite(norm)):
            raise Diverged(
                f"the loss or the gradient of step {progress.step + 1} is not finite; "
                f"{last_good(run.checkpoints.folder)}. Lower optimizer.lr or clip, and resume"
            )
        run.optimizer.step()
        run.optimizer.zero_grad()
        progress.step += 1

        took = time.perf_counter() - began
        progress.seconds += took
        tokens = int((batch.labels != IGNORED).sum())
        figures = run.optimizer.figures()
        evaluating = config.evaluate_every > 0 and progress.step % config.evaluate_every == 0
        scalars = {}
        if evaluating or run.finished:
            began = time.perf_counter()
            progress.validation_loss = _validation_loss(run)
            progress.seconds += time.perf_counter() - began
            scalars["eval/loss"] = progress.validation_loss
        validation = {} if progress.validation_loss is None else {"validation": progress.validation_loss}
        metrics.advance(loss.item(), tokens / took, {**validation, **figures})
        if progress.step % config.log_every == 0 or scalars:
            scalars |= {
                "train/loss": loss.item(),
                "train/grad_norm": norm,
                "train/learning_rate": rate,
                "throughput/tokens_per_second": tokens / took,
                "memory/peak_gib": peak_memory_gib(torch.device("cpu")),
                **{f"optimizer/{name}": value for name, value in figures.items()},
            }
            points = network.points().values()
            if points:
                scalars["points/manifold_error"] = max(network.parts.error(x) for x in points)
            metrics.log(progress.step, scalars)
        if metrics.failure is not None:
            raise UserError(
                f"cannot write metrics to {run.folder}: {metrics.failure}; {last_good(run.checkpoints.folder)}; free "
                "space and resume"
            )
        due = config.checkpoint_every > 0 and progress.step % config.checkpoint_every == 0
        if due or run.finished or stop.requested:
            run.save()


@torch.no_grad()
def _validation_loss(run: TranslationRun) -> float:
    """Nats per token of the whole part, without label smoothing."""
    run.network.eval()
    pairs = run.data.parts["validation"]
    order = sorted(range(len(pairs.source)), key=lambda index: len(pairs.target[index]))
    total, tokens = 0.0, sum(len(target) for target in pairs.target)
    for start in range(0, len(order), _SENTENCES):
        batch = padded(pairs, order[start : start + _SENTENCES], run.data.end)
        total += float(batch_loss(run.network, batch, mean=False))
    return total / tokens


@torch.no_grad()
def _errors(run: TranslationRun) -> tuple[dict[str, float], dict[str, float]]:
    """How far points are off the manifold: parameters, and what encoder and decoder make of the first sentences."""
    network, pairs = run.network.eval(), run.data.parts["validation"]
    batch = padded(pairs, list(range(min(_SENTENCES, len(pairs.source)))), run.data.end)
    memory, seen = network.encode(batch.source, batch.lengths)
    outputs = {"encoder": memory, "decoder": network.decode(batch.read, memory, seen)}
    points = {**network.points(), **outputs}
    return (
        {name: network.parts.error(x) for name, x in points.items()},
        {name: network.parts.time_error(x) for name, x in points.items()},
    )


def _finish(run: TranslationRun, ranks: Ranks) -> TranslationRecord:
    config, progress, network = run.config, run.progress, run.network
    plain = run.layers.plain_state_dict(network.state_dict())
    scores: dict[str, float] = {}
    translations: dict[str, list[str]] = {}
    signature = ""
    if run.finished:
        try:
            torch.save(
                {"network": network_arguments(run), "precision": config.precision, "state": plain},
                run.folder / "network.pt",
            )
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write {run.folder / 'network.pt'}: {error}; free space and resume") from None
        merged = load_translator(run.folder)  # what a user gets is what is scored
        for part in ("validation", "test"):
            pairs = run.data.parts[part]
            words = translate(merged, pairs, end=run.data.end, longest=config.longest)
            translations[part] = run.data.text(words)
            scores[part], signature = bleu(translations[part], pairs.target_text)
    manifold_error, time_error = _errors(run)
    record = TranslationRecord(
        status="finished" if run.finished else "interrupted",
        geometry=config.model.geometry,
        optimizer=dict(config.optimizer),
        bleu=scores,
        bleu_signature=signature,
        validation_loss=progress.validation_loss,
        steps=progress.step,
        epochs=run.epochs(),
        seconds=progress.seconds,
        parameters=sum(value.numel() for value in plain.values()),
        trainable_parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        trainable_in_layers=sum(
            p.numel() for name, p in network.named_parameters() if p.requires_grad and re.search(LINEAR_MAPS, name)
        ),
        manifold_error=manifold_error,
        time_error=time_error,
        optimizer_state_bytes=optim.state_bytes(run.optimizer),
        peak_memory_gib=peak_memory_gib(ranks.device),
        data={**run.data.facts(), "sha1": run.data.sha1},
        seed=config.seed,
        precision=config.precision,
        config=asdict(config),
        provenance=provenance(ranks.device),
    )
    try:
        table = write_translation_report(record, run, translations)
    except OSError as error:
        where = f"{last_good(run.checkpoints.folder)}; free space and resume"
        raise UserError(f"cannot write the report to {run.folder}: {error}; {where}") from None
    print(f"\n{table}\n", file=sys.stderr)
    return record


def _greeting(run: TranslationRun, checkpoint: Path | None) -> str:
    data, settings = run.config.data, ", ".join(f"{key} {value}" for key, value in run.config.optimizer.items())
    start = f"resuming from {checkpoint}" if checkpoint else f"writing to {run.folder}"
    return (
        f"{data.source} to {data.target}: {len(run.data.parts['train'].source):,} pairs, {len(run.data.tokenizer):,} "
        f"tokens; {run.config.model.geometry}; optimizer {settings}; {start}"
    )
