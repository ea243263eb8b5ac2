"""Values of a Hugging Face configuration: which keys a run may change, and which numbers make a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from lowrank_train.common.errors import UserError, last_line
from lowrank_train.config.settings import check_numbers
from lowrank_train.files.pretrained import read_pretrained
from lowrank_train.optim.arguments.suggestion import suggestion
from lowrank_train.optim.arguments.torch_arguments import is_number

__all__ = ["check_known", "check_model_values", "check_weights_used", "read_config"]

_LARGEST = {
    "hidden_size": 10**7,
    "intermediate_size": 10**7,
    "ffn_dim": 10**7,
    "word_embed_proj_dim": 10**7,
    "head_dim": 10**7,
    "vocab_size": 10**8,
    "num_hidden_layers": 4096,
    "num_attention_heads": 10**6,
    "num_key_value_heads": 10**6,
    "max_position_embeddings": 10**9,
}
"""Keys that are sizes, and the largest that is built: beyond it, counts overflow or building takes minutes."""

_ELSEWHERE = {
    "model_type": "model.name says which kind of model it is",
    "architectures": "model.name says which kind of model it is",
    "dtype": "precision and weights say in which type it is computed and kept",
    "torch_dtype": "precision and weights say in which type it is computed and kept",
    "gradient_checkpointing": "use model.checkpointing",
    "attn_implementation": "a run chooses the implementation of attention itself",
    "_attn_implementation": "a run chooses the implementation of attention itself",
    "use_cache": "training keeps no cache",
    "low_rank": "launch/compress.py writes it",
    "rope_theta": "use model.overrides.rope_parameters={rope_type: default, rope_theta: ...}",
    "rope_scaling": "use model.overrides.rope_parameters={rope_type: ..., rope_theta: ...}",
}
"""Keys that change nothing of a run, and what to do instead."""

_NO_EFFECT = {"pretraining_tp", "use_cache"}
"""Fields of a model's configuration that its code does not read in training."""

_IGNORABLE = ("rotary_emb.inv_freq", "lm_head.weight", ".position_ids", ".attn.bias", ".attn.masked_bias")
"""Ends of names of weights that are computed, or tied, and not read from files."""


def read_config(folder: Path | str, name: str) -> PretrainedConfig:
    """Read the configuration of a Hugging Face folder, and check its numbers.

    Args:
        folder: with a config.json.
        name: of the folder, for messages.

    Raises:
        UserError: it cannot be read, or holds a value that makes no model.
    """
    try:
        values = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise UserError(f"cannot read {name}: its config.json holds no keys and values")
        check_model_values(values, f"{folder}/config.json: ")  # before transformers computes with them
        config: PretrainedConfig = read_pretrained(AutoConfig, folder)
    except UserError:
        raise
    except Exception as error:  # transformers checks values by raising many kinds
        raise UserError(f"cannot read {name}: {last_line(error)}; its config.json must be that of a model") from None
    return config


def check_known(overrides: Mapping[str, Any], config: PretrainedConfig) -> None:
    """Check that every override is a key of this kind of model, and changes it.

    Args:
        overrides: of ``model.overrides``.
        config: of the model before they are applied.

    Raises:
        UserError: a key that the model does not read, with the key to use instead, or the nearest.
    """
    general = {field.name for field in dataclasses.fields(PretrainedConfig)}
    known = [f.name for f in dataclasses.fields(config) if f.name not in general | _NO_EFFECT and f.init]
    for key in overrides:
        if key in known:
            continue
        if key in _ELSEWHERE:
            raise UserError(f"model.overrides.{key} has no effect: {_ELSEWHERE[key]}; leave it out")
        hint = suggestion(key, known)
        if hasattr(config, key):
            raise UserError(f"model.overrides.{key} has no effect on a {config.model_type} model; {hint}")
        raise UserError(f"model.overrides.{key}: a {config.model_type} configuration has no such key; {hint}")


def check_model_values(values: Mapping[str, Any], where: str) -> None:
    """Check the numbers of a Hugging Face configuration.

    Args:
        values: of the whole configuration, or of overrides.
        where: put before a key in messages, such as ``model.overrides.``.

    Raises:
        UserError: a number that is not finite, a size that is none or too large, a dropout or an epsilon out of range.
    """
    for key, value in values.items():
        if key.startswith("_"):
            continue
        check_numbers(f"{where}{key}", value)
        if key in _LARGEST and value is not None:
            largest = _LARGEST[key]
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
                known_good = "" if not isinstance(value, int) or value < 1 else f", at most {largest}"
                raise UserError(f"{where}{key}={value}; expected a whole number >= 1{known_good}")
        elif "dropout" in key or key == "layerdrop":
            if not is_number(value) or not 0 <= value < 1:
                raise UserError(f"{where}{key}={value!r}; expected a number from 0 to below 1")
        elif key.endswith("_eps"):
            if not is_number(value) or not 0 < value <= 1:
                raise UserError(f"{where}{key}={value!r}; expected a number above 0 and at most 1")
        elif key in ("initializer_range", "init_std") and (not is_number(value) or value < 0):
            raise UserError(f"{where}{key}={value!r}; expected a number >= 0")


def check_weights_used(unexpected: Iterable[str], folder: object) -> None:
    """Raise UserError for weights of a folder that its model has no place for, and that would be dropped.

    Args:
        unexpected: names that transformers found and did not load.
        folder: for the message.
    """
    dropped = sorted(name for name in unexpected if not name.endswith(_IGNORABLE))
    if dropped:
        raise UserError(
            f"{folder} holds {len(dropped)} weight(s) that the model of its config.json has no place for, "
            f"{dropped[0]!r} for one: that file says fewer layers, or another model; correct it"
        )
