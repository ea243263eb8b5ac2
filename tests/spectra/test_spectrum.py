"""The spectrum command: singular values, what is said about them, pruning, intruder dimensions, and bad input."""

from __future__ import annotations

import csv
import json
import runpy
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM, PreTrainedModel

from lowrank_train.config.run_config import load_config
from lowrank_train.config.schema import DataConfig
from lowrank_train.data.tokenizer import prepare_tokenizer
from lowrank_train.layers.choice import linear_layers
from lowrank_train.models import build as models
from lowrank_train.models.folders import load_model
from lowrank_train.optim.linalg import decompose
from lowrank_train.spectra.plots import ModelSpectra, plot_cosines, plot_pruning, plot_spectra
from lowrank_train.spectra.pruning import Point, Prunable, TextConfig, evaluation_blocks, pruned
from lowrank_train.spectra.spectrum import best_cosines, count_at_share, spectra, summarize
from lowrank_train.text.labels import IGNORED
from tests.runs import ROOT, TINY, documents, write_jsonl

LAUNCHER = str(ROOT / "launch" / "spectrum.py")
KEEP = [100.0, 90.0, 50.0]
MATRICES = {"llama": 14, "opt": 12}
MEASURE = ["data.seq_len=16", "data.tokens=200", "device=cpu", f"keep={KEEP}"]


def build(kind: str, seed: int = 0, *overrides: str) -> PreTrainedModel:
    """A tiny model with transformers' initial weights."""
    config = models.architecture(load_config([*TINY[kind], *overrides]).model, vocab_size=300)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face folders: llama (and a later state of it, trained), opt, each with a tokenizer; a run around one."""
    root = tmp_path_factory.mktemp("models")
    prepare_tokenizer(DataConfig(vocab_size=300), lambda: iter(documents(60)), root / "tokenizer")
    for name, kind in (("llama", "llama"), ("run/huggingface", "llama"), ("opt", "opt")):
        model = build(kind)
        if name.startswith("run"):
            add_intruders(model)
        model.save_pretrained(root / name)
        shutil.copytree(root / "tokenizer", root / name, dirs_exist_ok=True)
    (root / "run" / "config.yaml").write_text("steps: 1\n")
    return root


@torch.no_grad()
def add_intruders(model: nn.Module) -> None:
    """In every query matrix, one strong direction that is no more like any left singular vector than it must be."""
    for name, linear in linear_layers(model).items():
        if name.endswith("q_proj"):
            factors = decompose(linear.weight)
            new = (factors["u"].sum(0) / len(factors["u"]) ** 0.5).float()
            linear.weight += 100 * factors["sigma"][0].float() * torch.outer(new, factors["v"][0].float())


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The launch file, in this process and an empty folder: exit code, stdout, stderr."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).touch())  # drawing takes most of the time
    main = runpy.run_path(LAUNCHER)["main"]

    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def literal_count(sigma: Tensor, share: float) -> int:
    total = 0.0
    for count, value in enumerate(sigma.tolist(), start=1):
        total += value
        if total >= share * float(sigma.sum()) - 1e-9:
            return count
    raise AssertionError


def literal_loss(model: PreTrainedModel, blocks: Tensor) -> float:
    """Mean over tokens, from transformers' own logits."""
    with torch.no_grad():
        logits = model(input_ids=blocks[:, :-1].clamp_min(0)).logits
    return float(functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), ignore_index=IGNORED))


# ------------------------------------------------------------------------------------------------------ singular values


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_spectra_are_those_of_torch(kind: str) -> None:
    model = build(kind).double()
    found = spectra(model)
    assert len(found) == MATRICES[kind]
    for name, module in model.named_modules():
        assert (name in found) == (".layers." in name and isinstance(module, nn.Linear))
        if name in found:
            expected = torch.linalg.svdvals(module.weight.detach())
            torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-13 * float(expected[0]))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 4)])
def test_spectra_of_deficient_matrices(shape: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(shape[1], shape[0], dtype=torch.float64))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(shape[0], 2).double() @ torch.randn(2, shape[1]).double())
    expected = torch.linalg.svdvals(model[0].weight.detach())
    torch.testing.assert_close(spectra(model, "")["0"], expected, rtol=0, atol=1e-13 * float(expected[0]))


