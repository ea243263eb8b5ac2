"""Embeddings of a model and entries of a tokenizer: every row is trained, and there is a row for every entry."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["add_rows", "rows_needed", "train_every_row"]


def train_every_row(model: nn.Module) -> nn.Module:
    """Let the embedding of the padding token be trained, in place; returns the model.

    transformers initialises this row to 0, and torch gives it no gradient. Tokenizers without a padding token often
    use the end-of-text token for padding, which occurs in every document. Padding itself is never learned here.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    return model


def rows_needed(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return how many rows an embedding needs for every entry of a tokenizer, and for its original vocabulary.

    The difference is what was added to the tokenizer later, such as a padding token.
    """
    entries = tokenizer.get_vocab()
    added = tokenizer.get_added_vocab()
    original = max((i for token, i in entries.items() if token not in added), default=-1) + 1
    return max(len(tokenizer), max(entries.values(), default=-1) + 1), original


@torch.no_grad()
def add_rows(model: PreTrainedModel, rows: int) -> None:
    """Extend the embedding and the output head of a whole model, in place; new rows are the mean of the others.

    Args:
        model: whole, on the CPU.
        rows: that the embedding will have; fewer than it has change nothing.
    """
    before = model.get_input_embeddings().weight.shape[0]
    if rows <= before:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight[before:] = module.weight[:before].mean(0)
