"""Families of models: one file each, and one line of ``FAMILIES``.

A new family is a ``Family`` in a file of this folder, and its name in ``FAMILIES``. It then trains from a size and from
a folder, methods find its matrices, and the tests that run over ``FAMILIES`` hold its ``activations`` against a count.
"""

from __future__ import annotations

from collections.abc import Mapping

from lowrank_train.common.errors import UserError
from lowrank_train.models.families.family import Family, LayerBytes, Sizes
from lowrank_train.models.families.llama import LLAMA
from lowrank_train.models.families.mistral import MISTRAL
from lowrank_train.models.families.opt import OPT
from lowrank_train.models.families.qwen3 import QWEN3

__all__ = ["FAMILIES", "SIZES", "Family", "LayerBytes", "Sizes", "block_matrices", "family_of"]

FAMILIES = (LLAMA, OPT, MISTRAL, QWEN3)
"""The families there are."""

SIZES: Mapping[str, Family] = {size: family for family in FAMILIES for size in family.sizes}
"""Name of a size -> its family."""


def family_of(model_type: str, where: object) -> Family:
    """Return the family of a ``model_type``.

    Args:
        model_type: of a configuration.
        where: folder or setting that names the model, for the message.

    Raises:
        UserError: there is none.
    """
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UserError(f"{where} is a {model_type!r} model; expected one of {known}")


def block_matrices(model_type: str | None = None) -> str:
    """Return a regular expression for names of attention and feed-forward matrices, or the factors of compressed ones.

    Args:
        model_type: whose family's they are; those of all families if it has none.
    """
    families = [family for family in FAMILIES if family.model_type == model_type] or FAMILIES
    names = dict.fromkeys(name for family in families for name in family.matrices)
    return rf"\.({'|'.join(names)})(\.(left|right))?$"
