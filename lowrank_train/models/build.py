"""Models by name and exact size, built without memory and initialised the same on any number of ranks."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lowrank_train.common.errors import UserError, last_line
from lowrank_train.common.ranks import Ranks
from lowrank_train.config.schema import ModelConfig
from lowrank_train.files.finite import name_not_finite
from lowrank_train.files.pretrained import read_pretrained
from lowrank_train.layers.parametrization import Parametrization
from lowrank_train.models.compressed_folder import is_compressed, read_compressed, shaped
from lowrank_train.models.embeddings import add_rows, train_every_row
from lowrank_train.models.families import SIZES, family_of
from lowrank_train.models.fsdp import fill
from lowrank_train.models.values import check_known, check_model_values, check_weights_used, read_config
from lowrank_train.optim.arguments.suggestion import suggestion

__all__ = ["SIZES", "architecture", "initialize", "load_weights", "parameter_count", "skeleton"]


def architecture(
    model: ModelConfig,
    *,
    vocab_size: int | None = None,
    original_vocab_size: int | None = None,
    seq_len: int | None = None,
    **token_ids: int | None,
) -> PretrainedConfig:
    """Return the Hugging Face configuration of a model.

    Args:
        model: a name of ``SIZES`` or a local folder, and overrides.
        vocab_size: of the tokenizer; None keeps the original's. A folder keeps its own if that is large enough.
        original_vocab_size: of the tokenizer without tokens that were added to it, for which a folder's grows; None: no
            token was added.
        seq_len: positions needed; learned ones must be enough, others are extended.
        token_ids: bos_token_id, eos_token_id, pad_token_id of the tokenizer.

    Raises:
        UserError: unknown name, folder of a model without a family, unknown override, vocabulary or positions too few.
    """
    if model.name in SIZES:
        family = SIZES[model.name]
        settings = {**family.defaults, **family.sizes[model.name]}
        check_known(model.overrides, AutoConfig.for_model(family.model_type, **settings))
        check_model_values(model.overrides, "model.overrides.")
        vocabulary = {} if vocab_size is None else {"vocab_size": vocab_size}
        # OPT's own pad id 1 would silence token 1 of any other tokenizer
        changes = {"pad_token_id": None, **vocabulary, **token_ids, **model.overrides}
        # all at once, because transformers derives other values (key-value heads, head_dim) from some
        config = _valid(lambda: AutoConfig.for_model(family.model_type, **{**settings, **changes}))
    elif Path(model.name, "config.json").is_file():
        config = read_config(model.name, f"model.name={model.name}")
        family = family_of(config.model_type, f"model.name={model.name}")
        check_known(model.overrides, config)
        check_model_values(model.overrides, "model.overrides.")
        _valid(lambda: config.update(model.overrides))
    else:
        known = suggestion(model.name, SIZES, ", or a folder with a config.json")
        raise UserError(f"unknown model {model.name!r}; {known}")
    if vocab_size is not None and vocab_size > config.vocab_size:
        needed = vocab_size if original_vocab_size is None else original_vocab_size
        if needed > config.vocab_size:
            raise UserError(
                f"the tokenizer has {needed} entries but model.name={model.name} only {config.vocab_size}: it is of "
                "another model; set data.tokenizer to the model's own"
            )
        config.vocab_size = vocab_size
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size={config.hidden_size} does not divide by num_attention_heads={config.num_attention_heads}; "
            "change model.overrides"
        )
    if config.num_attention_heads % getattr(config, "num_key_value_heads", 1):
        raise UserError(
            f"num_attention_heads={config.num_attention_heads} does not divide by num_key_value_heads="
            f"{config.num_key_value_heads}; change model.overrides"
        )
    if seq_len is not None and seq_len > config.max_position_embeddings:
        if family.learned_positions:
            raise UserError(
                f"seq_len={seq_len} exceeds the {config.max_position_embeddings} learned positions of {model.name}; "
                "use at most that, or set model.overrides.max_position_embeddings"
            )
        if "max_position_embeddings" in model.overrides:
            raise UserError(
                f"model.overrides.max_position_embeddings={config.max_position_embeddings} is less than seq_len="
                f"{seq_len}, which needs as many positions; leave it out, or lower seq_len"
            )
        config.max_position_embeddings = seq_len
    return config


def _valid(make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:  # transformers checks values by raising many kinds
        raise UserError(f"model.overrides: {last_line(error)}") from None


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model on the meta device: shapes and names, no memory. Raises UserError for unfit overrides.

    Matrices that were compressed (``config.low_rank``) are low-rank layers.
    """
    with torch.device("meta"):
        model: PreTrainedModel = _valid(
            lambda: AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
        )
        train_every_row(model)
        return shaped(model)


