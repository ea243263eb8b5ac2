"""What the tests of other people's loops share: a tiny model, tokens and prompts on disk, and ranks to run scripts on.

Scripts run as torchrun would run them, one forked process per rank with its environment variables, except that the
process group exists already (``tests.distributed``: no ports).

Accelerate shards on a GPU only, and falls back to DistributedDataParallel on a CPU without a word. ``run_ranks`` makes
it take its own FSDP2 path here too, by the one line that does so on a GPU; tests check that parameters are sharded.
"""

from __future__ import annotations

import gc
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowrank_train import optim
from tests.distributed import run_distributed
from tests.optim.models import all_whole

STEPS, SEQUENCES, LENGTH, VOCABULARY = 6, 4, 16, 64
LR, WEIGHT_DECAY, MAX_NORM, RANK = 1e-2, 0.1, 1.0, 8
SETTINGS = {"lr": LR, "weight_decay": WEIGHT_DECAY, "rank": RANK, "refresh_interval": 2}
WORDS = ["red", "green", "blue", "one", "two", "three", "colour", "number", "is", "?", "a", "not"]


def write_material(folder: Path, *, tied: bool = False) -> None:
    """``my_model/`` (LLaMA of two layers, tokenizer), ``my_tokens.pt`` (steps, sequences, length), ``my.jsonl``."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "my_model")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "my_model")
    starts = torch.randint(0, VOCABULARY, (STEPS, SEQUENCES, 1))
    torch.save((starts + 3 * torch.arange(LENGTH)) % VOCABULARY, folder / "my_tokens.pt")  # learnt in a few steps
    answers = {"red": "colour", "green": "colour", "blue": "colour", "one": "number", "two": "number"}
    lines = [json.dumps({"prompt": f"{key} is ?", "response": f"a {value}"}) for key, value in answers.items()]
    (folder / "my.jsonl").write_text("\n".join(lines * 3) + "\n")


def run_ranks(function: Callable[..., Any], world_size: int, folder: Path, *args: Any) -> list[Any]:
    """``function(*args)`` on every rank, in ``folder``; its values by rank. One rank is a plain process."""

    def on_rank() -> Any:
        rank = dist.get_rank()
        gc.freeze()  # collections would touch, and so copy, every page the parent has
        if world_size > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                GROUP_RANK="0",
                WORLD_SIZE=str(world_size),
                LOCAL_WORLD_SIZE=str(world_size),
                TORCHELASTIC_RUN_ID="tests",
                ACCELERATE_USE_CPU="true",  # as accelerate launch --cpu
                MASTER_ADDR="localhost",  # read by some, used by none
                MASTER_PORT="1",
            )
        os.chdir(folder)
        # A bar would take a lock that all forked processes share.
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        datasets.config.HF_DATASETS_CACHE = Path("datasets")
        with fsdp_on_cpu(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the frameworks; ours are errors
            warnings.filterwarnings("error", module="optim")
            return function(*args)

    return run_distributed(on_rank, world_size)


@contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Where Accelerate is handed an FSDP plugin, it uses it."""
    try:
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import DistributedType
    except ImportError:
        yield
        return
    init = AcceleratorState.__init__

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin
            if self._mixed_precision != "no":
                plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = patched  # type: ignore[method-assign]
    try:
        yield
    finally:
        AcceleratorState.__init__ = init  # type: ignore[method-assign]


def load_model(**arguments: Any) -> nn.Module:
    return LlamaForCausalLM.from_pretrained("my_model", **arguments)


def plain_losses(
    optimizer_of: Callable[[nn.Module], torch.optim.Optimizer], *, accumulate: int = 1, constant: bool = False
) -> tuple[list[float], nn.Module, torch.optim.Optimizer]:
    """The reference: one process, all sequences, linear decay, clipped gradients."""
    model = load_model()
    optimizer = optimizer_of(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if constant else 1 - step / STEPS)
    losses = []
    for tokens in torch.load("my_tokens.pt"):
        total = 0.0
        for part in tokens.chunk(accumulate):
            loss = model(input_ids=part, labels=part).loss / accumulate
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, model, optimizer


def create(model: nn.Module, **changes: Any) -> optim.MatrixOptimizer:
    return optim.create("dct_adamw", model, **{**SETTINGS, **changes})


def mean_over_ranks(losses: list[float]) -> list[float]:
    tensor = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(tensor)
    return (tensor / dist.get_world_size()).tolist()


def difference(losses: list[float], others: list[float]) -> float:
    assert len(losses) == len(others)
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole, with the names of the bare model (a collective where it is sharded)."""
    weights = all_whole(dict(model.named_parameters()))
    return {name.removeprefix("module."): value for name, value in weights.items()}


def named_states(optimizer: Any) -> dict[str, Tensor]:
    """All state, whole, by ``parameter.key``."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return all_whole({f"{slot.name}.{key}": value for slot in optimizer.slots() for key, value in slot.state.items()})


def sharded_share(optimizer: Any) -> float:
    """Bytes of state this rank holds, by those one process would."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    whole = sum(
        value.numel() * value.element_size() for state in optimizer.state.values() for value in state.values()
    )  # of a DTensor: by its global shape
    return optim.state_bytes(optimizer) / whole


def is_sharded(model: nn.Module) -> bool:
    return all(isinstance(param, DTensor) for param in model.parameters())
