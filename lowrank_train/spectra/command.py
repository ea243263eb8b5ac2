"""The spectrum command: settings, models from folders, and what is measured on them, each matrix decomposed once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import Ranks, start
from lowrank_train.common.record import provenance
from lowrank_train.config.loading import load_schema
from lowrank_train.config.settings import key_help, setting
from lowrank_train.layers.choice import linear_layers
from lowrank_train.models.families import family_of
from lowrank_train.models.folders import is_export_of_run, load_model, model_folder, model_label
from lowrank_train.reports import writing
from lowrank_train.spectra.history import history
from lowrank_train.spectra.plots import ModelSpectra
from lowrank_train.spectra.pruning import Prunable, TextConfig, evaluation_blocks, pruning_curve
from lowrank_train.spectra.report import write_history, write_report
from lowrank_train.spectra.spectrum import best_cosines, decompositions, factors_of_weight
from lowrank_train.text.labels import IGNORED

__all__ = ["SpectrumConfig", "help_text", "load_settings", "measure"]

"""Kinds of model whose loss ``token_loss`` computes."""


@dataclass
class SpectrumConfig:
    """What is measured on the models."""

    before: str | None = setting(
        None, "folder of the model before training: counts intruder dimensions against it; null: not counted", path=True
    )
    top_k: int = setting(
        10, "leading left singular vectors of each matrix that are looked at for intruders", at_least=1
    )
    epsilon: float = setting(
        0.5, "largest |cosine| with the vectors before below which one is an intruder", above=0, at_most=1
    )
    prune: bool | None = setting(
        None, "measure perplexity with the smallest singular values dropped; null: if data.path is given"
    )
    keep: list[float] = setting(  # noqa: RUF009
        [100, 99, 98, 97, 96, 95, 93, 90],
        "per cent of the sum of singular values that pruning keeps in each matrix",
        above=0,
        at_most=100,
    )
    data: TextConfig = field(default_factory=TextConfig)
    micro_batch: int = setting(8, "sequences in one forward pass", at_least=1, at_most=10**6)
    layers: str | None = setting(
        None, "regular expression: which linear layers, by name; . for all; null: attention and feed-forward matrices"
    )
    checkpoints: bool = setting(False, "of one run folder: how the spectra changed over its checkpoints, and no more")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    out: str | None = setting(
        None,
        "folder of the results; null: spectrum/ in the run folder, or runs/spectrum/<model> for other models",
        path=True,
    )


def help_text() -> str:
    """Return how to call the command, and every key with its default and meaning."""
    usage = [
        "usage: launch/spectrum.py FOLDER [FOLDER ...] [FILE.yaml ...] [key=value ...]",
        "",
        "FOLDER: a Hugging Face folder, or the folder of a finished run; several share the pruning plot",
        "",
    ]
    return "\n".join([*usage, *key_help(SpectrumConfig)])


def load_settings(arguments: Sequence[str]) -> tuple[dict[str, Path], SpectrumConfig]:
    """Return folders of models by label, and the settings.

    Args:
        arguments: words that are neither key=value nor YAML files are folders.

    Raises:
        UserError: no folder, one without a model in it, unknown key, value out of range.
    """
    words = [a for a in arguments if Path(a).is_dir() or ("=" not in a and not a.endswith((".yaml", ".yml")))]
    config = load_schema(SpectrumConfig, [a for a in arguments if a not in words])
    if not words:
        raise UserError("no model given; expected launch/spectrum.py FOLDER [key=value ...], see --help")
    folders: dict[str, Path] = {}
    if config.checkpoints and len(words) > 1:
        raise UserError(f"{len(words)} folders with checkpoints=true; expected one run folder")
    for word in words:
        folder = Path(word) if config.checkpoints else model_folder(word)
        name = label = model_label(folder)
        while label in folders:
            label = f"{name}-{len(folders) + 1}"
        folders[label] = folder
    if config.before is not None:
        config.before = str(model_folder(config.before, "before="))
    if config.prune is None:
        config.prune = config.data.path is not None
    if config.out is None:
        first = next(iter(folders.values()))
        own = first.parent / "spectrum" if is_export_of_run(first) and len(folders) == 1 else None
        own = first / "spectrum" if config.checkpoints else own
        config.out = str(own or Path("runs", "spectrum", "-vs-".join(folders)))
    if not config.keep:
        raise UserError("keep=[]; expected at least one of the per cents that pruning keeps")
    return folders, config


def measure(folders: dict[str, Path], config: SpectrumConfig) -> str:
    """Measure the spectra of every model, intruders and pruning curve where asked for; writes the files, returns the
    tables.

    Args:
        folders: of the models, by label.
        config: as ``load_settings`` gives it.

    Raises:
        UserError: a model, its tokenizer or the text cannot be read, weights that are not finite, no matrix that
            matches, ``before`` of other shapes, ``out`` that cannot be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("one process measures spectra; start it with python instead of torchrun")
    out = Path(str(config.out))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)  # before hours of work rather than after
    if config.checkpoints:
        label, run = next(iter(folders.items()))
        snapshots = history(run, config.layers)
        with writing(out):
            return write_history(label, snapshots, asdict(config), provenance(torch.device("cpu")), out)
    texts = {label: evaluation_blocks(config.data, folder) for label, folder in folders.items() if config.prune}
    with start(config.device) as ranks:
        before = None if config.before is None else load_model(Path(config.before)).to(ranks.device)
        results = []
        for label, folder in folders.items():
            model = load_model(folder).to(ranks.device)
            try:
                blocks = texts[label][0] if config.prune else None
                results.append(_measure(ModelSpectra(label, folder), model, before, blocks, config, ranks))
            except ValueError as error:
                raise error if isinstance(error, UserError) else UserError(f"in {folder}: {error}") from None
            del model
    with writing(out):
        return write_report(results, asdict(config), _notes(texts), provenance(ranks.device), out)


