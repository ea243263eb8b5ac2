"""A model with an adapter of peft in it: built whole on every rank, then sharded like any other.

peft builds its layers from the weights they stand beside (singular vectors, norms, samples of activations), so the
model is there in full before it is sharded; meta-device construction, which pretraining uses, is not possible. The
adapted layers sit inside the Hugging Face model itself; peft's wrapper around it is kept for what it alone knows:
AdaLoRA's budget, merging, and its own file format.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_train.common.errors import UserError, first_line
from lowrank_train.common.ranks import Ranks
from lowrank_train.config.schema import AdapterConfig
from lowrank_train.peft.budget import RankBudget
from lowrank_train.peft.data import prepare, prepare_adapter
from lowrank_train.peft.names import adapter_config, import_peft

__all__ = ["AdaptedModel", "adapt"]


@dataclass
class AdaptedModel:
    """What is kept of an adapted model beside the model that is trained."""

    model: PreTrainedModel
    """The Hugging Face model with adapted layers; sharded in place later."""
    wrapper: Any
    """peft's, around the same model."""
    blueprint: Any
    """A copy of the wrapper whose parameters are on meta, never sharded."""
    budget: RankBudget | None
    """What AdaLoRA adds to the loss, and does after every step."""
    one_group: bool
    """Whether all parameters must be gathered together: some are used by several layers, or by AdaLoRA's penalty."""
    buffers: frozenset[str]
    """Names of the adapter's own floating-point buffers, such as VeRA's projections."""

    def with_values(self, values: Mapping[str, Tensor]) -> Any:
        """Return a copy of the wrapper, unsharded, with these parameters and persistent buffers, in float32 or wider.

        Args:
            values: whole tensors by their name in the model.
        """
        inside = self.blueprint.get_base_model()
        memo: dict[int, Any] = {}
        for name, param in inside.named_parameters(remove_duplicate=False):
            if name in values:
                value = values[name]
                value = value.to(torch.promote_types(value.dtype, torch.float32))
                memo[id(param)] = nn.Parameter(value, requires_grad=param.requires_grad)
        for name, buffer in inside.named_buffers(remove_duplicate=False):
            if name in values:
                memo[id(buffer)] = values[name].to(buffer.dtype)
        made = copy.deepcopy(self.blueprint, memo)
        inside = made.get_base_model()
        wide = next(inside.parameters()).dtype
        for name in self.buffers:
            inside.get_buffer(name).data = inside.get_buffer(name).data.to(wide)
        return made


def adapt(
    model: PreTrainedModel,
    settings: AdapterConfig,
    *,
    batches: Iterable[Tensor],
    ranks: Ranks,
    seed: int,
    steps: int,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    initial: Path | None = None,
) -> AdaptedModel:
    """Put an adapter into a model, in place; only what peft trains of it takes a gradient afterwards.

    The first rank's values are everyone's: singular vectors on another machine may have other signs.

    Args:
        model: with its weights, whole, on every rank.
        settings: the adapter.
        batches: (n, length + 1) stored blocks of the run's training data, read by EVA, CorDA and LoRA-GA.
        ranks: of the run; all must call.
        seed: of what is drawn.
        steps: of the run.
        dtype: in which parameters are kept.
        compute_dtype: of the arithmetic.
        initial: folder for the adapter as it begins, written by the first rank where the initialisation changes the
            frozen weights too and the adapter could not be given away without it.

    Raises:
        UserError: settings that do not fit the model, or an adapter that cannot be sharded.
    """
    devices = [ranks.device] if ranks.device.type == "cuda" else []
    config = adapter_config(settings, model, steps)
    present = {name for name, _ in model.named_buffers()}
    if _built_in_float32(config):
        model.to(torch.float32)
    # peft and transformers warn each other of names that change
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings(action="ignore", category=FutureWarning):
        torch.manual_seed(seed)
        try:
            prepare(model, config, batches)
            wrapper = import_peft().get_peft_model(model, config, autocast_adapter_dtype=False)
            prepare_adapter(wrapper, config, batches)
        except UserError:
            raise
        except Exception as error:  # peft checks shapes and arguments by raising many kinds
            raise UserError(f"adapter.name={settings.name}: {first_line(error)}") from None
    for param in model.parameters():
        param.data = param.data.to(dtype)
    buffers = {name: b for name, b in model.named_buffers() if name not in present and b.is_floating_point()}
    for buffer in buffers.values():  # FSDP2 casts parameters only
        buffer.data = buffer.data.to(compute_dtype)
    _check_shardable(model, wrapper, str(settings.name))
    _take_from_first(model, ranks)
    if initial is not None and changes_frozen_weights(config):
        ranks.first(lambda: _write_initial(wrapper, initial))
    _declare_roles(model)
    budget = RankBudget(wrapper) if settings.name == "adalora" else None
    blueprint = _on_meta(wrapper)
    if budget is not None:
        model.adapter_penalty = budget.penalty
    return AdaptedModel(model, wrapper, blueprint, budget, _shares(model) or budget is not None, frozenset(buffers))


