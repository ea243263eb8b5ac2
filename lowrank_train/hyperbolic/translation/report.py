"""The end of a translation run for people: a table, curves, the translations themselves."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lowrank_train.hyperbolic.translation.record import TranslationRecord
from lowrank_train.hyperbolic.translation.run import TranslationRun
from lowrank_train.reports import drawing, plot_metric, write_table
from lowrank_train.train.metrics import read_metrics

__all__ = ["write_translation_report"]

_SHOWN = 5
"""Translations in report.md."""


def write_translation_report(record: TranslationRecord, run: TranslationRun, translations: dict[str, list[str]]) -> str:
    """Write record.json, curves.png, report.md and, of each part translated, a TSV file; returns the table as text."""
    folder = run.folder
    record.write(folder / "record.json")
    for part, written in translations.items():
        pairs = run.data.parts[part]
        with (folder / f"{part}.tsv").open("w", newline="") as file:
            rows = csv.writer(file, delimiter="\t", lineterminator="\n")
            rows.writerow(["source", "reference", "translation"])
            rows.writerows(zip(pairs.source_text, pairs.target_text, written, strict=True))
    _plot_curves(read_metrics(folder), folder / "curves.png")
    more = ["![curves](curves.png)", ""]
    if "test" in translations:
        test = run.data.parts["test"]
        more += ["| source | reference | translation |", "| --- | --- | --- |"]
        more += [
            "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"
            for row in list(zip(test.source_text, test.target_text, translations["test"], strict=True))[:_SHOWN]
        ]
    return write_table(folder, _summary(record, folder), more, record.provenance, record.how)


def _summary(record: TranslationRecord, folder: Path) -> list[tuple[str, str]]:
    data, model = record.data, record.config["model"]
    share = record.trainable_parameters / record.parameters
    farthest = max(record.manifold_error.values(), default=0.0)
    relative = max(record.time_error.values(), default=0.0)
    loss = "not computed" if record.validation_loss is None else f"{record.validation_loss:.4f} nats per token"
    return [
        ("status", record.status),
        (
            "task",
            f"{record.config['data']['source']} to {record.config['data']['target']}: {data['train_sentences']:,} "
            f"pairs, {data['vocabulary']:,} tokens in the vocabulary",
        ),
        ("space", f"{record.geometry}, {model['width']} coordinates, {model['layers']} + {model['layers']} layers"),
        ("optimizer", ", ".join(f"{key} {value}" for key, value in record.optimizer.items())),
        *((f"{part} BLEU", f"{score:.2f}") for part, score in reversed(record.bleu.items())),
        *([("sacrebleu", record.bleu_signature)] if record.bleu_signature else []),
        ("validation loss", loss),
        ("steps", f"{record.steps:,}, {record.epochs:.2f} epochs"),
        ("time", f"{record.seconds:.0f} s"),
        (
            "trainable parameters",
            f"{record.trainable_parameters:,} ({100 * share:.0f} % of {record.parameters:,}), "
            f"{record.trainable_in_layers:,} of them in layers",
        ),
        ("farthest off the manifold", f"{farthest:.1e} (largest |<x, x> / k + 1|); {relative:.1e} of its x_0"),
        ("optimizer state", f"{record.optimizer_state_bytes:,} bytes"),
        ("TensorBoard", f"tensorboard --logdir {folder / 'tensorboard'}"),
        ("report", str(folder / "report.md")),
    ]


def _plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    with drawing(path, (6, 3.8)) as axes:
        plot_metric(axes, rows, "train/loss", label="training, with label smoothing", linewidth=0.8)
        plot_metric(axes, rows, "eval/loss", label="validation, without", linewidth=0.8, marker="o", markersize=3)
        axes.set(xlabel="step", ylabel="loss, nats per token")
