"""What initialisations learn from the run's own training data: EVA, CorDA and LoRA-GA."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lowrank_train.models.loss import token_loss
from lowrank_train.models.packing import attention_inputs
from lowrank_train.text.labels import IGNORED, marked_positions, split

__all__ = ["needs_data", "prepare", "prepare_adapter"]

_CHUNK = 1024  # tokens whose logits exist at one time


def needs_data(config: Any) -> bool:
    """Return whether an adapter with this configuration reads training data before it is trained."""
    start = getattr(config, "init_lora_weights", None)
    return start in _BEFORE or start == "eva"


def prepare(model: PreTrainedModel, config: Any, batches: Iterable[Tensor]) -> None:
    """Measure on the plain model what peft reads from its modules when it builds the adapter.

    Args:
        model: with its weights, unsharded.
        config: peft's.
        batches: (n, length + 1) stored blocks.
    """
    measure = _BEFORE.get(str(getattr(config, "init_lora_weights", None)))
    if measure is not None:
        measure(model, config, batches)


def prepare_adapter(wrapper: Any, config: Any, batches: Iterable[Tensor]) -> None:
    """Return what is put into the adapter once it is there: for EVA, the main directions of each layer's inputs."""
    if getattr(config, "init_lora_weights", None) != "eva":
        return
    device = wrapper.get_base_model().device
    # its minibatches must be of one size: the directions are compared between them
    seen = [
        {
            "input_ids": inputs.to(device),
            "attention_mask": torch.ones_like(inputs).to(device),
            "labels": labels.to(device),
            **({} if positions is None else {"positions": positions.to(device)}),
        }
        for inputs, labels, positions in ((*split(blocks), marked_positions(blocks)) for blocks in batches)
    ]
    importlib.import_module("peft").initialize_lora_eva_weights(
        wrapper,
        seen,
        forward_fn=lambda model, batch: model.get_base_model().base_model(
            input_ids=batch["input_ids"],
            use_cache=False,
            **attention_inputs(model.get_base_model(), batch["input_ids"], batch.get("positions")),
        ),
        gather_distributed_inputs=False,  # every rank sees all of them
        show_progress_bar=False,
    )


def _corda(model: PreTrainedModel, config: Any, batches: Iterable[Tensor]) -> None:
    """Covariances of the layers' inputs."""

    def look() -> None:
        with torch.no_grad():
            for blocks in batches:
                for one in blocks.split(1):  # its hooks know no batch
                    positions = marked_positions(one.to(model.device))
                    inputs = split(one)[0].to(model.device)
                    model.base_model(input_ids=inputs, use_cache=False, **attention_inputs(model, inputs, positions))

    importlib.import_module("peft.tuners.lora.corda").preprocess_corda(model, config, run_model=look)


def _lora_ga(model: PreTrainedModel, config: Any, batches: Iterable[Tensor]) -> None:
    """Gradients of the loss by the layers' weights."""

    def learn() -> None:
        # every layer's gradient must pass, also through those in front of which nothing takes one
        handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_())
        try:
            for blocks in batches:
                inputs, labels = (part.to(model.device) for part in split(blocks))
                positions = marked_positions(blocks.to(model.device))
                counted = int((labels != IGNORED).sum())
                (token_loss(model, inputs, labels, _CHUNK, positions) / max(1, counted)).backward()
        finally:
            handle.remove()

    importlib.import_module("peft.tuners.lora.loraga").preprocess_loraga(model, config, learn)


_BEFORE: dict[str, Callable[[PreTrainedModel, Any, Iterable[Tensor]], None]] = {"corda": _corda, "lora_ga": _lora_ga}
"""``init_lora_weights`` -> what it measures."""
