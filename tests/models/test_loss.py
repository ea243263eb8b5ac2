"""Chunked cross-entropy: torch's and transformers' numbers, without the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from lowrank_train.config.schema import ModelConfig
from lowrank_train.models import build as models
from lowrank_train.models.loss import chunked_cross_entropy, token_loss
from lowrank_train.text.labels import IGNORED

TOKENS, HIDDEN, VOCABULARY = 22, 6, 40
CHUNKS = [1, 5, 11, 16, 22, 1000]  # dividing, not dividing, all at once, more than all


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(2, TOKENS // 2, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=True)
    return hidden, weight, torch.randint(VOCABULARY, (2, TOKENS // 2))


def torch_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = hidden.flatten(0, 1) @ weight.mT
    return functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED, reduction="sum")


def value_and_gradients(loss: Callable[..., Tensor], *tensors: Tensor, **others: Any) -> list[Tensor]:
    value = loss(*tensors, **others)
    # not 1: backward must scale by the gradient it is given
    return [value.detach(), *torch.autograd.grad(0.37 * value, tensors[:2])]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("ignored", ["none", "some", "a whole chunk", "all"])
def test_equals_torch_in_value_and_both_gradients(chunk: int, ignored: str) -> None:
    hidden, weight, labels = inputs()
    flat = labels.flatten()
    flat[{"none": [], "some": [0, 3, 4, 21], "a whole chunk": list(range(5, 10)), "all": list(range(22))}[ignored]] = (
        IGNORED
    )
    got = value_and_gradients(chunked_cross_entropy, hidden, weight, labels, chunk=chunk)
    expected = value_and_gradients(torch_loss, hidden, weight, labels)
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    if ignored == "all":
        assert [float(tensor.abs().sum()) for tensor in got] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_input_gets_no_gradient_and_changes_nothing_else(frozen: int) -> None:
    hidden, weight, labels = inputs()
    expected = torch.autograd.grad(torch_loss(hidden, weight, labels), [hidden, weight])[1 - frozen]
    tensors = [hidden, weight]
    tensors[frozen] = tensors[frozen].detach()
    chunked_cross_entropy(*tensors, labels, 5).backward()
    assert tensors[frozen].grad is None
    torch.testing.assert_close(tensors[1 - frozen].grad, expected, rtol=1e-12, atol=1e-12)


def test_without_gradients_the_value_is_the_same() -> None:
    hidden, weight, labels = inputs()
    with torch.no_grad():
        value = chunked_cross_entropy(hidden, weight, labels, 7)
    torch.testing.assert_close(value, torch_loss(hidden, weight, labels).detach(), rtol=1e-12, atol=1e-12)


def test_bfloat16_sums_in_float32() -> None:
    hidden, weight, labels = inputs(torch.bfloat16)
    value, grad_hidden, grad_weight = value_and_gradients(chunked_cross_entropy, hidden, weight, labels, chunk=5)
    assert (value.dtype, grad_hidden.dtype, grad_weight.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    wide = value_and_gradients(torch_loss, hidden.float(), weight.float(), labels)
    torch.testing.assert_close(value, wide[0], rtol=1e-2, atol=0)
    torch.testing.assert_close(grad_weight.float(), wide[2], rtol=0, atol=0.05 * float(wide[2].abs().max()))


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor any operation makes, backward included."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def largest_tensor(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> int:
    hidden = torch.randn(64, 8, requires_grad=True)
    weight = torch.randn(500, 8, requires_grad=True)
    with LargestTensor() as largest:
        loss(hidden, weight, torch.arange(64)).backward()
    return largest.elements


def test_the_logits_of_all_tokens_never_exist() -> None:
    chunk_of_logits, head = 8 * 500, 500 * 8
    assert largest_tensor(lambda h, w, labels: chunked_cross_entropy(h, w, labels, 8)) == max(chunk_of_logits, head)
    # the measure sees them where they do exist
    assert largest_tensor(lambda h, w, labels: functional.cross_entropy(h @ w.mT, labels)) == 64 * 500


def test_nothing_saved_for_backward_is_larger_than_the_head() -> None:
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    hidden, weight = torch.randn(64, 8, requires_grad=True), torch.randn(500, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        chunked_cross_entropy(hidden, weight, torch.arange(64), 8)
    assert max(saved) == 500 * 8


def tiny_model(name: str) -> PreTrainedModel:
    overrides = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name == "opt_350m":
        overrides |= {"word_embed_proj_dim": 16, "ffn_dim": 48}  # a head narrower than the model
    if name == "opt_125m":
        overrides |= {"word_embed_proj_dim": 32, "ffn_dim": 48}
    architecture = models.architecture(ModelConfig(name=name, overrides=overrides), vocab_size=VOCABULARY)
    return AutoModelForCausalLM.from_config(architecture, dtype=torch.float64)


@pytest.mark.parametrize("name", ["llama_9m", "opt_125m", "opt_350m"])
def test_equals_the_loss_of_transformers(name: str) -> None:
    model = tiny_model(name)
    ids = torch.randint(VOCABULARY, (3, 12))
    labels = ids.clone()
    labels[0, 5:] = IGNORED
    counted = int((labels[:, 1:] != IGNORED).sum())

    mine = token_loss(model, ids[:, :-1], labels[:, 1:], 7) / counted
    output = model(input_ids=ids, labels=labels)
    # transformers rounds its logits to float32 before the loss; its logits themselves are exact
    assert mine.item() == pytest.approx(output.loss.item(), rel=1e-6)
    exact = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    assert mine.item() == pytest.approx(exact.item(), rel=1e-12)

    parameters = list(model.parameters())
    for got, expected in zip(
        torch.autograd.grad(mine, parameters), torch.autograd.grad(exact, parameters), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
