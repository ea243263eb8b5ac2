"""Adapters of peft by name: which of its configuration classes, with which arguments.

Initialisations and variants of LoRA have names of their own here; every other tuner goes by the name peft registered it
under, in lower case. peft is imported only by those who ask for an adapter.
"""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from lowrank_train.common.errors import UserError
from lowrank_train.config.schema import AdapterConfig
from lowrank_train.layers.choice import linear_layers
from lowrank_train.optim.arguments.suggestion import suggestion

__all__ = ["adapter_arguments", "adapter_config", "adapter_names", "describe_adapters", "import_peft"]

_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("lora", {"use_rslora": True}),  # Kalajdzievski, arXiv 2312.03732
    "dora": ("lora", {"use_dora": True}),  # Liu et al., arXiv 2402.09353
    "gaussian": ("lora", {"init_lora_weights": "gaussian"}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),  # Meng et al., arXiv 2404.02948
    "olora": ("lora", {"init_lora_weights": "olora"}),  # Büyükakyüz, arXiv 2406.01775
    "eva": ("lora", {"init_lora_weights": "eva", "eva_config": {}}),  # Paischer et al., arXiv 2410.07170
    "corda": ("lora", {"init_lora_weights": "corda", "corda_config": {}}),  # Yang et al., arXiv 2406.05223
    "lora_ga": ("lora", {"init_lora_weights": "lora_ga", "lora_ga_config": {}}),  # Wang et al., arXiv 2407.05000
    "loftq": ("lora", {"init_lora_weights": "loftq", "loftq_config": {}}),  # Li et al., arXiv 2310.08659
    "orthogonal": ("lora", {"init_lora_weights": "orthogonal"}),
    "mica": ("lora", {"init_lora_weights": "mica"}),
    "velora": ("lora", {"velora_config": {}}),  # Miles et al., arXiv 2405.17991
    "bone": ("miss", {"init_weights": "bat"}),  # Kang, arXiv 2409.15371, before it was called MiSS
}
"""Name -> tuner of peft, and arguments that make it so."""

_NESTED = {
    "eva_config": "EvaConfig",
    "corda_config": "CordaConfig",
    "lora_ga_config": "LoraGAConfig",
    "loftq_config": "LoftQConfig",
    "velora_config": "VeloraConfig",
}
"""Argument of ``LoraConfig`` -> the class a dict of its arguments is made into."""

_OWN_TARGETS = {"beft", "ia3", "ln_tuning", "osf", "trainable_tokens"}
"""Tuners of something else than the block matrices: peft's own choice of modules is right."""

_PROMPTS = "it puts trained vectors into the model's input or attention cache and changes no weights"
_KASA = (
    "KaSA adds a term to every loss, which the training loop does not have; use adapter.name=pissa, "
    "which starts from singular vectors too, or adalora, which also trains singular values"
)
_MONTECLORA = (
    "MonteCLoRA adds a term to every loss and keeps noise that no checkpoint holds, so that a run could not "
    "be resumed exactly; use adapter.name=lora with adapter.arguments.lora_dropout, or pvera"
)
_REFUSED = {
    "adaption_prompt": _PROMPTS,
    "cartridge": _PROMPTS,
    "cpt": _PROMPTS,
    "kasa": _KASA,
    "monteclora": _MONTECLORA,
    "multitask_prompt_tuning": _PROMPTS,
    "p_tuning": _PROMPTS,
    "prefix_tuning": _PROMPTS,
    "prompt_tuning": _PROMPTS,
    "poly": "it needs the number of a task with every sequence, which a run's data does not have",
    "shadow": "it trains a second network beside the model, with a forward pass of its own",
    "trainable_tokens": "it trains rows of the embedding; use adapter.name=lora with "
    "adapter.arguments.trainable_token_indices in a loop of your own",
    "xlora": "it mixes adapters that are trained already",
}
"""Tuner or variant -> why a run cannot train it."""

_REFUSED_ARGUMENTS = {
    "kasa_config": _KASA,
    "monteclora_config": _MONTECLORA,
    "use_asa": "a run does not update that budget of subspaces; leave it out",
}
"""Key of ``adapter.arguments`` -> why a run cannot train with it."""

_RANKS: dict[str, Callable[[int], dict[str, int]]] = {
    # the initial budget: Zhang et al., arXiv 2303.10512, section 3.3
    "adalora": lambda rank: {"target_r": rank, "init_r": math.ceil(1.5 * rank)},
    "oft": lambda rank: {"r": rank, "oft_block_size": 0},  # one of the two follows from the other
    "osf": lambda rank: {"effective_rank": rank},
}
"""Tuner -> arguments for a value of ``adapter.rank``, where that is not just ``r``."""