@torch.no_grad()
def initialize(
    model: PreTrainedModel, plain: PreTrainedModel, layers: Parametrization, ranks: Ranks, seed: int
) -> None:
    """Fill a (sharded) meta model with transformers' initial weights, the same for any number of ranks.

    The weights of a module are drawn whole, from a seed of its own made of ``seed`` and the module's name, and each
    rank keeps its shard: random numbers drawn shard by shard would depend on the mesh.

    Args:
        model: the model to fill, on meta, perhaps converted and sharded.
        plain: the same model on meta, neither.
        layers: what was converted.
        ranks: of the run; all of them must call.
        seed: of the run.
    """

    def draw(name: str) -> nn.Module:
        whole = copy.deepcopy(plain.get_submodule(name)).to_empty(device=ranks.device, recurse=False)
        with torch.random.fork_rng(devices=[ranks.device] if ranks.device.type == "cuda" else []):
            torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            plain._init_weights(whole)
        return whole

    _fill(model, plain, draw, layers, ranks)


@torch.no_grad()
def load_weights(
    model: PreTrainedModel, plain: PreTrainedModel, folder: str, layers: Parametrization, ranks: Ranks
) -> None:
    """Fill a (sharded) meta model from a local Hugging Face folder; arguments as for ``initialize``.

    Raises UserError if the weights do not fit.
    """
    dtype = next(plain.parameters()).dtype
    source = read_compressed(folder, dtype) if is_compressed(folder) else _read_plain(folder, dtype)
    add_rows(source, plain.config.vocab_size)
    values = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    for name, expected in [*plain.named_parameters(), *plain.named_buffers()]:
        if name not in values or values[name].shape != expected.shape:
            got = tuple(values[name].shape) if name in values else "nothing"
            raise UserError(f"model.name={folder} has {got} for {name!r}; expected shape {tuple(expected.shape)}")
    bad = name_not_finite(values)
    if bad is not None:
        raise UserError(f"model.name={folder} holds a number that is not finite in {bad!r}; start from other weights")
    _fill(model, plain, lambda name: copy.deepcopy(source.get_submodule(name)).to(ranks.device), layers, ranks)


def _read_plain(folder: str, dtype: torch.dtype) -> PreTrainedModel:
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        source, found = read_pretrained(AutoModelForCausalLM, folder, dtype=dtype, output_loading_info=True)
    except Exception as error:  # transformers and safetensors raise many kinds
        raise UserError(f"cannot load the weights of model.name={folder}: {error}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    if found["missing_keys"]:  # transformers would leave them at random numbers
        raise UserError(f"model.name={folder} has no weights for {min(found['missing_keys'])!r}; it is not complete")
    check_weights_used(found["unexpected_keys"], f"model.name={folder}")
    return source


def _fill(
    model: PreTrainedModel,
    plain: PreTrainedModel,
    whole: Callable[[str], nn.Module],
    layers: Parametrization,
    ranks: Ranks,
) -> None:
    """Give each module of a model what ``whole(name)`` holds, a module of the plain model."""
    model.to_empty(device=ranks.device)
    model.tie_weights()  # emptying gives the tied weights of an unsharded model a tensor each
    filled: set[torch.Tensor] = set()
    converted: list[str] = []
    for name, module in plain.named_modules():
        if not module._parameters and not module._buffers:
            continue
        target = model.get_submodule(name)
        if layers.converted(target):
            converted.append(name)
            continue
        source = whole(name)
        for key, value in [*source.named_parameters(recurse=False), *source.named_buffers(recurse=False)]:
            destination = getattr(target, key)
            if destination not in filled:  # a tied weight is drawn once, by its first owner
                fill(destination, value)
                filled.add(destination)

    def values(i: int) -> dict[str, torch.Tensor]:
        try:
            return layers.values(i, model.get_submodule(converted[i]), whole(converted[i]))
        except ValueError as error:
            raise UserError(f"cannot convert {converted[i]!r}: {error}") from None

    shapes = [dict(model.get_submodule(name).named_parameters()) for name in converted]
    for i, made in ranks.deal(len(converted), values, shapes):  # each layer's factors are made by one rank
        for key, value in made.items():
            fill(shapes[i][key], value)


def parameter_count(model: nn.Module) -> int:
    """Return the number of elements of all parameters, tied ones once, by global shape."""
    return sum(p.numel() for p in model.parameters())
