"""The optimizers in Hugging Face's Trainer, and in axolotl, which builds on it.

    Trainer(..., optimizer_cls_and_kwargs=(optim.hf_factory("dct_adamw"), {"training_args": args, "rank": 256}))

The Trainer calls what it is given without arguments, and the result with the model; axolotl adds the training arguments
as a second argument. Nothing of transformers is imported: only attributes of what is handed in are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lowrank_train.optim.core.groups import param_groups
from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.methods import check_arguments, create, find, takes

__all__ = ["hf_factory"]


def hf_factory(name: str) -> Callable[[], Callable[..., MatrixOptimizer]]:
    """Return what ``Trainer(optimizer_cls_and_kwargs=(hf_factory(name), {...}))`` wants, with these keys in the dict:

        training_args   the Trainer's ``TrainingArguments``: learning rate, weight decay, betas and epsilon come from
                        them, as far as the optimizer has such arguments and the dict does not name them
        rules           as of ``optim.param_groups``
        any other       an argument of the optimizer; it wins over ``training_args``

    All four are taken whether or not they were set: GaLore's or LDAdam's own betas and epsilon must be named. State is
    allocated when training begins, so that what FSDP2 shards first is never held whole (``defer_state``).

    Args:
        name: one of ``optim.names()``.

    Returns:
        A callable without arguments that returns ``build(model, training_args=None, **arguments)``.

    Raises:
        ValueError: for an unknown name; ``build``: for unknown or unfit arguments, neither ``training_args`` nor
            ``lr``, and DeepSpeed.
    """
    find(name)

    def build(
        model: nn.Module,
        training_args: Any = None,
        *,
        rules: Mapping[str, Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> MatrixOptimizer:
        check_arguments(name, arguments)
        if training_args is None and "lr" not in arguments:
            raise ValueError(
                f"optim.hf_factory({name!r}) was given neither training_args nor lr, so the learning rate of the "
                f"Trainer would be ignored; write optimizer_cls_and_kwargs=(optim.hf_factory({name!r}), "
                '{"training_args": args})'
            )
        if getattr(training_args, "deepspeed", None):
            raise ValueError(
                f"optim.hf_factory({name!r}) with TrainingArguments(deepspeed=...): DeepSpeed partitions parameters "
                "into flat buffers, in which a matrix is no longer a matrix; use fsdp=True with fsdp_config instead"
            )
        chosen = {key: value for key, value in _settings(training_args).items() if takes(name, key)}
        optimizer = create(name, param_groups(model, rules=rules), **{**chosen, **arguments})
        optimizer.defer_state()
        return optimizer

    return lambda: build


def _settings(args: Any) -> dict[str, Any]:
    """Of TrainingArguments, under our names."""
    if args is None:
        return {}
    return {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