def test_summaries_with_known_answers() -> None:
    flat = summarize("flat", (10, 12), torch.full((10,), 3.0))
    assert (flat.rows, flat.columns, flat.sigma_1, flat.count_90) == (10, 12, 3.0, 9)
    assert flat.stable_rank == pytest.approx(10)
    assert flat.effective_rank == pytest.approx(10)
    one = summarize("one", (2, 3), torch.tensor([4.0, 0.0]))
    assert (one.stable_rank, one.effective_rank, one.count_90) == (1, 1, 1)
    zeros = summarize("zeros", (2, 3), torch.zeros(2))
    assert (zeros.sigma_1, zeros.stable_rank, zeros.effective_rank, zeros.count_90) == (0, 0, 0, 0)
    uneven = summarize("uneven", (2, 2), torch.tensor([3.0, 1.0]))
    assert uneven.stable_rank == pytest.approx(10 / 9)
    assert uneven.effective_rank == pytest.approx(4 / 3**0.75)  # exp of the entropy of (3/4, 1/4)


@pytest.mark.parametrize("share", [1.0, 0.99, 0.9, 0.5, 0.01])
def test_counts_are_the_fewest_that_hold_the_share(share: float) -> None:
    for sigma in (torch.rand(40, dtype=torch.float64).sort(descending=True).values, torch.ones(20), torch.ones(1)):
        assert count_at_share(sigma, share) == literal_count(sigma, share)


# -------------------------------------------------------------------------------------------------------------- pruning


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_a_truncated_weight_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    linear = nn.Linear(shape[1], shape[0], dtype=torch.float64)
    layer = Prunable.of(linear, decompose(linear.weight.detach()))
    u, sigma, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    for count in range(min(shape)):
        torch.testing.assert_close(
            layer.truncated(count), u[:, :count] @ sigma[:count].diag() @ vh[:count], rtol=0, atol=1e-13
        )
    assert torch.equal(layer.truncated(min(shape)), linear.weight)


def test_weights_come_back_bit_for_bit() -> None:
    model = build("llama")
    layers = [Prunable.of(linear, decompose(linear.weight.detach())) for linear in linear_layers(model).values()]
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def interrupted() -> None:
        with pruned(layers, [3] * len(layers)):
            assert all(int(torch.linalg.matrix_rank(layer.linear.weight)) == 3 for layer in layers)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_the_pruning_curve_has_the_losses_of_truncated_models(
    command: Callable[..., tuple[int, str, str]], folders: Path, text: Path, tmp_path: Path, kind: str
) -> None:
    code, said, errors = command(folders / kind, f"data.path={text}", f"out={tmp_path}", *MEASURE)
    assert code == 0, errors
    points = json.loads((tmp_path / "spectrum.json").read_text())["models"][0]["pruning"]
    assert [point["keep_percent"] for point in points] == KEEP
    blocks, _ = evaluation_blocks(TextConfig(str(text), seq_len=16, tokens=200), folders / kind)
    assert blocks.shape == (13, 17)
    assert int((blocks[:, 1:] != IGNORED).sum()) == 200
    assert torch.equal(blocks[1:, 0], blocks[:-1, -1])
    for point in points:
        model = AutoModelForCausalLM.from_pretrained(folders / kind).eval()
        kept = total = 0
        for linear in linear_layers(model).values():
            u, sigma, vh = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
            count = literal_count(sigma, point["keep_percent"] / 100)
            linear.weight.data = (u[:, :count] @ sigma[:count].diag() @ vh[:count]).float()
            kept, total = kept + count, total + len(sigma)
        assert point["kept"] == kept
        assert point["dropped"] == pytest.approx(1 - kept / total)
        assert point["loss"] == pytest.approx(literal_loss(model, blocks), abs=2e-6)
        assert point["perplexity"] == pytest.approx(np.exp(point["loss"]))
    assert points[0]["dropped"] == 0
    assert f"{100 * points[-1]['dropped']:.1f} %" in said
    assert "over 200 tokens" in said
    assert (tmp_path / "pruning.png").exists()