def _measure(
    result: ModelSpectra,
    model: PreTrainedModel,
    before: PreTrainedModel | None,
    blocks: Tensor | None,
    config: SpectrumConfig,
    ranks: Ranks,
) -> ModelSpectra:
    linears = linear_layers(model, config.layers)
    old = {} if before is None else _counterparts(linears, before, str(config.before))
    if blocks is not None:
        _check_prunable(model, linears, blocks.shape[1] - 1, result.folder)
    prunable = []
    for name, linear, factors in decompositions(model, config.layers):
        result.shapes[name] = (linear.out_features, linear.in_features)
        result.sigma[name] = factors["sigma"].cpu()
        if before is not None:
            u = factors_of_weight(f"{name} of before={config.before}", old[name].weight)["u"]
            result.cosines[name] = best_cosines(factors["u"], u, config.top_k).cpu()
        if blocks is not None:
            prunable.append(Prunable.of(linear, factors))
    if blocks is not None:
        result.points = pruning_curve(model, prunable, config.keep, blocks, config.micro_batch, ranks)
    return result


def _counterparts(linears: dict[str, nn.Linear], before: nn.Module, folder: str) -> dict[str, nn.Linear]:
    """The layers of the same names in ``before``. Raises UserError if one is missing or has another shape."""
    modules = dict(before.named_modules())
    for name, linear in linears.items():
        other = modules.get(name)
        wanted = tuple(linear.weight.shape)
        got = tuple(other.weight.shape) if isinstance(other, nn.Linear) else "nothing"
        if got != wanted:
            raise UserError(
                f"before={folder} is of another architecture: it has {got} for {name!r}; expected shape {wanted}"
            )
    return {name: modules[name] for name in linears}  # type: ignore[misc]


def _check_prunable(model: PreTrainedModel, linears: dict[str, nn.Linear], length: int, folder: Path) -> None:
    try:
        family_of(model.config.model_type, folder)
    except UserError as error:
        raise UserError(f"{error}, for perplexity; or set prune=false") from None
    if length > model.config.max_position_embeddings:
        raise UserError(
            f"data.seq_len={length} exceeds the {model.config.max_position_embeddings} positions of {folder}; "
            f"set data.seq_len={model.config.max_position_embeddings}"
        )
    embedding = model.get_input_embeddings().weight
    tied = next((name for name, linear in linears.items() if linear.weight is embedding), None)
    if tied is not None:
        raise UserError(f"{folder}: {tied!r} is tied to the embeddings, which pruning would change; change layers")


def _notes(texts: dict[str, tuple[Tensor, dict[str, int]]]) -> list[str]:
    """What must be known to read the perplexities."""
    if not texts:
        return []
    counts = {label: int((blocks[:, 1:] != IGNORED).sum()) for label, (blocks, _) in texts.items()}
    first, (_, vocabulary) = next(iter(texts.items()))
    return [
        "perplexity is per token, over " + ", ".join(f"{count:,} tokens ({label})" for label, count in counts.items()),
        *(
            f"{first} and {label} have different tokenizers: their perplexities cannot be compared"
            for label, (_, other) in texts.items()
            if other != vocabulary
        ),
    ]
