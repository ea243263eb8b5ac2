"""Perplexity of a model whose smallest singular values are dropped.

Source: Zhao et al., "Sparse Spectral Training" (arXiv 2405.15481v3), appendix F: every matrix keeps its fewest leading
triplets whose singular values hold a share of their sum; the curve is perplexity over the fraction dropped.

    W_j = sum_{i <= j} sigma_i u_i v_i^T = P_j P_j^T W (out <= in)  or  W P_j P_j^T (out > in)

P_j holds the first j singular vectors of the smaller side, so that no more than W and P is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_train.common.errors import UserError, first_line
from lowrank_train.common.progress import show_progress
from lowrank_train.common.ranks import Ranks
from lowrank_train.common.record import perplexity
from lowrank_train.config.schema import Config
from lowrank_train.config.settings import setting
from lowrank_train.data.documents import embedded_documents, local_documents, lot
from lowrank_train.data.tokenizer import encode
from lowrank_train.data.tokenizer_folder import read_tokenizer
from lowrank_train.models.evaluate import evaluate
from lowrank_train.models.loss import token_loss
from lowrank_train.spectra.spectrum import count_at_share
from lowrank_train.text.labels import IGNORED

__all__ = ["Point", "Prunable", "TextConfig", "evaluation_blocks", "pruned", "pruning_curve", "text_loss"]

_BATCH_OF_DOCUMENTS = 16  # tokenized at one time; few, because a batch may hold more tokens than are wanted
_EMBEDDED_FRACTION = 0.02  # what a run on the embedded text holds out by default: documents it has not seen


@dataclass
class TextConfig:
    """The text perplexity is measured on."""

    path: str | None = setting(
        None, "parquet, JSONL or text file, or a folder of them; null: the library of the running Python", path=True
    )
    text_key: str = setting("text", "column that holds the text")
    validation_fraction: float | None = setting(
        None,
        "share of the documents to read, the same that training with this fraction holds out; "
        f"null: all of data.path, {_EMBEDDED_FRACTION} of the embedded text",
        above=0,
        at_most=1,
    )
    tokens: int = setting(65536, "tokens predicted, at most", at_least=1)
    seq_len: int = setting(512, "tokens per sequence, at most the model's positions", at_least=1, at_most=10**9)


@dataclass(frozen=True)
class Prunable:
    """A layer with what is needed to truncate its weight."""

    linear: nn.Linear
    sigma: Tensor
    """(k,), falling, on the CPU."""
    basis: Tensor
    """(k, k): rows are singular vectors of the smaller side, in the dtype and on the device of the weight."""

    @classmethod
    def of(cls, linear: nn.Linear, factors: dict[str, Tensor]) -> Prunable:
        """Make it from what ``decompose`` made of the weight of a layer."""
        side = "u" if linear.out_features <= linear.in_features else "v"
        return cls(linear, factors["sigma"].cpu(), factors[side].to(linear.weight.dtype))

    @torch.no_grad()
    def truncated(self, count: int) -> Tensor:
        """Return the weight (out, in) with its first ``count`` triplets; with all of them, the weight itself."""
        weight = self.linear.weight
        if count == len(self.sigma):
            return weight
        kept = self.basis[:count]
        is_wide = weight.shape[0] <= weight.shape[1]
        return kept.mT @ (kept @ weight) if is_wide else (weight @ kept.mT) @ kept


@dataclass(frozen=True)
class Point:
    """One truncation of a whole model."""

    keep_percent: float
    """The share of the sum of singular values, in every matrix."""
    kept: int
    """Singular values left, over all matrices."""
    dropped: float
    """Fraction of the singular values of all matrices that is gone, 0 to 1."""
    loss: float
    """Nats per token."""

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


@contextmanager
def pruned(layers: Sequence[Prunable], counts: Sequence[int]) -> Iterator[None]:
    """Truncate every layer to its count for as long as the context lasts; then the weights are the old, bit for bit.

    Args:
        layers: no weight twice.
        counts: of triplets kept, 0 to k, one per layer.
    """
    originals = [layer.linear.weight.detach().clone() for layer in layers]
    try:
        with torch.no_grad():
            for layer, count in zip(layers, counts, strict=True):
                layer.linear.weight.copy_(layer.truncated(count))
        yield
    finally:
        with torch.no_grad():
            for layer, original in zip(layers, originals, strict=True):
                layer.linear.weight.copy_(original)


def pruning_curve(
    model: PreTrainedModel,
    layers: Sequence[Prunable],
    keep_percents: Sequence[float],
    blocks: Tensor,
    micro_batch: int,
    ranks: Ranks,
) -> list[Point]:
    """Measure the loss at every share kept; the model is left as it was.

    Args:
        model: unsharded, on the device of ``ranks``.
        layers: those to truncate.
        keep_percents: of the sum of singular values, above 0, at most 100.
        blocks: (n, length + 1) token ids, ``IGNORED`` where there is none.
        micro_batch: sequences per forward pass.
        ranks: this process.
    """
    was_training = model.training
    total = sum(len(layer.sigma) for layer in layers)
    points = []
    for percent in show_progress(keep_percents, "pruning", "shares"):
        counts = [count_at_share(layer.sigma, percent / 100) for layer in layers]
        with pruned(layers, counts):
            loss = text_loss(model, blocks, micro_batch, ranks)
        points.append(Point(percent, sum(counts), 1 - sum(counts) / total, loss))
    model.train(was_training)
    return points


def text_loss(model: PreTrainedModel, blocks: Tensor, micro_batch: int, ranks: Ranks) -> float:
    """Return nats per token of an unsharded model on blocks (n, length + 1); every rank takes its share of them."""
    model.token_loss = MethodType(token_loss, model)
    loss = evaluate(model, blocks, Config(micro_batch=micro_batch), ranks)
    model.eval()
    return loss


def evaluation_blocks(text: TextConfig, folder: Path) -> tuple[Tensor, dict[str, int]]:
    """Return the first tokens of a text, packed, with a model's own tokenizer.

    Args:
        text: where from, and how many.
        folder: of the model and its tokenizer.

    Returns:
        Blocks (n, seq_len + 1) int64, the last label of one being the first input of the next, ``IGNORED`` where there
        is no token; and the tokenizer's vocabulary, to tell whether two models count alike.

    Raises:
        UserError: no tokenizer in the folder, or one without an end-of-text token; text that cannot be read or is too
            short.
    """
    try:
        tokenizer = read_tokenizer(folder)
    except Exception as error:  # the readers raise many kinds
        reason = first_line(error)
        raise UserError(f"cannot load the tokenizer in {folder}, which perplexity needs: {reason}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end-of-text token; documents could not be told apart")
    ids: list[int] = []
    documents = _documents(text)
    while len(ids) <= text.tokens and (batch := list(itertools.islice(documents, _BATCH_OF_DOCUMENTS))):
        ids += itertools.chain.from_iterable(encode(tokenizer, batch))
    ids = ids[: text.tokens + 1]
    if len(ids) < 2:
        raise UserError(
            f"data.path={text.path} gives no text to measure perplexity on; give more, or raise "
            f"data.validation_fraction={text.validation_fraction}"
        )
    rows = -(-(len(ids) - 1) // text.seq_len)
    flat = torch.full((rows * text.seq_len + 1,), IGNORED, dtype=torch.int64)
    flat[: len(ids)] = torch.tensor(ids)
    return flat.unfold(0, text.seq_len + 1, text.seq_len).clone(), tokenizer.get_vocab()


def _documents(text: TextConfig) -> Iterator[str]:
    fraction = text.validation_fraction
    if text.path is None:
        documents = embedded_documents()
        fraction = _EMBEDDED_FRACTION if fraction is None else fraction
    elif Path(text.path).exists():
        documents = local_documents(text.path, text.text_key)
    else:
        raise UserError(f"data.path={text.path} does not exist; expected a file or a folder of text")
    return (document for document in documents if fraction is None or lot(document) < fraction)