# ------------------------------------------------------------------------------------------------------------ intruders


def test_a_new_direction_is_an_intruder_and_an_old_one_is_not() -> None:
    u, _ = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64))
    before, after = u.mT, u.mT.flip(0) * -1
    assert torch.allclose(best_cosines(after, before, 10), torch.ones(10, dtype=torch.float64))
    between = torch.stack([(u[:, 0] + u[:, 1]) / 2**0.5, u.sum(1) / 8])
    assert best_cosines(between, before, 10).tolist() == pytest.approx([2**-0.5, 1 / 8])
    assert best_cosines(after, before, 3).shape == (3,)


def test_intruders_are_found_where_they_were_put(
    command: Callable[..., tuple[int, str, str]], folders: Path, tmp_path: Path
) -> None:
    code, said, errors = command(folders / "run", f"before={folders / 'llama'}", f"out={tmp_path}", "top_k=4")
    assert code == 0, errors
    assert "run: 2 intruder dimensions among the 56 leading left singular vectors of 14 matrices" in said
    found = json.loads((tmp_path / "spectrum.json").read_text())["models"][0]
    assert found["intruders"]["total"] == 2
    for name, count in found["intruders"]["matrices"].items():
        assert count == name.endswith("q_proj")
        assert len(found["best_cosines"][name]) == 4
        if count:
            assert found["best_cosines"][name][0] == pytest.approx(32**-0.5, abs=0.05)
        else:
            assert found["best_cosines"][name] == pytest.approx([1] * 4, abs=1e-6)
    rows = list(csv.DictReader((tmp_path / "intruders.csv").open()))
    assert sum(int(row["intruders"]) for row in rows) == 2
    assert (tmp_path / "intruders-run.png").exists()
    assert command(folders / "run", f"before={folders / 'llama'}", f"out={tmp_path}", "epsilon=0.1")[0] == 0
    assert json.loads((tmp_path / "spectrum.json").read_text())["models"][0]["intruders"]["total"] == 0


# -------------------------------------------------------------------------------------------------------------- command


def test_the_files_hold_what_is_printed(
    command: Callable[..., tuple[int, str, str]], folders: Path, tmp_path: Path
) -> None:
    code, said, errors = command(folders / "opt", f"out={tmp_path / 'new' / 'out'}")
    assert code == 0, errors
    out = tmp_path / "new" / "out"
    assert errors == f"\nplots, CSV and JSON: {out}\n"
    assert sorted(f.name for f in out.iterdir()) == [
        "spectra-opt.npz",
        "spectra-opt.png",
        "spectrum.csv",
        "spectrum.json",
    ]
    written = json.loads((out / "spectrum.json").read_text())
    rows = list(csv.DictReader((out / "spectrum.csv").open()))
    expected = spectra(load_model(folders / "opt"))
    values = np.load(out / "spectra-opt.npz")
    assert len(rows) == len(expected) == len(written["models"][0]["matrices"]) == MATRICES["opt"]
    for row, figures in zip(rows, written["models"][0]["matrices"], strict=True):
        name = row["matrix"]
        assert {key: str(value) for key, value in figures.items()} == {k: v for k, v in row.items() if k != "model"}
        assert np.array_equal(values[name], expected[name].numpy())
        line = next(line for line in said.splitlines() if line.startswith(name)).split()
        assert line[1:] == [
            str(figures["rows"]),
            "x",
            str(figures["columns"]),
            f"{float(expected[name][0]):.4g}",
            f"{figures['stable_rank']:.1f}",
            f"{figures['effective_rank']:.1f}",
            str(figures["count_90"]),
        ]
    assert written["settings"]["top_k"] == 10
    assert written["provenance"]["versions"]["torch"]


