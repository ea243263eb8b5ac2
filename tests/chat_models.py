"""A tiny chat model as people publish them: special tokens, a chat template, settings of generation, bfloat16."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig, PreTrainedTokenizerFast

from tests.runs import documents

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

GENERATION = {"eos_token_id": [2, 0], "pad_token_id": 0, "temperature": 0.6, "top_p": 0.95, "max_length": 40}
"""A temperature without do_sample: transformers reads it, and refuses to write it."""


def chat_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Ids 0, 1 and 2 are the special tokens."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(documents(60), vocab_size=320, special_tokens=SPECIAL, show_progress=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
    )
    made.chat_template = template
    return made


def chat_folder(
    folder: Path, template: str | None = CHATML, *, family: str = "llama", dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write the model, its tokenizer, and what a published folder has beside them."""
    tokenizer = chat_tokenizer(template)
    config: PretrainedConfig
    shared = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 0, "max_position_embeddings": 256}
    if family == "llama":
        config = LlamaConfig(intermediate_size=48, **shared, **ids)
    else:
        config = OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **shared, **ids)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "tokenizer.model").write_bytes(b"the original")
    return folder


def write_rows(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
