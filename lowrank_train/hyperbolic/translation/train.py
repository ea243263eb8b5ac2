"""Training a translator: one loop over batches, and the translations of validation and test at the end."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lowrank_train.hyperbolic.run import train_alone
from lowrank_train.hyperbolic.translation.bleu import bleu, load_sacrebleu
from lowrank_train.hyperbolic.translation.config import TranslationConfig
from lowrank_train.hyperbolic.translation.data import Batch, Pairs, padded
from lowrank_train.hyperbolic.translation.network import LINEAR_MAPS, Translator
from lowrank_train.hyperbolic.translation.record import TranslationRecord
from lowrank_train.hyperbolic.translation.report import write_translation_report
from lowrank_train.hyperbolic.translation.run import TranslationRun, build_translation_run, load_translator
from lowrank_train.text.labels import IGNORED
from lowrank_train.train.metrics import Metrics
from lowrank_train.train.session import show_report

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
    return train_alone(config, build_translation_run, _steps, _finish)


def translate(network: Translator, pairs: Pairs, *, end: int, longest: int) -> list[list[int]]:
    """Return tokens of the translations of all sources, in their order; sentences of similar length are translated
    together.
    """
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


def _steps(run: TranslationRun, metrics: Metrics) -> Iterator[None]:
    """Train on one batch after another; yields after every step."""
    config, progress, network = run.config, run.progress, run.model
    batches = run.training_batches()
    while not run.finished:
        began = time.perf_counter()
        network.train()
        rate = run.set_learning_rate()
        batch = next(batches)
        loss = batch_loss(network, batch, config.label_smoothing)
        norm = run.step(loss)

        took = time.perf_counter() - began
        progress.seconds += took
        tokens = int((batch.labels != IGNORED).sum())
        evaluating = config.evaluate_every > 0 and progress.done % config.evaluate_every == 0
        scalars = {}
        if evaluating or run.finished:
            began = time.perf_counter()
            progress.validation_loss = _validation_loss(run)
            progress.seconds += time.perf_counter() - began
            scalars["eval/loss"] = progress.validation_loss
        validation = {} if progress.validation_loss is None else {"validation": progress.validation_loss}
        metrics.advance(loss.item(), tokens / took, {**validation, **run.optimizer.figures()})
        if progress.done % config.log_every == 0 or scalars:
            scalars |= {**run.scalars(loss, norm, rate), "throughput/tokens_per_second": tokens / took}
            points = network.points().values()
            if points:
                scalars["points/manifold_error"] = max(network.parts.error(x) for x in points)
            metrics.log(progress.done, scalars)
        yield


@torch.no_grad()
def _validation_loss(run: TranslationRun) -> float:
    """Nats per token of the whole part, without label smoothing."""
    run.model.eval()
    pairs = run.data.parts["validation"]
    order = sorted(range(len(pairs.source)), key=lambda index: len(pairs.target[index]))
    total, tokens = 0.0, sum(len(target) for target in pairs.target)
    for start in range(0, len(order), _SENTENCES):
        batch = padded(pairs, order[start : start + _SENTENCES], run.data.end)
        total += float(batch_loss(run.model, batch, mean=False))
    return total / tokens


@torch.no_grad()
def _errors(run: TranslationRun) -> tuple[dict[str, float], dict[str, float]]:
    """How far points are off the manifold: parameters, and what encoder and decoder make of the first sentences."""
    network, pairs = run.model.eval(), run.data.parts["validation"]
    batch = padded(pairs, list(range(min(_SENTENCES, len(pairs.source)))), run.data.end)
    memory, seen = network.encode(batch.source, batch.lengths)
    outputs = {"encoder": memory, "decoder": network.decode(batch.read, memory, seen)}
    points = {**network.points(), **outputs}
    return (
        {name: network.parts.error(x) for name, x in points.items()},
        {name: network.parts.time_error(x) for name, x in points.items()},
    )


def _finish(run: TranslationRun) -> TranslationRecord:
    config, progress, network = run.config, run.progress, run.model
    scores: dict[str, float] = {}
    translations: dict[str, list[str]] = {}
    signature = ""
    if run.finished:
        run.write_network(network.state_dict())
        merged = load_translator(run.folder)  # what a user gets is what is scored
        for part in ("validation", "test"):
            pairs = run.data.parts[part]
            words = translate(merged, pairs, end=run.data.end, longest=config.longest)
            translations[part] = run.data.text(words)
            scores[part], signature = bleu(translations[part], pairs.target_text)
    manifold_error, time_error = _errors(run)
    record = TranslationRecord(
        **run.figures(),
        bleu=scores,
        bleu_signature=signature,
        validation_loss=progress.validation_loss,
        steps=progress.done,
        epochs=run.epochs(),
        trainable_in_layers=sum(
            p.numel() for name, p in network.named_parameters() if p.requires_grad and re.search(LINEAR_MAPS, name)
        ),
        manifold_error=manifold_error,
        time_error=time_error,
        data={**run.data.facts(), "sha1": run.sha1},
    )
    show_report(run, lambda: write_translation_report(record, run, translations))
    return record