def test_the_plot_has_a_panel_per_kind_and_a_line_per_layer(
    command: Callable[..., tuple[int, str, str]], folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[dict[str, Any]] = []

    def look(figure: Figure, *_: object, **__: object) -> None:
        panels = [axes for axes in figure.axes if axes.get_title()]
        drawn.append({axes.get_title(): (len(axes.get_lines()), axes.get_yscale()) for axes in panels})

    monkeypatch.setattr(Figure, "savefig", look)
    assert command(folders / "llama", f"out={tmp_path}")[0] == 0
    kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert drawn == [dict.fromkeys(kinds, (2, "log"))]


def test_plots_are_drawn(folders: Path, tmp_path: Path) -> None:
    """One line, a matrix of zeros, one that is narrower than top_k, and a model that pruning broke."""
    names = ["model.layers.0.q_proj", "model.layers.11.q_proj", "model.layers.0.fc1", "head"]
    sigma = [torch.tensor(values) for values in ([3.0, 1e-20], [2.0, 1.0], [0.0, 0.0], [1.0])]
    model = ModelSpectra(
        "m",
        folders,
        dict.fromkeys(names, (2, 2)),
        dict(zip(names, sigma, strict=True)),
        dict(zip(names, [s * 0.1 for s in sigma], strict=True)),
        [Point(100, 4, 0, 2.0), Point(90, 2, 0.5, float("inf"))],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_spectra(model, tmp_path / "a.png")
        plot_cosines(model, 0.5, tmp_path / "b.png")
        plot_pruning([model], tmp_path / "c.png")
        model.points = model.points[1:]
        plot_pruning([model], tmp_path / "d.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in "abcd")


def test_a_run_folder_is_its_huggingface_folder_and_keeps_its_spectrum(
    command: Callable[..., tuple[int, str, str]], folders: Path
) -> None:
    by_run = command(folders / "run", "layers=layers.0.*q_proj")
    by_folder = command(folders / "run" / "huggingface", "layers=layers.0.*q_proj")
    assert by_run == by_folder
    assert by_run[0] == 0
    assert (folders / "run" / "spectrum" / "spectra-run.npz").is_file()
    assert command(folders / "opt", "layers=layers.0.*q_proj")[0] == 0
    assert Path("runs/spectrum/opt/spectrum.csv").is_file()


def test_models_share_the_pruning_plot(
    command: Callable[..., tuple[int, str, str]],
    folders: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "other" / "llama"
    shutil.copytree(folders / "llama", other)
    prepare_tokenizer(DataConfig(vocab_size=290), lambda: iter(documents(60)), tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", other, dirs_exist_ok=True)
    lines: list[int] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: lines.append(len(figure.axes[0].get_lines())))
    code, said, errors = command(folders / "llama", other, f"data.path={text}", f"out={tmp_path / 'out'}", *MEASURE)
    assert code == 0, errors
    assert lines[-1] == 2  # the last figure is the pruning plot
    assert "dropped, llama  perplexity, llama  dropped, llama-2  perplexity, llama-2" in said
    assert "llama and llama-2 have different tokenizers" in said
    rows = list(csv.DictReader((tmp_path / "out" / "pruning.csv").open()))
    assert [row["model"] for row in rows] == ["llama"] * len(KEEP) + ["llama-2"] * len(KEEP)


def test_without_a_path_the_embedded_text_is_read(folders: Path, tmp_path: Path) -> None:
    blocks, vocabulary = evaluation_blocks(TextConfig(tokens=1000, seq_len=64), folders / "llama")
    assert blocks.shape == (16, 65)
    assert len(vocabulary) == 300


def test_half_precision_weights_are_read_as_they_are(tmp_path: Path) -> None:
    model = build("llama").bfloat16()
    model.save_pretrained(tmp_path)
    read = load_model(tmp_path)
    assert read.dtype == torch.float32
    assert all(torch.equal(p, q.float()) for p, q in zip(read.parameters(), model.parameters(), strict=True))


def test_help_lists_every_key(command: Callable[..., tuple[int, str, str]]) -> None:
    code, said, _ = command("--help")
    assert code == 0
    for key in ("before (null)", "top_k (10)", "epsilon (0.5)", "data.path (null)", "keep ([100, 99,", "out (null)"):
        assert f"  {key}" in said


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no model given"),
        (["nowhere"], "nowhere is not a folder"),
        (["--before"], "--before is not a folder"),
        (["empty"], "empty has no config.json"),
        (["unfinished"], "run without huggingface/"),
        (["MODELS/llama", "before=nowhere"], "before=nowhere is not a folder"),
        (["MODELS/llama", "befor=x"], "did you mean 'before'"),
        (["MODELS/llama", "data.pth=x"], "did you mean 'data.path'"),
        (["MODELS/llama", "layers=nothing"], "matches no nn.Linear"),
        (["MODELS/llama", "layers=(q_proj"], "not a regular expression"),
        (["MODELS/llama", "before=MODELS/opt"], "another architecture"),
        (["MODELS/llama", "before=wider"], "expected shape (32, 32)"),
        (["not_finite"], "'model.layers.1.mlp.up_proj' has no singular values: the weight has entries that are not"),
        (["MODELS/llama", "before=not_finite"], "before=not_finite' has no singular values"),
        (["damaged"], "cannot load the model in damaged"),
        (["lacking"], "lacks 1 weight(s) of its model, 'model.layers.0.self_attn.q_proj.weight'"),
        (["MODELS/llama", "top_k=0"], "top_k=0; expected"),
        (["MODELS/llama", "epsilon=2"], "epsilon=2.0; expected"),
        (["MODELS/llama", "keep=[100,0]"], "keep=0.0; expected a number above 0 and at most 100"),
        (["MODELS/llama", "keep=[]"], "keep=[]; expected at least one"),
        (["MODELS/llama", "device=tpu"], "device"),
        (["MODELS/llama", "data.validation_fraction=0"], "data.validation_fraction=0.0; expected"),
        (["MODELS/llama", "out=MODELS/llama/config.json"], "cannot write to out="),
        (["MODELS/llama", "data.path=nowhere.jsonl"], "data.path=nowhere.jsonl does not exist"),
        (["MODELS/llama", "data.path=nothing.jsonl"], "gives no text"),
        (["MODELS/llama", "prune=true", "data.seq_len=99999"], "positions of"),
        (["MODELS/opt", "prune=true", "data.seq_len=16", "layers=."], "tied to the embeddings"),
        (["not_finite", "prune=true"], "cannot load the tokenizer in not_finite"),
        (["gemma", "prune=true", "data.seq_len=16"], "'gemma' model; expected one of llama, opt"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    command: Callable[..., tuple[int, str, str]], folders: Path, broken: Path, words: list[str], message: str
) -> None:
    for name in broken.iterdir():
        Path(name.name).symlink_to(name)
    code, said, errors = command(*(word.replace("MODELS", str(folders)) for word in words))
    assert code == 2
    assert not said
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    assert message in errors


@pytest.fixture(scope="module")
def broken(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with something wrong, and files of text."""
    root = tmp_path_factory.mktemp("broken")
    (root / "empty").mkdir()
    (root / "unfinished").mkdir()
    (root / "unfinished" / "config.yaml").write_text("steps: 1\n")
    write_jsonl(root / "nothing.jsonl", [""])
    build("llama", 0, "model.overrides.hidden_size=64").save_pretrained(root / "wider")
    spoilt = build("llama")
    spoilt.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, 2] = float("nan")
    spoilt.save_pretrained(root / "not_finite")
    shutil.copytree(folders / "llama", root / "damaged")
    (root / "damaged" / "model.safetensors").write_bytes(b"not a file of tensors")
    lacking = build("llama")
    weights = {k: v for k, v in lacking.state_dict().items() if k != "model.layers.0.self_attn.q_proj.weight"}
    lacking.save_pretrained(root / "lacking", state_dict=weights)
    small = GemmaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    GemmaForCausalLM(small).save_pretrained(root / "gemma")
    shutil.copytree(folders / "tokenizer", root / "gemma", dirs_exist_ok=True)
    return root


def test_other_architectures_have_spectra(
    command: Callable[..., tuple[int, str, str]], broken: Path, tmp_path: Path
) -> None:
    assert command(broken / "gemma", f"out={tmp_path}")[0] == 0
    assert len(np.load(tmp_path / "spectra-gemma.npz")) == 14


def test_several_ranks_are_refused(
    command: Callable[..., tuple[int, str, str]], folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = command(folders / "llama")
    assert code == 2
    assert "python instead of torchrun" in errors