def changes_frozen_weights(config: Any) -> bool:
    """Whether the initialisation takes something out of the weights that stay frozen."""
    start = str(getattr(config, "init_lora_weights", "")).lower()
    return start.startswith(("pissa", "corda", "olora", "lora_ga"))


def _built_in_float32(config: Any) -> bool:
    """Whether peft's code refuses to build it in float64."""
    start = str(getattr(config, "init_lora_weights", "")).lower()
    return start.startswith(("pissa", "olora", "mica", "corda")) or hasattr(config, "psoft_svd")


def _write_initial(wrapper: Any, folder: Path) -> None:
    if (folder / "adapter_config.json").exists():  # a resumed run
        return
    config = wrapper.peft_config["default"]
    kept, config.init_lora_weights = config.init_lora_weights, True  # so that loading it does not initialise again
    try:
        wrapper.save_pretrained(folder, save_embedding_layers=False)
    finally:
        config.init_lora_weights = kept


def _check_shardable(model: nn.Module, wrapper: Any, name: str) -> None:
    inside = set(model.parameters())
    outside = [key for key, param in wrapper.named_parameters() if param not in inside]
    if outside:
        raise UserError(
            f"adapter.name={name} keeps {outside[0]!r} outside the model's layers, where it cannot be sharded with them"
        )
    scalars = [key for key, param in model.named_parameters() if param.ndim == 0]
    if scalars:
        raise UserError(f"adapter.name={name} has the parameter {scalars[0]!r} of no dimension; FSDP2 shards none such")
    if not any(param.requires_grad for param in model.parameters()):
        raise UserError(f"adapter.name={name} leaves nothing to train in this model; name other modules")


def _take_from_first(model: nn.Module, ranks: Ranks) -> None:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    mine = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first = ranks.first(lambda: mine)
    ranks.each(lambda: _compare_shapes(mine, first))
    ranks.copy_from_first(list(tensors.values()))


def _compare_shapes(mine: Mapping[str, tuple[int, ...]], first: Mapping[str, tuple[int, ...]]) -> None:
    if mine != first:
        name = min(key for key in {*mine, *first} if mine.get(key) != first.get(key))
        raise UserError(
            f"the adapter came out as {mine.get(name)} for {name!r} on one rank and {first.get(name)} on the first: "
            "its ranks were chosen by rounding errors; use adapter.arguments.eva_config.rho=1, which keeps them equal"
        )


def _declare_roles(model: nn.Module) -> None:
    """``matrix`` for trained parameters of two dimensions with at least two rows and columns, else ``vector``.

    Embeddings and biases have their roles already; a linear layer's weight (LoRA's A and B) would have this one.
    """
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            continue
        own = {key: param for key, param in module._parameters.items() if param is not None and param.requires_grad}
        if own:
            declared: Any = {key: "matrix" if _is_matrix(param) else "vector" for key, param in own.items()}
            module.parameter_roles = declared


def _is_matrix(param: Tensor) -> bool:
    return param.ndim == 2 and min(param.shape) >= 2


def _shares(model: PreTrainedModel) -> bool:
    """Whether a decoder layer uses a parameter of another."""
    seen: set[Tensor] = set()
    for layer in model.get_decoder().layers:
        own = set(layer.parameters())
        if own & seen:
            return True
        seen |= own
    return bool(seen & {param for name, param in model.named_parameters() if ".layers." not in name})


def _on_meta(wrapper: Any) -> Any:
    """A copy that has the same shapes and no weights; buffers and what else peft keeps are copied."""
    memo = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in wrapper.parameters()}
    return copy.deepcopy(wrapper, memo)  # type: ignore[arg-type]
