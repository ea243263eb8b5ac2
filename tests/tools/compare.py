"""Hold two checkouts against each other, so that a move of code can prove that it changed nothing.

    python tests/tools/compare.py OTHER_CHECKOUT            # OTHER_CHECKOUT against the checkout of this file
    git worktree add /tmp/before HEAD~1 && python tests/tools/compare.py /tmp/before

Each checkout is probed in processes that see its packages alone. Compared are:

    help      the --help of every launch file and of every benchmark
    names     the public names of ``optim`` with their signatures
    state     keys, shapes and types of every optimizer's state, its predicted bytes, and its hyperparameters
    weights   a digest of all weights after five steps of every optimizer, in float32, bfloat16 and with 8-bit state
    errors    the texts of bad input: arguments of optimizers, and whole commands
    run       a quickstart of four steps: losses, gradient norms, exported weights; and, from the second step on, the
              same run continued from the other checkout's checkpoint, in both directions

The exit code is 0 if all are the same, 1 if some differ; every difference is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

THIS = Path(__file__).resolve().parents[2]
STEPS = 5
RUN_STEPS = 4
CONVERTED = {"sst": "spectral", "relora": "adapter", "riemannian_adamw": "points"}
"""Optimizer -> the conversion its layers need."""

BAD_ARGUMENTS: dict[str, Callable[[Any, Any], object]] = {
    "no roles": lambda optim, model: optim.DCTAdamW(model.parameters()),
    "negative lr": lambda optim, model: optim.create("dct_adamw", model, lr=-1.0),
    "betas": lambda optim, model: optim.create("dct_adamw", model, betas=(0.9, 1.0)),
    "eps": lambda optim, model: optim.create("muon", model, eps=-1.0),
    "rank zero": lambda optim, model: optim.create("galore_adamw", model, rank=0),
    "rank fraction": lambda optim, model: optim.create("trion", model, rank=1.5),
    "interval": lambda optim, model: optim.create("fira", model, refresh_interval=0),
    "basis": lambda optim, model: optim.create("low_rank_adamw", model, basis="cosine"),
    "residual": lambda optim, model: optim.create("low_rank_adamw", model, residual="sgn"),
    "moments": lambda optim, model: optim.create("low_rank_adamw", model, moments="keeps"),
    "state type": lambda optim, model: optim.create("apollo", model, state_dtype="7bit"),
    "unknown name": lambda optim, model: optim.create("dct_adam", model),
    "unknown argument": lambda optim, model: optim.create("adamw", model, rnk=3),
    "unknown rule": lambda optim, model: optim.param_groups(model, rules={"nothing": {"rank": 1}}),
    "unknown role": lambda optim, model: optim.param_groups(model, rules={"head": {"role": "heads"}}),
    "accumulation": lambda optim, model: optim.attach_to_backward(
        model, optim.create("adamw", model), accumulation_steps=0
    ),
    "clip": lambda optim, model: optim.attach_to_backward(model, optim.create("muon", model), max_norm=1.0),
    "another optimizer": lambda optim, model: optim.create("dct_adamw", model).load_state_dict(
        optim.create("muon", model).state_dict()
    ),
    "another rank": lambda optim, model: optim.create("dct_adamw", model, rank=2).load_state_dict(
        optim.create("dct_adamw", model, rank=3).state_dict()
    ),
}

BAD_COMMANDS = [
    "pretrain.py stepz=1",
    "pretrain.py steps=0",
    "pretrain.py steps=many",
    "pretrain.py optimizer.name=adam",
    "pretrain.py optimizer.rnk=3",
    "pretrain.py optimizer.lr=-1",
    "pretrain.py nothing.yaml",
    "pretrain.py model.name=llama_61m",
    "pretrain.py model.name=./nowhere",
    "pretrain.py data.path=./nowhere",
    "pretrain.py tokens_per_step=1000 seq_len=512",
    "pretrain.py precision=float8",
    "pretrain.py schedule.name=linear",
    "finetune.py",
    "finetune.py model=./nowhere",
    "finetune.py adapter.name=lorra",
    "compress.py",
    "compress.py ./nowhere",
    "spectrum.py",
    "spectrum.py ./nowhere",
    "memory_budget.py --model llama_61m",
    "memory_budget.py --budget 24",
    "memory_budget.py --optimizer adm",
    "hyperbolic.py",
    "hyperbolic.py configs/hyperbolic/airport_lp.yaml data.folder=./nowhere",
    "benchmark.py",
    "benchmark.py speed",
]

# ---------------------------------------------------------------------------------------------- inside one checkout


def probe(checkout: Path) -> dict[str, Any]:
    """Return what one process can see of a checkout: names, state, weights, help and error texts."""
    inside = (checkout / "lowrank_train" / "optim").exists()
    optim = importlib.import_module("lowrank_train.optim" if inside else "optim")
    assert Path(str(optim.__file__)).resolve().is_relative_to(checkout), f"{optim.__file__} is not of {checkout}"
    names = sorted({*optim.names(), "sst", "relora", "riemannian_adamw"})
    runs = {"float32": {}, "bfloat16": {}, "8bit": {"state_dtype": "8bit"}}
    files = sorted(file.name for file in (checkout / "launch").glob("[!_]*.py"))
    benchmarks = re.findall(r"^  ([a-z][\w-]+)", _said(checkout, "benchmark.py --help"), re.MULTILINE)
    commands = [*files, *(f"benchmark.py {name}" for name in benchmarks)]
    return {
        "help": {
            words: _said(checkout, f"{words} --help")
            for words in [*commands, *(f"benchmark.py {b}" for b in benchmarks)]
        },
        "errors": {words: _said(checkout, words) for words in BAD_COMMANDS},
        "names": {name: _signature(getattr(optim, name)) for name in optim.__all__},
        "state": {name: _guarded(lambda name=name: _state(optim, name)) for name in names},
        "weights": {
            f"{name}, {kind}": _guarded(lambda name=name, kind=kind: _weights(optim, name, kind, runs[kind]))
            for name in names
            for kind in runs
        },
        "arguments": {
            what: _guarded(lambda attempt=attempt: repr(attempt(optim, _model())))
            for what, attempt in BAD_ARGUMENTS.items()
        },
    }


def _signature(value: object) -> str:
    text = str(inspect.signature(value)) if callable(value) else repr(value)
    return re.sub(r"(lowrank_train\.)?optim\.[\w.]*?(\w+)\b", r"\2", text)  # a type's module may move


def _said(checkout: Path, words: str) -> str:
    """Return exit code and text of a command, run inside this process: packages are imported once."""
    file, *arguments = words.split()
    spec = importlib.util.spec_from_file_location(f"launch_{Path(file).stem}", checkout / "launch" / file)
    assert spec is not None
    assert spec.loader is not None
    arguments = [str(checkout / word) if word.startswith("configs/") else word for word in arguments]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        sys.argv = [file, *arguments]
        try:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            code = module.main(arguments)
        except SystemExit as exit:
            code = exit.code
        except Exception as error:  # a probe reports whatever the checkout raises
            code = f"{type(error).__name__}: {error}"
    return f"exit {code}\n{output.getvalue()}".replace(str(checkout), "CHECKOUT")


def _guarded(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # a probe reports whatever the checkout raises
        return f"{type(error).__name__}: {error}"


def _model(dtype: Any = None) -> Any:
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("embedding", nn.Embedding(31, 12))
    for i, (rows, columns) in enumerate([(24, 12), (12, 24), (8, 8), (17, 6), (96, 64)]):
        model.add_module(f"layer{i}", nn.Linear(columns, rows, bias=i == 1))
    model.add_module("norm", nn.LayerNorm(12))
    model.add_module("head", nn.Linear(12, 31, bias=False))
    return model.to(dtype or torch.float32)


def _found(name: str, *modules: str) -> Any:
    """Return a function of ``lowrank_train`` from the first of these modules that the checkout has."""
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError):
            return getattr(importlib.import_module(f"lowrank_train.{module}"), name)
    raise ImportError(f"no {name} in any of {modules}")


def _created(optim: ModuleType, name: str, dtype: Any = None, **arguments: Any) -> tuple[Any, Any]:
    import torch

    model = _model(dtype)
    kind = CONVERTED.get(name)
    if kind == "spectral":
        to_spectral = _found("to_spectral", "layers.spectral", "spectral")

        model = to_spectral(model, rank=3, layers="layer")
    elif kind == "adapter":
        add_adapters = _found("add_adapters", "layers.lora", "adapters")

        model = add_adapters(model, 3, layers="layer")
    elif kind == "points":
        model.embedding.parameter_manifolds = {"weight": ("sphere",)}
        model.embedding.weight.data.copy_(torch.nn.functional.normalize(model.embedding.weight.data.float(), dim=1))
    accepted = inspect.signature(optim.find(name)).parameters
    offered = {"rank": 3, "refresh_interval": 2, "resample_every": 2, "restart_every": 2}
    arguments |= {key: value for key, value in offered.items() if key in accepted}
    return model, optim.create(name, model, lr=1e-2, **arguments)


def _state(optim: ModuleType, name: str) -> dict[str, Any]:
    _, optimizer = _created(optim, name)
    saved = optimizer.state_dict()
    params = [param for group in saved["param_groups"] for param in group["param_names"]]
    return {
        "state": {
            params[i]: {key: [list(value.shape), str(value.dtype)] for key, value in sorted(state.items())}
            for i, state in saved["state"].items()
        },
        "groups": [{k: repr(v) for k, v in sorted(g.items()) if k != "params"} for g in saved["param_groups"]],
        "bytes": _guarded(lambda: optim.predicted_state_bytes(name, _created(optim, name)[0], rank=3)),
    }


def _weights(optim: ModuleType, name: str, kind: str, arguments: dict[str, Any]) -> str:
    import torch

    model, optimizer = _created(optim, name, torch.bfloat16 if kind == "bfloat16" else None, **arguments)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for param in model.parameters():
            if param.requires_grad:
                param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------ around a checkout


def facts(checkout: Path, scratch: Path) -> dict[str, Any]:
    """Return all facts of one checkout, each under a name of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--probe", str(checkout)]
    done = subprocess.run(command, env=_environment(checkout), cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout} cannot be probed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _environment(checkout: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


def run(checkout: Path, folder: Path, shared: Path) -> dict[str, Any]:
    """Train (or continue) the short quickstart in ``folder``; return its losses, norms and exported weights."""
    words = [
        str(checkout / "launch" / "pretrain.py"),
        str(checkout / "configs" / "quickstart.yaml"),
        *(f"steps={RUN_STEPS}", "seq_len=64", "tokens_per_step=256", "micro_batch=2", "evaluation.tokens=512"),
        *(
            "checkpoint.every=2",
            "checkpoint.keep=9",
            "data.vocab_size=300",
            f"run_dir={folder}",
            f"data.folder={shared}",
        ),
    ]
    done = subprocess.run([sys.executable, *words], env=_environment(checkout), capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stdout[-2000:] + done.stderr[-2000:]}
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    exact = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "eval/loss", "memory/predicted_gib")
    weights = folder / "huggingface" / "model.safetensors"
    return {
        "metrics": [{key: row[key] for key in exact if key in row} for row in rows],
        "export": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def continued(reader: Path, written: Path, folder: Path, shared: Path) -> dict[str, Any]:
    """Return what ``reader`` makes of another checkout's run from its second step on."""
    shutil.copytree(written, folder)
    shutil.rmtree(folder / "checkpoints" / f"step-{RUN_STEPS}")
    shutil.rmtree(folder / "huggingface")
    return run(reader, folder, shared)


def differences(mine: Any, theirs: Any, where: str = "") -> Iterator[str]:
    """Yield every place where two facts differ."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key in sorted({*mine, *theirs}, key=str):
            yield from differences(mine.get(key), theirs.get(key), f"{where} / {key}" if where else str(key))
    elif mine != theirs:
        yield f"{where}\n    this:  {_short(mine)}\n    other: {_short(theirs)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return (text if len(text) < 1000 else text[:1000] + " ...").replace("\n", "\n           ")


def compare(this: Path, other: Path) -> int:
    """Print all differences of two checkouts; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="compare-") as name:
        scratch = Path(name)
        found = [facts(checkout, scratch) for checkout in (this, other)]
        for kind, checkout, against in (("this", this, other), ("other", other, this)):
            done = run(checkout, scratch / kind, scratch / "tokens")
            from_other = continued(against, scratch / kind, scratch / f"{kind}-continued", scratch / "tokens")
            found[kind == "other"]["run"] = done
            if from_other != done:
                print(f"the run of {checkout}, continued by {against}, differs:")
                print(*differences(from_other, done), sep="\n")
                found[0]["continued"] = found[0].get("continued", 0) + 1
        lines = list(differences(*found))
        print(*lines, sep="\n")
        print(f"\n{len(lines)} differences" if lines else "same")
        return 1 if lines else 0


def main() -> int:
    """Compare, or probe one checkout and print its facts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout, e.g. a git worktree")
    parser.add_argument("--this", type=Path, default=THIS, help="default: the checkout of this file")
    parser.add_argument("--probe", action="store_true", help="print the facts of OTHER alone, as JSON")
    given = parser.parse_args()
    for checkout in (given.this, given.other):
        if not (checkout / "lowrank_train").is_dir():
            parser.error(f"{checkout} is no checkout of this project: it has no folder lowrank_train")
    if not given.probe:
        return compare(given.this.resolve(), given.other.resolve())
    try:
        print(json.dumps(probe(given.other.resolve())))
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