def import_peft() -> Any:
    """Import the library. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UserError(
            f"adapter.name needs peft, which cannot be imported ({error}); install it: pip install "
            "'lowrank-train[peft]'"
        ) from None


def adapter_names() -> list[str]:
    """Return all values of ``adapter.name`` that can be trained, sorted. Raises UserError without peft."""
    return sorted({*_VARIANTS, *_registered()} - _REFUSED.keys())


def adapter_arguments(name: str) -> dict[str, Any]:
    """Return keys of ``adapter.arguments`` of a name, with their defaults.

    Raises UserError for an unknown name, or one a run cannot train.
    """
    if name in _REFUSED:
        raise UserError(f"adapter.name={name} cannot be trained by a run: {_REFUSED[name]}")
    if name not in adapter_names():
        raise UserError(f"unknown adapter {name!r}; {suggestion(name, adapter_names())}")
    parameters = inspect.signature(_class(name)).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key not in _ours()}


def adapter_config(settings: AdapterConfig, model: nn.Module | None = None, steps: int = 1) -> Any:
    """Return the configuration object of peft for an adapter.

    Args:
        settings: with a name.
        model: whose block matrices are adapted where the arguments do not say which modules; None: only check.
        steps: of the run; AdaLoRA spreads its budget over them.

    Raises:
        UserError: peft is absent, an unknown name or argument, a rank for an adapter without one, or values that
            peft refuses.
    """
    name = str(settings.name)
    known = adapter_arguments(name)
    for key in settings.arguments:
        if key not in known:
            raise UserError(f"adapter {name!r} takes no argument {key!r}; {suggestion(key, list(known))}")
        if key in _REFUSED_ARGUMENTS and settings.arguments[key] not in (None, False):
            raise UserError(f"adapter.arguments.{key} cannot be trained by a run: {_REFUSED_ARGUMENTS[key]}")
    arguments = {**_fixed(name), **_ranked(name, settings, known), **settings.arguments}
    if "target_modules" in known and "target_modules" not in arguments and name not in _OWN_TARGETS and model:
        arguments["target_modules"] = _block_matrices(model)
    if "total_step" in known:
        arguments.setdefault("total_step", steps)
    if "progressbar" in known:
        arguments.setdefault("progressbar", False)
    classes = importlib.import_module("peft.tuners.lora.config")
    try:
        for key, nested in _NESTED.items():
            if isinstance(arguments.get(key), Mapping):
                arguments[key] = _made(getattr(classes, nested), arguments[key], f"adapter.arguments.{key}")
        with warnings.catch_warnings(action="ignore"):  # of settings that the named variant does not read
            return _class(name)(**arguments, task_type="CAUSAL_LM")
    except (ValueError, TypeError) as error:
        raise UserError(f"adapter.name={name}: {error}") from None


def describe_adapters() -> Iterator[str]:
    """Return a line for every name: the arguments it takes, for ``--help``."""
    try:
        names = adapter_names()
    except UserError as error:
        yield str(error)
        return
    for name in names:
        fixed = ", ".join(f"{key}={value!r}" for key, value in _fixed(name).items())
        made = f"{_VARIANTS[name][0]} with {fixed}" if fixed else ", ".join(_told(adapter_arguments(name)))
        yield f"{name}: {made}"
    for name, reason in sorted(_REFUSED.items()):
        yield f"not {name}: {reason}"


def _told(arguments: Mapping[str, Any]) -> Iterator[str]:
    for key, default in arguments.items():
        yield f"{key}={default!r}" if isinstance(default, bool | int | float | str) else key


def _ranked(name: str, settings: AdapterConfig, known: Mapping[str, Any]) -> dict[str, Any]:
    """What ``adapter.rank`` says in the arguments of an adapter; factors are not scaled unless they say so."""
    rank = settings.rank
    if rank is None:
        return {}
    ranked: dict[str, Any] = _RANKS.get(name, lambda rank: {"r": rank})(rank)
    if not ranked.keys() <= known.keys():
        rankless = ", ".join(k for k in known if "block" in k or "n_frequency" in k or "vectors" in k)
        raise UserError(
            f"adapter.rank={rank}, but {name!r} has no rank; leave it out"
            + (f", its size is set by adapter.arguments: {rankless}" if rankless else "")
        )
    for alpha in ("lora_alpha", "alpha", "randlora_alpha", "psoft_alpha"):
        if alpha in known and name not in ("deft",):
            ranked[alpha] = rank
    return ranked


def _block_matrices(model: nn.Module) -> list[str]:
    """The last parts of their names, such as q_proj; whole names if some are compressed, to q_proj.left and right."""
    names = list(linear_layers(model))
    if any(name.endswith((".left", ".right")) for name in names):
        return names
    return sorted({name.rpartition(".")[2] for name in names})


def _made(cls: Any, arguments: Mapping[str, Any], where: str) -> Any:
    known = list(inspect.signature(cls).parameters)
    for key in arguments:
        if key not in known:
            raise UserError(f"unknown key {where}.{key}; {suggestion(str(key), known)}")
    return cls(**arguments)


def _class(name: str) -> Any:
    return _registered()[_VARIANTS[name][0] if name in _VARIANTS else name]


def _fixed(name: str) -> dict[str, Any]:
    return _VARIANTS[name][1] if name in _VARIANTS else {}


def _registered() -> dict[str, Any]:
    """peft's own table: tuner in lower case -> configuration class."""
    import_peft()
    table = importlib.import_module("peft.mapping").PEFT_TYPE_TO_CONFIG_MAPPING
    return {str(kind.value).lower(): cls for kind, cls in table.items()}


def _ours() -> set[str]:
    """Arguments every configuration has, about the file rather than the adapter."""
    return set(inspect.signature(import_peft().PeftConfig).parameters)
