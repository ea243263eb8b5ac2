"""BLEU of translations by sacrebleu, which is asked for only where something is translated."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from lowrank_train.common.errors import UserError

__all__ = ["bleu", "load_sacrebleu"]


def load_sacrebleu() -> Any:
    """Import the module. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("sacrebleu")
    except ImportError:
        raise UserError(
            "translations are scored by sacrebleu, which is not installed; run 'pip install lowrank-train[hyperbolic]' "
            "or 'pip install sacrebleu'"
        ) from None


def bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Return corpus BLEU from 0 to 100, one reference each, tokenized by sacrebleu's "13a"; and sacrebleu's signature.

    Raises UserError if sacrebleu is not installed.
    """
    metric = load_sacrebleu().metrics.BLEU()
    score = metric.corpus_score(list(translations), [list(references)])
    return float(score.score), str(metric.get_signature())
