"""The pages of docs/ that follow from the code and the records: ``python docs/generate.py`` (or ``make docs``).

They are ``docs/README.md``, the index with the decision table, ``docs/reference/NAME.md`` for every optimizer, and the
short table in the README. All figures come from the committed records. ``tests/test_docs.py`` fails when a page is not
current.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowrank_train import optim
from lowrank_train.optim.low_rank.engine import LowRankOptimizer
from lowrank_train.optim.methods import summary

DOCS = Path(__file__).resolve().parent

PAGES = {
    "Guides: what to do": {
        "training.md": "pretrain a model: text, settings, resuming, signals, what a run writes",
        "swap.md": "our optimizers in your loop: plain, FSDP2, Trainer, Accelerate, Lightning, torchtitan",
        "migration.md": "arguments of torch, bitsandbytes, GaLore, APOLLO, Fira, FRUGAL, Dion and ours",
        "memory.md": "what fits a device, and how to make more fit",
        "finetuning.md": "fine-tune on text, prompts and responses, or chats; what the exported folder keeps",
        "peft.md": "fine-tune with adapters of peft",
        "sst.md": "Sparse Spectral Training: weights trained as U diag(sigma) V^T",
        "welore.md": "WeLore: compress a model, fine-tune what is low-rank",
        "hyperbolic.md": "parameters on a manifold, graphs and translation in hyperbolic space",
    },
    "Experiments: what happened": {
        "quality.md": "every optimizer on the same tokens: perplexity, memory, limits of the comparison",
        "speed.md": "time of an optimizer step",
        "quickstart.md": "how the settings of `make pretrain` were chosen",
    },
    "Reference": {
        "optimizers.md": "all optimizers in one table; the parts of a low-rank method; 8-bit state",
    },
    "How it works": {
        "how_it_works.md": "sharding, state, checkpoints and the prediction of memory, in short",
        "tested.md": "which claims are tested, how closely, and where",
    },
}
"""Heading -> page -> what it is about. A page that is not listed here fails the generation."""

README_ROWS = ("low_rank_adamw", "apollo", "apollo_mini", "scale", "muon", "adamw")
"""Optimizers of the short table. Of several rows of one optimizer it shows the best."""

README_TABLE = re.compile(
    r"(?<=<!-- table: written by `make docs` from docs/records -->\n).*?(?=<!-- end of table -->)", re.S
)

STEP_ROW = {"dct+normalized": "low_rank_adamw"}
"""Where a row of the quality record has another name in that of step times."""


def pages() -> dict[Path, str]:
    """Return all generated pages by path."""
    reference = {DOCS / "reference" / f"{name}.md": page_of(name) for name in optim.names()}
    costs = with_costs((DOCS / "optimizers.md").read_text())
    return {
        DOCS.parent / "README.md": readme(),
        DOCS / "README.md": index(),
        DOCS / "optimizers.md": costs,
        **reference,
    }


def readme() -> str:
    """Return the README with its short table written anew."""
    rows: dict[str, dict[str, Any]] = {}
    for row in sorted(record("quality")["rows"], key=lambda row: row["perplexity"]):
        rows.setdefault(row["optimizer"]["name"], row)
    table = [
        "| optimizer | take it when | state, bytes per matrix parameter | perplexity, AdamW's = 0 % "
        "| share of training time |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name in README_ROWS:
        row, cls = rows[name], optim.find(name)
        table.append(
            f"| [`{name}`](docs/reference/{name}.md) | {cls.published.when} "
            f"| {row['matrix_state_bytes'] / row['matrix_parameters']:.2f} "
            f"| {row['versus_baseline_percent']:+.1f} % | {row['optimizer_share']:.1%} |"
        )
    table += ["", *prose(
        "One small model on a shared CPU, one seed: differences of a few per cent mean nothing. "
        "[All optimizers, and how this was measured](docs/README.md#which-one)."
    )]  # fmt: skip
    text = (DOCS.parent / "README.md").read_text()
    assert README_TABLE.search(text), "the README has lost the marks of its table"
    return README_TABLE.sub("\n" + "\n".join(table).replace("\\", r"\\") + "\n\n", text)


def index() -> str:
    """Return the index: pages by kind, decision table, optimizers."""
    listed = {name for group in PAGES.values() for name in group} | {"README.md"}
    assert listed == {path.name for path in DOCS.glob("*.md")} | {"README.md"}, "PAGES lists other pages than docs/ has"
    groups = []
    for title, group in PAGES.items():
        groups += [f"## {title}", "", *(f"- [{name}]({name}): {about}" for name, about in group.items()), ""]
    optimizers = [f"| [`{name}`](reference/{name}.md) | {summary(name)} |" for name in optim.names()]
    return "\n".join(
        [
            "# Documentation",
            "",
            "(Generated by `docs/generate.py`. Change that file, or the docstrings and records that it reads.)",
            "",
            *groups,
            "## Which one",
            "",
            *decision_table(),
            "",
            *prose(
                "`sst` and `relora` replace layers of the model. `sst` trains spectral layers, with the least memory "
                "for weights, gradients and state together ([sst.md](sst.md)), and `relora` trains adapters. "
                "`welore_adamw` chooses a rank for every matrix from its weights, which has not been shown to help "
                "([ranks](optimizers.md#a-rank-for-every-matrix)). "
                '`state_dtype="8bit"` divides the float32 state of most optimizers by four once more.'
            ),
            "",
            "## The optimizers one by one",
            "",
            "| name | |",
            "| --- | --- |",
            *optimizers,
            "",
        ]
    )


def decision_table() -> list[str]:
    """Return a row for each row of the quality record, best perplexity first, with step times of the other record."""
    quality, steps = record("quality"), record("optimizer_step_cpu")
    times = {row["name"]: row for row in steps["rows"]}
    lines = [
        "| optimizer | take it when | perplexity (AdamW's: 0 %) | state, bytes per matrix parameter "
        "| step, fused AdamW = 1 | a rank sends per step |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in sorted(quality["rows"], key=lambda row: row["perplexity"]):
        label = row["label"]
        step = times.get(STEP_ROW.get(label, label))
        time = f"{step['amortised_ratio']['fused']:.1f}" if step else ""
        sent = size(step["sent_bytes"]["mean"]) if step else ""
        shown = f"[`{label}`](reference/{row['optimizer']['name']}.md)"
        state = row["matrix_state_bytes"] / row["matrix_parameters"]
        edge = "*" if row["is_on_edge"] else ""
        lines.append(
            f"| {shown} | {when(label, row['optimizer'])} | {row['perplexity']:.1f} "
            f"({row['versus_baseline_percent']:+.1f} %){edge} | {state:.2f} | {time} | {sent} |"
        )
    tokens, parameters = f"{quality['tokens']:,}", f"{quality['parameters']:,}"
    shapes = steps["shapes"]
    lines += ["", *prose(
        f"Perplexity and state: {parameters} parameters, {tokens} tokens, rank a quarter of the width, each row at the "
        "best of four learning rates, one seed, chosen on the tokens reported: differences of a few per cent mean "
        "nothing, `*` is best at the edge of its rates ([quality.md](quality.md), "
        "[record](records/quality.json)). Step: refreshes included, "
        f"{len(shapes)} matrices of up to {max(map(max, shapes))} x {min(map(min, shapes))}, rank {steps['rank']}, "
        f"{steps['provenance']['cores']} CPU cores; sent: by one of {steps['world_size']} ranks for these matrices "
        "([speed.md](speed.md), [record](records/optimizer_step_cpu.json)). Nothing of this was measured on a GPU."
    )]  # fmt: skip
    return lines


def page_of(name: str) -> str:
    """Return the page of an optimizer: what its docstrings and its signature say."""
    cls = optim.find(name)
    doc = inspect.cleandoc(cls.__doc__ or "")
    before, arguments, after = split_arguments(doc)
    module: Any = importlib.import_module(cls.__module__)
    defaults = {key: p.default for key, p in inspect.signature(cls).parameters.items() if key != "params"}
    rows = [
        f"| `{key}` | {'' if key == 'params' else f'`{defaults[key]!r}`'} | {text} |" for key, text in arguments.items()
    ]
    missing = defaults.keys() - arguments.keys()
    assert not missing, f"{cls.__name__} does not document {sorted(missing)}"
    lr = defaults["lr"]
    source = module.__name__.removeprefix("lowrank_train.").replace(".", "/") + ".py"
    call = f'optimizer = optim.create("{name}", model, lr={lr!r})'
    if cls.layers is not None:
        call += f"  # a model with {cls.layers} layers"
    return "\n".join(
        [
            f"# `{name}`: {cls.__name__}",
            "",
            "(Generated from the docstrings by `docs/generate.py`.)",
            "",
            markup(before),
            "",
            f"Published: {cls.published.paper}. [All optimizers](../README.md), [in your loop](../swap.md).",
            "",
            "```python",
            "from lowrank_train import optim",
            "",
            call,
            "```",
            "",
            "| argument | default | |",
            "| --- | --- | --- |",
            *rows,
            "",
            markup(after),
            "",
            f"## The method, from `{source}`",
            "",
            "```text",
            inspect.cleandoc(module.__doc__ or ""),
            "```",
            "",
        ]
    )


def split_arguments(doc: str) -> tuple[str, dict[str, str], str]:
    """Split a docstring into the text before ``Args:``, the arguments described, and the text after them."""
    before, _, rest = doc.partition("\nArgs:\n")
    lines = rest.splitlines()
    end = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    entries: dict[str, str] = {}
    key = ""
    for line in textwrap.dedent("\n".join(lines[:end])).splitlines():
        started = re.match(r"(\w+): (.*)", line)
        if started:
            key, entries[started[1]] = started[1], started[2]
        elif line.strip():
            entries[key] += " " + line.strip()
    return (
        before.strip(),
        {key: markup(text).replace("|", "\\|") for key, text in entries.items()},
        "\n".join(lines[end:]),
    )


def markup(text: str) -> str:
    """Return docstring text as Markdown: ``code`` with one backquote, and sections in bold."""
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    text = re.sub(r"^(Raises|State|We differ)([^:\n]*):$", r"**\1\2:**\n", text, flags=re.MULTILINE)
    return re.sub(r"^    (?=\S)", "", text, flags=re.MULTILINE).strip()


def prose(text: str) -> list[str]:
    """Return the text in lines of at most 120 characters."""
    return textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)


def with_costs(page: str) -> str:
    """The page of all optimizers with its first table made anew, from what every class says of itself."""
    before, _, rest = page.partition("| name |")
    _, _, after = rest.partition("\n\n")
    head = [
        "| name | state of the matrix, bytes | sharded along m, it sends, bytes | paper |",
        "| --- | --- | --- | --- |",
    ]
    rows = []
    for name in optim.names():
        cls = optim.find(name)
        text = inspect.getdoc(cls) or ""
        costs = (sentence("State", text), sentence("Communication when sharded", text))
        if cls.layers is None:
            costs = (state_formula(name), sent_formula(name))
        rows.append(f"| [`{name}`](reference/{name}.md) | {costs[0]} | {costs[1]} | {cls.published.paper} |")
    return before + "\n".join([*head, *rows]) + "\n\n" + after


def sentence(start: str, text: str) -> str:
    """What a docstring says after these words, up to the next paragraph or such words."""
    found = re.search(rf"^{start}[^:]*: (.*?)(?=\n\n|\nCommunication|\Z)", text, re.DOTALL | re.MULTILINE)
    return markup(" ".join(found[1].split())) if found else "of its layers"


def optimizer_of(name: str, m: int, n: int, r: int, dtype: torch.dtype) -> optim.MatrixOptimizer:
    """An optimizer of one matrix, at rank r unless it has its own."""
    rank = inspect.signature(optim.find(name)).parameters.get("rank")
    arguments = {} if rank is None or rank.default is not None else {"rank": r}
    matrix = torch.empty(m, n, dtype=dtype, device="meta")
    return optim.create(name, [{"params": [("matrix", matrix)], "role": "matrix"}], **arguments)


def state_formula(name: str) -> str:
    """Bytes of the state of a matrix m x n at rank r, of numbers of b bytes: read off the shapes of its tensors."""
    sizes = {1009: "m", 211: "n", 53: "r"}
    optimizer = optimizer_of(name, *sizes, torch.bfloat16)  # type: ignore[arg-type]
    terms: Counter[str] = Counter()
    for slot in optimizer.slots():
        for spec in optimizer.state_layout(slot.name, slot.param, slot.group).values():
            stored = spec.dtype == torch.bfloat16
            symbols = [*(sizes[side] for side in sorted(spec.shape, reverse=True) if side > 1), *["b"] * stored]
            terms[" ".join(symbols)] += 1 if stored else spec.dtype.itemsize
    return (
        " + ".join(f"{count} {symbols}".removeprefix("1 ") for symbols, count in terms.items() if symbols)
        or "a step count"
    )


def sent_formula(name: str) -> str:
    """Bytes that a rank of P hands to collectives for a float32 matrix: polynomials fitted to its costs."""
    symbols = ("", "n", "r", "n r", "n^2", "r^2", "m n / P")
    sizes = [(80 * (i + 5), 11 + 3 * i + i * i % 7, 2 + i % 5 + i % 3) for i in range(14)]
    terms = [(1, n, r, n * r, n * n, r * r, m * n // 8) for m, n, r in sizes]
    costs = []
    for m, n, r in sizes:
        optimizer = optimizer_of(name, m, n, r, torch.float32)
        (group,) = optimizer.param_groups
        costs.append(optimizer.update_of(group).sent((m, n), torch.float32, group, 8, 0))
    found = []
    for values, when_sent in zip(zip(*costs, strict=True), ("per step", "per refresh"), strict=True):
        fitted = np.linalg.lstsq(np.array(terms, float), np.array(values, float), rcond=None)[0].round().astype(int)
        assert (np.array(terms) @ fitted == values).all(), f"the bytes {name} sends are no polynomial of {symbols}"
        formula = " + ".join(
            f"{count} {symbol}".strip() for count, symbol in zip(fitted, symbols, strict=True) if count
        )
        found += [f"{formula} {when_sent}"] * bool(formula)
    return ", ".join(found) or "nothing"


def when(label: str, settings: dict[str, Any]) -> str:
    """Say when to take a row of the quality record: as its class says, or how it differs from its class."""
    cls = optim.find(settings["name"])
    parts = cls.parts._asdict() if issubclass(cls, LowRankOptimizer) else {}
    other = [f'`{key}="{settings[key]}"`' for key, part in parts.items() if settings.get(key, part) != part]
    return f"as `{cls.name}`, with {', '.join(other)}" if other else cls.published.when


def record(name: str) -> dict[str, Any]:
    """Read a committed record."""
    return json.loads((DOCS / "records" / f"{name}.json").read_text())


def size(count: float) -> str:
    """Return a number of bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError


def main() -> None:
    """Write every page."""
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
