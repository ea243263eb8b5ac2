"""Pretraining: build, then one loop."""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from transformers import PreTrainedModel

import optim
from lowrank_train import models, parallel
from lowrank_train.checkpoint import Checkpoints, export_huggingface, find_checkpoint
from lowrank_train.config import Config, save_config
from lowrank_train.data import prepare_data
from lowrank_train.errors import UserError
from lowrank_train.loss import IGNORED
from lowrank_train.metrics import Metrics
from lowrank_train.parallel import Ranks
from lowrank_train.record import RunRecord, peak_memory_gib, provenance
from lowrank_train.report import write_report
from lowrank_train.schedule import learning_rate_factor

__all__ = ["train"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.float32, "float64": torch.float64}
"""Of the weights; bfloat16 is the dtype of the arithmetic only."""


@dataclass
class Progress:
    """Where a run stands; saved in every checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_steps: int = 0
    initial_validation_loss: float | None = None
    train_loss: float | None = None
    bad_in_a_row: int = field(default=0, repr=False)


def train(config: Config) -> RunRecord:
    """Run (or resume) one pretraining as configured; writes everything into ``config.run_dir``.

    Returns:
        The record of the run, also written as record.json; ``status`` tells whether it finished.

    Raises:
        UserError: bad input, a failed checkpoint, or losses that stay non-finite.
    """
    with parallel.start(config.parallel, config.device) as ranks, _stop_signals() as stop:
        return _train(config, ranks, stop)


def _train(config: Config, ranks: Ranks, stop: _Stop) -> RunRecord:
    micro_batches = _micro_batches(config, ranks.world_size)
    folder = Path(str(config.run_dir))
    checkpoint = ranks.first(lambda: _open_run(config, folder))
    data = prepare_data(config, ranks, folder / "data")

    # model: shapes, then shards, then weights
    tokenizer = data.tokenizer
    ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    architecture = models.architecture(config.model, vocab_size=len(tokenizer), seq_len=config.seq_len, **ids)
    optimizer_class = optim.find(config.optimizer["name"])
    model = models.skeleton(architecture, _DTYPES[config.precision])
    blueprint = models.skeleton(architecture, _DTYPES[config.precision])
    parallel.shard_model(model, ranks.mesh, optimizer_class, config.precision)
    if config.model.name in models.SIZES:
        models.initialize(model, blueprint, ranks.device, config.seed)
    else:
        models.load_weights(model, config.model.name, ranks.device)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    # optimizer; its learning rate is set at every step from the schedule, which has no state
    arguments = {key: value for key, value in config.optimizer.items() if key != "name"}
    try:
        optimizer = optim.create(config.optimizer["name"], model, **arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"in optimizer: {error}") from None
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    rate_factor = learning_rate_factor(config.schedule, config.steps)

    # where an earlier session stopped
    about = {"data": data.description, "optimizer": config.optimizer["name"]}
    checkpoints = Checkpoints(
        folder / "checkpoints", ranks, keep=config.checkpoint.keep, asynchronous=config.checkpoint.asynchronous
    )
    progress = Progress()
    torch.manual_seed(config.seed + ranks.rank)
    if checkpoint is not None:
        extra = checkpoints.load(checkpoint, model, optimizer, about)
        progress = Progress(**extra["progress"])
        data.train.load_state_dict(extra["data"])
        _set_random_state(extra["random"], ranks)
        for group, configured in zip(optimizer.param_groups, settings, strict=True):
            group.update(configured)  # the configuration decides, also where it changed since

    def save() -> None:
        extra = {"progress": asdict(progress), "data": data.train.state_dict(), "random": _random_state(ranks)}
        checkpoints.save(progress.step, model, optimizer, extra, about)

    metrics = Metrics(folder, start=progress.step, steps=config.steps, active=ranks.is_first)
    metrics.say(_greeting(config, model, ranks, checkpoint))
    validation_loss = math.nan
    if progress.step == 0:
        validation_loss = progress.initial_validation_loss = evaluate(model, data.validation, config, ranks)
        metrics.log(0, _evaluation(validation_loss))
    sequences = config.tokens_per_step // config.seq_len

    stopping = False

    while progress.step < config.steps and not stopping:
        began = time.perf_counter()
        blocks = ranks.each(lambda: data.train.take(sequences, ranks.rank, ranks.world_size)).to(ranks.device)
        loss = torch.zeros((), device=ranks.device)
        for micro_batch in blocks.chunk(micro_batches):
            part = _mean_loss(model, micro_batch, blocks.shape[0] * config.seq_len, config)
            part.backward()
            loss = loss + part.detach()
        norm = _clip_gradients(model, config.clip)
        mean = ranks.sum(loss) / ranks.world_size
        train_loss, gradient_norm = torch.stack([mean, norm.to(mean.dtype)]).tolist()  # the step's one device sync

        finite = math.isfinite(train_loss) and math.isfinite(gradient_norm)
        factor = rate_factor(progress.step)
        for group, configured in zip(optimizer.param_groups, settings, strict=True):
            group["lr"] = configured["lr"] * factor
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        progress.bad_in_a_row = 0 if finite else progress.bad_in_a_row + 1
        progress.skipped_steps += not finite
        progress.step += 1
        progress.tokens += config.tokens_per_step
        progress.train_loss = train_loss if finite else progress.train_loss
        took = time.perf_counter() - began
        progress.seconds += took
        speed = config.tokens_per_step / took

        metrics.advance(train_loss, speed)
        if progress.step % config.log_every == 0 or not finite:
            metrics.log(
                progress.step,
                {
                    "train/loss": train_loss,
                    "train/grad_norm": gradient_norm,
                    "train/learning_rate": config.optimizer.get("lr", settings[0]["lr"]) * factor,
                    "train/tokens": progress.tokens,
                    "train/skipped_steps": progress.skipped_steps,
                    "throughput/tokens_per_second": speed,
                    "memory/peak_gib": peak_memory_gib(ranks.device),
                },
            )
        if progress.bad_in_a_row >= config.max_bad_steps:
            _give_up(progress, checkpoints, metrics)
        if _due(config.evaluation.every, progress.step) and progress.step < config.steps:
            validation_loss = evaluate(model, data.validation, config, ranks)
            metrics.log(progress.step, _evaluation(validation_loss))
        if ranks.any(checkpoints.poll()):
            checkpoints.wait()
        stopping = ranks.any(stop.requested)  # a signal may have reached some ranks only
        if _due(config.checkpoint.every, progress.step) or stopping or progress.step == config.steps:
            save()

    checkpoints.wait()
    finished = progress.step >= config.steps
    if finished:
        validation_loss = evaluate(model, data.validation, config, ranks)
        metrics.log(progress.step, _evaluation(validation_loss))
        export_huggingface(model, tokenizer, folder / "huggingface", ranks)
    metrics.close()
    shards = ranks.mesh.size(ranks.mesh.ndim - 1)
    record = RunRecord(
        status="finished" if finished else "interrupted",
        model=config.model.name,
        parameters=models.parameter_count(model),
        optimizer=dict(config.optimizer),
        steps=progress.step,
        tokens=progress.tokens,
        seconds=progress.seconds,
        tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
        train_loss=progress.train_loss,
        initial_validation_loss=progress.initial_validation_loss,
        validation_loss=_known(validation_loss),
        initial_perplexity=_perplexity(progress.initial_validation_loss),
        perplexity=_perplexity(_known(validation_loss)),
        validation_tokens=int((data.validation[:, 1:] != IGNORED).sum()),
        skipped_steps=progress.skipped_steps,
        peak_memory_gib=peak_memory_gib(ranks.device),
        optimizer_state_bytes=optim.state_bytes(optimizer),
        predicted_optimizer_state_bytes=optim.predicted_state_bytes(
            config.optimizer["name"], blueprint, world_size=shards, shard=ranks.rank % shards, **arguments
        ),
        world_size=ranks.world_size,
        precision=config.precision,
        seed=config.seed,
        data=data.description,
        provenance=provenance(ranks.device),
    )
    if ranks.is_first:
        table = write_report(record, folder, find_checkpoint("auto", folder / "checkpoints"))
        print(f"\n{table}\n", file=sys.stderr)
        if not finished:
            print(f"stopped at step {progress.step}; resume with: {_resume_command()}", file=sys.stderr)
    return record


@torch.no_grad()
def evaluate(model: PreTrainedModel, blocks: Tensor, config: Config, ranks: Ranks) -> float:
    """Mean loss in nats per token over all held-out blocks, every token weighing the same, on any number of ranks."""
    model.eval()
    share = -(-blocks.shape[0] // ranks.world_size)
    padding = blocks.new_full((share * ranks.world_size - blocks.shape[0], blocks.shape[1]), IGNORED)
    mine = torch.cat([blocks, padding])[ranks.rank :: ranks.world_size]  # equal counts: each forward is a collective
    total = torch.zeros(2, dtype=torch.float64)
    for batch in mine.split(config.micro_batch):
        inputs, labels = batch[:, :-1].clamp_min(0).to(ranks.device), batch[:, 1:].to(ranks.device)
        loss = model.token_loss(inputs, labels, config.loss_chunk)
        total += torch.tensor([loss.item(), int((labels != IGNORED).sum())], dtype=torch.float64)
    parallel.reshard(model)  # the root group stays gathered after a forward without backward
    model.train()
    loss_sum, tokens = ranks.sum(total).tolist()
    return loss_sum / tokens


class _Stop:
    """Set by the first SIGINT or SIGTERM; the loop ends after the step at hand."""

    requested = False


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    stop = _Stop()

    def handle(number: int, frame: Any) -> None:
        if not stop.requested:
            print(f"\n{signal.Signals(number).name}: finishing the step, then writing a checkpoint", file=sys.stderr)
        stop.requested = True  # a second one (a terminal and a launcher both send it) changes nothing

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _micro_batches(config: Config, world_size: int) -> int:
    """Forward passes per rank and step. Raises UserError for numbers that do not divide."""
    if config.tokens_per_step % config.seq_len:
        raise UserError(
            f"tokens_per_step={config.tokens_per_step} is not a multiple of seq_len={config.seq_len}; use "
            f"{max(1, round(config.tokens_per_step / config.seq_len)) * config.seq_len}"
        )
    sequences = config.tokens_per_step // config.seq_len
    if sequences % world_size:
        per_rank = max(1, round(sequences / world_size))
        raise UserError(
            f"a step of {sequences} sequences (tokens_per_step / seq_len) does not divide by {world_size} ranks; use "
            f"tokens_per_step={per_rank * world_size * config.seq_len}"
        )
    per_rank = sequences // world_size
    micro_batch = min(config.micro_batch, per_rank)
    if per_rank % micro_batch:
        divisor = max(d for d in range(1, micro_batch + 1) if per_rank % d == 0)
        raise UserError(
            f"micro_batch={config.micro_batch} does not divide the {per_rank} sequences of a rank's step; use "
            f"micro_batch={divisor}"
        )
    return per_rank // micro_batch


def _open_run(config: Config, folder: Path) -> Path | None:
    """Find the checkpoint to start from, make the run folder, write the resolved configuration."""
    checkpoint = find_checkpoint(config.resume, folder / "checkpoints")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
    except OSError as error:
        raise UserError(f"cannot write to run_dir={folder}: {error}; set run_dir to another folder") from None
    return checkpoint


def _mean_loss(model: PreTrainedModel, blocks: Tensor, tokens: int, config: Config) -> Tensor:
    """Share of one micro-batch in the mean loss over a rank's step of ``tokens`` tokens."""
    return model.token_loss(blocks[:, :-1], blocks[:, 1:], config.loss_chunk) / tokens


