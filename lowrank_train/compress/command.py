"""The compress command: settings, spectra from a cache, ranks, the compressed model and its perplexity."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_train.common.errors import UserError, first_line
from lowrank_train.common.ranks import Ranks, start
from lowrank_train.common.record import provenance
from lowrank_train.common.units import parse_bytes
from lowrank_train.compress.calibration import input_energies, input_moments, outlier_shares
from lowrank_train.compress.ranks import PlannedMatrix, compress, plan_ranks, planned
from lowrank_train.compress.report import Compression, write_report
from lowrank_train.config.loading import flags_to_keys, load_schema
from lowrank_train.config.settings import key_help, setting
from lowrank_train.data.export_files import save_tokenizer
from lowrank_train.data.tokenizer_folder import read_tokenizer
from lowrank_train.files.json_files import read_mapping
from lowrank_train.layers.choice import linear_layers
from lowrank_train.layers.plain import merge
from lowrank_train.models.compressed_folder import is_compressed, save_model
from lowrank_train.models.families import family_of
from lowrank_train.models.folders import load_model, model_folder
from lowrank_train.optim.spectral.ranks import SCORES
from lowrank_train.reports import writing
from lowrank_train.spectra.pruning import TextConfig, evaluation_blocks, text_loss
from lowrank_train.spectra.spectrum import spectrum_of

__all__ = ["CompressConfig", "compress_folder", "compressed", "help_text", "load_settings", "weights_hash"]


@dataclass
class CompressConfig:
    """How a model is compressed."""

    method: Literal["welore", "uniform", "owl"] = setting(
        "welore",
        "ranks by: welore (one threshold for all singular values), uniform (the same share of every matrix), "
        "owl (a share per decoder block, from outliers among its weights and inputs)",
    )
    rank_reduction: float | None = setting(None, "share of all ranks to remove", above=0, below=1)
    size: str | None = setting(None, "instead: bytes of the whole model's parameters, such as 600MiB or 60%")
    ranks: str | None = setting(
        None, "instead: ranks as they are in a compress.json, or a JSON file of name: rank", path=True
    )
    merge: bool = setting(False, "instead: make the plain model of a compressed folder")
    score: str = setting("minmax", "of welore: minmax (the paper), relative, energy or energy_per_cost")
    classification: Literal["break_even", "half", "all"] = setting(
        "break_even",
        "which matrices are of low rank: those whose factors are smaller (break_even), of a rank below half (the "
        "paper's fine-tuning), or all, truncated even where they do not get smaller (the paper's compression)",
    )
    multiple: int = setting(1, "ranks are multiples of it", at_least=1)
    floor: int = setting(1, "least rank", at_least=1)
    ceiling: int | None = setting(
        None, "largest rank of factors; a matrix for which that is too large stays whole", at_least=1
    )
    whiten: bool = setting(False, "factors that lose least on the layers' inputs (calibration text), not on weights")
    calibration_tokens: int = setting(
        16384, "tokens for whiten and owl, from the text that follows the evaluated one", at_least=1
    )
    owl_strength: float = setting(0.08, "of owl: shares of two blocks differ by at most twice this", above=0, below=1)
    data: TextConfig = field(default_factory=TextConfig)
    perplexity: bool = setting(True, "measure perplexity before and after")
    micro_batch: int = setting(8, "sequences in one forward pass", at_least=1, at_most=10**6)
    layers: str | None = setting(
        None, "regular expression: which linear layers, by name; null: attention and feed-forward matrices"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    cache: str | None = setting(
        None, "folder of spectra by the model's hash; null: ~/.cache/lowrank_train/spectra", path=True
    )
    out: str | None = setting(None, "folder of the compressed model and its report; must not exist yet", path=True)


def help_text() -> str:
    """Return how to call the command, and every key with its default and meaning."""
    usage = [
        "usage: launch/compress.py FOLDER --rank-reduction 0.5 --out small/ [--key value ...] [key=value ...]",
        "",
        "FOLDER: a Hugging Face folder, or the folder of a finished run",
        "",
    ]
    return "\n".join([*usage, *key_help(CompressConfig)])


def load_settings(arguments: Sequence[str]) -> tuple[Path, CompressConfig]:
    """Return the folder of the model and the settings. Raises UserError for unknown keys, values out of range, no
    model.

    Raises UserError for unknown keys, values out of range, no model.
    """
    words = flags_to_keys(arguments, CompressConfig)
    folders = [word for word in words if "=" not in word and not word.endswith((".yaml", ".yml"))]
    config = load_schema(CompressConfig, [word for word in words if word not in folders])
    if len(folders) != 1:
        raise UserError(
            f"{len(folders)} models given; expected one: launch/compress.py FOLDER --out small/, see --help"
        )
    if config.out is None:
        raise UserError("no folder for the result; give --out small/")
    out = Path(config.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out={config.out} exists already; give another folder, or delete it")
    targets = {"rank_reduction": config.rank_reduction, "size": config.size, "ranks": config.ranks}
    given = [key for key, value in {**targets, "merge": config.merge or None}.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"give one of rank_reduction, size, ranks and merge; got {', '.join(given) or 'none'}")
    if config.size is not None:
        _bytes(config.size, 2**40)  # its unit, before a model is read
    if config.score not in SCORES:
        raise UserError(f"score={config.score!r}; expected one of {', '.join(SCORES)}")
    return model_folder(folders[0]), config


def compress_folder(folder: Path, config: CompressConfig) -> str:
    """Compress the model of a folder into ``config.out``; returns the table.

    Under torchrun the spectra are dealt to the ranks; each of them calibrates and truncates.

    Raises:
        UserError: a model or text that cannot be read, weights that are not finite, a target out of reach, no matrix
            that qualifies, ranks of another model, ``out`` that cannot be written.
    """
    out = Path(str(config.out))
    with start(config.device) as ranks, writing(out):
        try:
            tokenizer = ranks.on_first(lambda: _tokenizer(folder))
            model = load_model(folder).to(ranks.device)
            if config.merge:
                return _merge(model, tokenizer, folder, out, ranks)
            if is_compressed(folder):
                raise UserError(f"{folder} is compressed already; give the model it was made of, or --merge")
            result = compressed(model, folder, config, ranks)
            ranks.first(lambda: _write(model, tokenizer, folder, out))
            table: str = ranks.first(lambda: write_report(result, asdict(config), provenance(ranks.device), out))
        except ValueError as error:
            raise error if isinstance(error, UserError) else UserError(f"in {folder}: {error}") from None
    return table


def compressed(model: PreTrainedModel, folder: Path, config: CompressConfig, ranks: Ranks) -> Compression:
    """Compress the model of a folder in place, and measure it before and after. Raises UserError or ValueError."""
    family_of(model.config.model_type, folder)
    linears = linear_layers(model, config.layers)
    is_owl = config.method == "owl" and config.ranks is None
    blocks, batches = _text(model, folder, config, ranks, calibrates=config.whiten or is_owl)
    before = text_loss(model, blocks, config.micro_batch, ranks) if blocks is not None and config.perplexity else None

    sigma = _spectra(linears, folder, config, ranks)
    offsets = _owl_offsets(model, linears, batches, config) if is_owl else None
    exact, stored = model.dtype, _stored_dtype(model)
    _cast(model, stored)  # sizes are those of the files
    plan = _plan(model, linears, sigma, offsets, config)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    _cast(model, exact)
    moments = None
    if config.whiten:
        chosen = {matrix.name: linears[matrix.name] for matrix in plan if matrix.is_low_rank}
        moments = input_moments(model, chosen, batches)
    compress(model, plan, moments)
    _cast(model, stored)  # factors are measured as they are written, rounded
    parameters_after = sum(p.numel() * p.element_size() for p in model.parameters())
    _cast(model, exact)
    after = text_loss(model, blocks, config.micro_batch, ranks) if blocks is not None and config.perplexity else None
    return Compression(str(folder), plan, sigma, parameters, parameters_after, before, after)


def _text(
    model: PreTrainedModel, folder: Path, config: CompressConfig, ranks: Ranks, *, calibrates: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Blocks that are evaluated (None: perplexity is not wanted), and the inputs of calibration, which follow them.

    Sequences are as long as the model's positions at most.
    """
    data = config.data
    if not config.perplexity and not calibrates:
        return None, []
    positions = model.config.max_position_embeddings
    if data.seq_len > positions:
        if ranks.is_first:
            print(
                f"data.seq_len={data.seq_len} exceeds the {positions} positions of {folder}: {positions} is taken",
                file=sys.stderr,
            )
        data.seq_len = positions  # which the report states
    rows = -(-data.tokens // data.seq_len)
    wanted = rows * data.seq_len + config.calibration_tokens if calibrates else data.tokens
    blocks, _ = evaluation_blocks(replace(data, tokens=wanted), folder)
    inputs = blocks[rows:, :-1]
    inputs = inputs[(inputs >= 0).all(1)]  # padding is no text
    if calibrates and not len(inputs):
        raise UserError(
            f"whiten and owl calibrate on text that follows the {data.tokens} tokens evaluated, and there is none "
            "left: give more text with data.path, or lower data.tokens"
        )
    return blocks[:rows] if config.perplexity else None, list(inputs.split(config.micro_batch))


def _bytes(size: str, whole: int) -> int:
    try:
        return parse_bytes(size, whole)
    except ValueError as error:
        raise UserError(f"size={error}") from None


def _plan(
    model: PreTrainedModel,
    linears: Mapping[str, nn.Linear],
    sigma: Mapping[str, Tensor],
    offsets: Mapping[str, float] | None,
    config: CompressConfig,
) -> list[PlannedMatrix]:
    if config.ranks is not None:
        return _plan_of_file(config.ranks, linears, config.classification)
    matrices = sum(linear.weight.numel() * linear.weight.element_size() for linear in linears.values())
    budget = None
    if config.size is not None:
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        budget = _bytes(config.size, whole) - (whole - matrices)
        if budget >= matrices:
            raise UserError(f"size={config.size} is not below the model's {whole:,} bytes; give less")
        if budget < 0:
            raise UserError(
                f"size={config.size} is below what is not compressed: embeddings, head and norms take "
                f"{whole - matrices:,} bytes; give more"
            )
    return plan_ranks(
        model,
        sigma,
        rank_reduction=config.rank_reduction,
        parameter_bytes=budget,
        score=config.score if config.method == "welore" else "uniform",
        classification=config.classification,
        offsets=offsets,
        multiple=config.multiple,
        floor=config.floor,
        ceiling=config.ceiling,
    )


def _plan_of_file(file: str, linears: Mapping[str, nn.Linear], classification: str) -> list[PlannedMatrix]:
    try:
        found = read_mapping(Path(file), "expected a compress.json, or JSON of name: rank")
        matrices = found.get("matrices", [])
        rank_of = {row["name"]: row["rank"] for row in matrices} if matrices else dict(found)
        shape_of = {row["name"]: (row["rows"], row["columns"]) for row in matrices}
    except UserError as error:
        raise UserError(f"cannot read ranks={error}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read ranks={file}: {error}; expected a compress.json, or JSON of name: rank") from None
    for name, rank in rank_of.items():
        if name not in linears:
            raise UserError(f"ranks={file} has {name!r}, which the model has not: it is of another model")
        shape = tuple(linears[name].weight.shape)
        if shape_of.get(name, shape) != shape:
            raise UserError(f"ranks={file} has {name!r} of shape {shape_of[name]}, not {shape}: it is of another model")
        k = min(linears[name].weight.shape)
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= k:
            raise UserError(f"ranks={file} has rank {rank!r} for {name!r}; expected 1 to {k}: it is of another model")
    whole = {name: min(linear.weight.shape) for name, linear in linears.items()}
    return [
        planned(name, linear.weight, rank_of.get(name, whole[name]), classification) for name, linear in linears.items()
    ]


def _owl_offsets(
    model: PreTrainedModel, linears: Mapping[str, nn.Linear], batches: list[Tensor], config: CompressConfig
) -> dict[str, float]:
    """By how much each matrix's share of ranks differs from the mean: by outliers of its decoder block (OWL, Eq. 4)."""
    energies = input_energies(model, linears, batches)
    blocks: dict[str, dict[str, nn.Linear]] = {}
    for name, linear in linears.items():
        found = re.search(r"layers\.(\d+)\.", name)
        blocks.setdefault(found[1] if found else name, {})[name] = linear
    shares = {block: outlier_shares(members, energies) for block, members in blocks.items()}
    spread = max(shares.values()) - min(shares.values())
    scaled = {block: (share - min(shares.values())) / spread if spread else 0.0 for block, share in shares.items()}
    mean = sum(scaled.values()) / len(scaled)
    return {
        name: 2 * config.owl_strength * (scaled[block] - mean) for block, members in blocks.items() for name in members
    }


def _spectra(linears: Mapping[str, nn.Linear], folder: Path, config: CompressConfig, ranks: Ranks) -> dict[str, Tensor]:
    """Of all layers, from the cache or dealt to the ranks."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lowrank_train", "spectra")
    file = Path(config.cache or home, f"{ranks.first(lambda: weights_hash(folder))}.safetensors")
    cached = ranks.first(lambda: _read_cache(file, linears))
    if cached is not None:
        return cached
    names = list(linears)
    like = [{"sigma": torch.empty(min(linears[n].weight.shape), dtype=torch.float64, device="meta")} for n in names]

    def work(i: int) -> dict[str, Tensor]:
        try:
            return {"sigma": spectrum_of(names[i], linears[names[i]].weight).to(ranks.device)}
        except ValueError as error:
            raise UserError(f"in {folder}: {error}") from None

    found = {names[i]: values["sigma"].cpu() for i, values in ranks.deal(len(names), work, like)}
    ranks.first(lambda: _write_cache(file, found))
    return found


def weights_hash(folder: Path) -> str:
    """Return a digest of the weights and the configuration of a model folder."""
    hasher = hashlib.blake2b(digest_size=16)
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]):
        hasher.update(file.name.encode())
        with file.open("rb") as data:
            while chunk := data.read(2**24):
                hasher.update(chunk)
    return hasher.hexdigest()


def _read_cache(file: Path, linears: Mapping[str, nn.Linear]) -> dict[str, Tensor] | None:
    if not file.is_file():
        return None
    try:
        cached = load_file(file)
    except Exception:  # a damaged cache is made anew
        return None
    fits = all(
        name in cached
        and cached[name].shape == (min(linear.weight.shape),)
        and cached[name].dtype == torch.float64
        and bool((cached[name].isfinite() & (cached[name] >= 0)).all())
        for name, linear in linears.items()
    )
    return {name: cached[name] for name in linears} if fits else None


def _write_cache(file: Path, found: dict[str, Tensor]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}.tmp")
        save_file(found, scratch)
        scratch.replace(file)
    except OSError:
        return  # only time is lost


def _merge(model: PreTrainedModel, tokenizer: Any, folder: Path, out: Path, ranks: Ranks) -> str:
    merge(model)
    ranks.first(lambda: _write(model, tokenizer, folder, out))
    return f"{out}: a plain Hugging Face folder with the outputs of {folder}"


def _stored_dtype(model: PreTrainedModel) -> torch.dtype:
    """Of the folder it was read from; in memory it is wider."""
    stored = model.config.dtype
    return stored if isinstance(stored, torch.dtype) else model.dtype


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The parameters only: rotations of positions are computed, in float32."""
    for param in model.parameters():
        param.data = param.data.to(dtype)


def _tokenizer(folder: Path) -> Any:
    """Read before anything is written: the folder of the result is to have it too."""
    try:
        return read_tokenizer(folder)
    except Exception as error:  # the readers raise many kinds
        reason = first_line(error)
        raise UserError(f"cannot load the tokenizer in {folder}: {reason}; put the model's own there") from None


def _write(model: PreTrainedModel, tokenizer: Any, folder: Path, out: Path) -> None:
    _cast(model, _stored_dtype(model))
    try:
        save_model(model, out, source=folder)
        save_tokenizer(tokenizer, out)
    except UserError:
        raise
    except Exception as error:  # the writers in Rust raise errors of their own
        raise UserError(f"cannot write to out={out}: {error}; set out to another folder") from None