def _clip_gradients(model: PreTrainedModel, largest: float | None) -> Tensor:
    """Global gradient norm before clipping."""
    if largest is None:
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    else:
        norm = clip_grad_norm_(model.parameters(), largest)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _give_up(progress: Progress, checkpoints: Checkpoints, metrics: Metrics) -> None:
    metrics.close()
    checkpoints.wait()
    last = find_checkpoint("auto", checkpoints.folder)
    raise UserError(
        f"the loss or the gradient was not finite for {progress.bad_in_a_row} steps in a row, up to step "
        f"{progress.step}; these steps changed nothing. Last good checkpoint: {last or 'none'}. Lower optimizer.lr, "
        "lengthen schedule.warmup_steps or lower clip, and resume"
    )


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _evaluation(loss: float) -> dict[str, float]:
    return {"eval/loss": loss, "eval/perplexity": _perplexity(loss) or math.nan}


def _perplexity(loss: float | None) -> float | None:
    return None if loss is None else math.exp(loss) if loss < 700 else math.inf


def _known(loss: float) -> float | None:
    return None if math.isnan(loss) else loss


def _random_state(ranks: Ranks) -> dict[str, Tensor]:
    state = {f"cpu_{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        state[f"cuda_{ranks.rank}"] = torch.cuda.get_rng_state(ranks.device)
    return state


def _set_random_state(saved: dict[str, Tensor], ranks: Ranks) -> None:
    """Continue this rank's random numbers; a rank the checkpoint did not have keeps its fresh seed."""
    if f"cpu_{ranks.rank}" in saved:
        torch.set_rng_state(saved[f"cpu_{ranks.rank}"])
    if ranks.device.type == "cuda" and f"cuda_{ranks.rank}" in saved:
        torch.cuda.set_rng_state(saved[f"cuda_{ranks.rank}"], ranks.device)


def _greeting(config: Config, model: PreTrainedModel, ranks: Ranks, checkpoint: Path | None) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in config.optimizer.items())
    start = f"resuming from {checkpoint}" if checkpoint else f"writing to {config.run_dir}"
    return (
        f"{config.model.name}: {models.parameter_count(model):,} parameters; {settings}; {ranks.world_size} rank(s) on "
        f"{ranks.device.type}; {start}"
    )


def _resume_command() -> str:
    """What was typed, to be typed again: the run folder knows where to go on."""
    words = [word for word in sys.argv if not word.startswith("resume=")]
    ranks = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", "--nproc-per-node", ranks] if ranks else ["python"]
    return shlex.join([*launcher, *words])
