"""The compress command: what it prints and writes, folders read back and merged, its cache, its ranks, bad input."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from lowrank_train.bench import compression as compression_benchmark
from lowrank_train.common.errors import UserError
from lowrank_train.common.ranks import start
from lowrank_train.common.units import parse_bytes, show_bytes
from lowrank_train.compress import command as compress_run
from lowrank_train.compress.calibration import input_energies, outlier_shares
from lowrank_train.compress.command import compress_folder, load_settings
from lowrank_train.compress.ranks import compress, plan_ranks
from lowrank_train.compress.report import Compression, write_report
from lowrank_train.config.schema import DataConfig
from lowrank_train.data.tokenizer import prepare_tokenizer
from lowrank_train.layers.choice import linear_layers
from lowrank_train.layers.low_rank import LowRankLinear
from lowrank_train.models.compressed_folder import compressed_ranks, is_compressed
from lowrank_train.models.folders import load_model
from lowrank_train.spectra.pruning import TextConfig, evaluation_blocks
from lowrank_train.spectra.spectrum import spectra
from tests.distributed import run_distributed
from tests.runs import ROOT, documents, write_jsonl
from tests.spectra.test_spectrum import build, literal_loss

LAUNCHER = str(ROOT / "launch" / "compress.py")
KINDS = pytest.mark.parametrize("kind", ["llama", "opt"])
Command = Callable[..., tuple[int, str, str]]


def trained(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """With spectra that fall at different rates, and biases."""
    model = build(kind)
    torch.manual_seed(1)
    for index, linear in enumerate(linear_layers(model).values()):
        u, sigma, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        fall = torch.arange(1, len(sigma) + 1) ** -(index % 5 / 3)
        linear.weight.data = 8 * u @ (sigma * fall).diag() @ vh
        if linear.bias is not None:
            nn.init.normal_(linear.bias)
    return model.to(dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain models, each with a tokenizer; text; cached spectra."""
    root = tmp_path_factory.mktemp("models")
    prepare_tokenizer(DataConfig(vocab_size=300), lambda: iter(documents(60)), root / "tokenizer")
    write_jsonl(root / "text.jsonl", documents(100))
    for name in ("llama", "opt", "bf16"):
        model = trained("llama" if name == "bf16" else name, torch.bfloat16 if name == "bf16" else torch.float32)
        model.save_pretrained(root / name)
        shutil.copytree(root / "tokenizer", root / name, dirs_exist_ok=True)
    return root


def settings(folders: Path) -> list[str]:
    return [
        f"data.path={folders / 'text.jsonl'}",
        "data.seq_len=16",
        "data.tokens=208",
        "calibration_tokens=400",
        "micro_batch=8",
        "device=cpu",
        f"cache={folders / 'cache'}",
    ]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """The launch file, in this process and an empty folder: exit code, stdout, stderr."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).touch())
    main = runpy.run_path(LAUNCHER)["main"]

    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def small(folders: Path) -> Path:
    """Both models compressed to half the ranks, and merged again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).touch())
        for kind in ("llama", "opt"):
            for words in (
                [str(folders / kind), "rank_reduction=0.5", f"out={folders / 'small' / kind}"],
                [str(folders / "small" / kind), "merge=true", f"out={folders / 'merged' / kind}"],
            ):
                compress_folder(*load_settings([*settings(folders), *words]))
    return folders / "small"


def logits(model: PreTrainedModel) -> Tensor:
    ids = torch.randint(300, (2, 15), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(ids).logits


def written_bytes(folder: Path) -> int:
    return sum(value.numel() * value.element_size() for value in load_file(folder / "low_rank.safetensors").values())


# ----------------------------------------------------------------------------------------------------------- end to end


@KINDS
def test_the_command_prints_and_writes_what_it_did(command: Command, folders: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "new" / "small"
    code, said, errors = command(folders / kind, "--rank-reduction", "0.5", "--out", out, *settings(folders))
    assert code == 0, errors
    names = {"compress.csv", "compress.json", "config.json", "low_rank.safetensors", "ranks.png", "tokenizer.json"}
    assert names <= {file.name for file in out.iterdir()}
    assert not list(out.glob("model*"))

    figures = json.loads((out / "compress.json").read_text())
    rows = list(csv.DictReader((out / "compress.csv").open()))
    model = load_model(folders / kind)
    assert [row["name"] for row in rows] == list(linear_layers(model))
    plan = plan_ranks(model, spectra(model), rank_reduction=0.5)
    for row, matrix, planned in zip(rows, figures["matrices"], plan, strict=True):
        assert {key: str(value) for key, value in matrix.items()} == row
        assert (matrix["name"], matrix["rank"], matrix["is_low_rank"]) == (
            planned.name,
            planned.rank,
            planned.is_low_rank,
        )
        line = next(line for line in said.splitlines() if line.startswith(matrix["name"]))
        assert re.search(rf" {matrix['rows']} x {matrix['columns']} +{matrix['rank']} +{matrix['full_rank']} ", line)
        assert ("N-LRC" in line) == (not matrix["is_low_rank"])
    kinds = {matrix["is_factored"] for matrix in figures["matrices"]}
    assert kinds == {True, False}
    assert len({matrix["rank"] for matrix in figures["matrices"]}) > 4
    assert figures["rank_reduction"] >= 0.5
    assert f"rank reduction {100 * figures['rank_reduction']:.2f} %" in said
    assert figures["settings"]["rank_reduction"] == 0.5
    assert figures["provenance"]["versions"]["torch"]
    assert json.loads((out / "config.json").read_text())["low_rank"]["ranks"] == {
        matrix["name"]: matrix["rank"] for matrix in figures["matrices"] if matrix["is_factored"]
    }
    assert figures["parameter_bytes_before"] == sum(p.numel() * 4 for p in model.parameters())
    assert figures["parameter_bytes_after"] == written_bytes(out)

    blocks, _ = evaluation_blocks(TextConfig(str(folders / "text.jsonl"), seq_len=16, tokens=208), folders / kind)
    for key, of in (("perplexity_before", folders / kind), ("perplexity_after", out)):
        assert figures[key] == pytest.approx(math.exp(literal_loss(load_model(of), blocks)), rel=1e-5)
        assert f"{figures[key]:.4g}" in said
    assert figures["perplexity_before"] != figures["perplexity_after"]


@KINDS
def test_the_folder_is_read_back_and_merged_with_equal_outputs(folders: Path, small: Path, kind: str) -> None:
    expected = load_model(folders / kind)
    compress(expected, plan_ranks(expected, spectra(expected), rank_reduction=0.5))
    read = load_model(small / kind)
    assert isinstance(read, type(expected))
    assert compressed_ranks(read.config) == compressed_ranks(expected.config)
    assert {n: m.rank for n, m in read.named_modules() if isinstance(m, LowRankLinear)} == compressed_ranks(read.config)
    assert [(n, p.shape) for n, p in read.named_parameters()] == [(n, p.shape) for n, p in expected.named_parameters()]
    torch.testing.assert_close(logits(read), logits(expected), rtol=0, atol=1e-6)
    assert (logits(read) - logits(load_model(folders / kind))).abs().max() > 1e-2
    biases = [name for name, _ in read.named_parameters() if name.endswith("left.bias")]
    assert bool(biases) == (kind == "opt")
    for name in biases:
        bias = load_model(folders / kind).get_parameter(name.replace("left.bias", "bias"))
        assert torch.equal(read.get_parameter(name), bias)
        assert bias.any()

    merged = AutoModelForCausalLM.from_pretrained(folders / "merged" / kind)
    assert not any(isinstance(module, LowRankLinear) for module in merged.modules())
    torch.testing.assert_close(logits(merged.eval()), logits(read), rtol=0, atol=1e-5)
    assert not hasattr(merged.config, "low_rank")
    assert not is_compressed(folders / "merged" / kind)
    for folder in (small / kind, folders / "merged" / kind):
        assert AutoTokenizer.from_pretrained(folder)("tree")["input_ids"]


@KINDS
def test_transformers_alone_refuses_a_compressed_folder(small: Path, kind: str) -> None:
    """Instead of drawing the missing matrices at random."""
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(small / kind)


def test_flags_and_keys_are_the_same_command(command: Command, folders: Path, small: Path) -> None:
    words = ["--rank-reduction=0.5", "--out", "a", "--data.seq-len", "16", "--perplexity=false"]
    assert command(*words, folders / "llama", f"--cache={folders / 'cache'}")[0] == 0
    assert (Path("a") / "low_rank.safetensors").read_bytes() == (small / "llama" / "low_rank.safetensors").read_bytes()
    figures = json.loads(Path("a/compress.json").read_text())
    assert figures["perplexity_before"] is None
    assert command(small / "llama", "--merge", "--out", "b")[0] == 0
    assert is_compressed("a")
    assert not is_compressed("b")


def test_text_is_read_in_sequences_that_the_model_has_positions_for(folders: Path, command: Command) -> None:
    """As the default of 512 tokens is for a model of 64 positions."""
    code, _, said = command(folders / "opt", *settings(folders), HALF, "data.seq_len=512", "whiten=true", "out=a")
    assert code == 0, said
    assert said.count(f"data.seq_len=512 exceeds the 64 positions of {folders / 'opt'}: 64 is taken") == 1
    figures = json.loads(Path("a/compress.json").read_text())
    assert figures["settings"]["data"]["seq_len"] == 64
    blocks, _ = evaluation_blocks(
        TextConfig(str(folders / "text.jsonl"), seq_len=64, tokens=256), folders / "opt"
    )  # whole rows
    assert math.log(figures["perplexity_before"]) == pytest.approx(
        literal_loss(load_model(folders / "opt"), blocks), rel=1e-4
    )


def test_help_lists_every_key(command: Command) -> None:
    code, said, _ = command("--help")
    assert code == 0
    for key in ("rank_reduction (null)", "size (null)", "whiten (False)", "score (minmax)", "data.path (null)"):
        assert f"  {key}" in said


# -------------------------------------------------------------------------------------------------------------- targets


@KINDS
def test_a_size_is_met_to_the_byte_it_predicts(command: Command, folders: Path, tmp_path: Path, kind: str) -> None:
    whole = sum(p.numel() * 4 for p in load_model(folders / kind).parameters())
    for i, size in enumerate(("80%", f"{whole * 9 // 10}B", f"{0.85 * whole / 1024:.2f}KiB")):
        out = tmp_path / str(i)
        code, _, errors = command(folders / kind, f"size={size}", f"out={out}", *settings(folders), "perplexity=false")
        assert code == 0, errors
        wanted = parse_bytes(size, whole)
        figures = json.loads((out / "compress.json").read_text())
        assert figures["parameter_bytes_after"] == written_bytes(out)
        assert wanted - (32 + 48) * 4 < written_bytes(out) <= wanted  # a rank of the largest matrix


def test_ranks_are_taken_from_a_file(command: Command, folders: Path, small: Path) -> None:
    common = [folders / "llama", *settings(folders), "perplexity=false"]
    assert command(*common, f"ranks={small / 'llama' / 'compress.json'}", "out=a")[0] == 0
    assert Path("a/low_rank.safetensors").read_bytes() == (small / "llama" / "low_rank.safetensors").read_bytes()
    chosen = {"model.layers.1.mlp.up_proj": 5, "model.layers.0.self_attn.q_proj": 7}
    Path("ranks.json").write_text(json.dumps(chosen))
    assert command(*common, "ranks=ranks.json", "out=b")[0] == 0
    assert compressed_ranks(load_model(Path("b")).config) == chosen


def test_half_precision_stays_half(command: Command, folders: Path) -> None:
    """A folder twice as large as before would be no compression; and what is measured is what is written."""
    code, _, errors = command(folders / "bf16", "size=80%", "out=a", *settings(folders))
    assert code == 0, errors
    assert {value.dtype for value in load_file("a/low_rank.safetensors").values()} == {torch.bfloat16}
    figures = json.loads(Path("a/compress.json").read_text())
    whole = sum(p.numel() * 2 for p in load_model(folders / "bf16").parameters())
    assert figures["parameter_bytes_before"] == whole
    assert 0.8 * whole - 160 < figures["parameter_bytes_after"] <= 0.8 * whole
    assert figures["parameter_bytes_after"] == written_bytes(Path("a"))
    blocks, _ = evaluation_blocks(TextConfig(str(folders / "text.jsonl"), seq_len=16, tokens=208), folders / "bf16")
    assert math.log(figures["perplexity_after"]) == pytest.approx(literal_loss(load_model(Path("a")), blocks), abs=1e-6)
    assert command("a", "--merge", "--out", "b")[0] == 0
    merged = AutoModelForCausalLM.from_pretrained("b", dtype="auto")
    assert merged.dtype == torch.bfloat16
    torch.testing.assert_close(logits(merged.float().eval()), logits(load_model(Path("a"))), rtol=0, atol=0.05)


# -------------------------------------------------------------------------------------------------------------- methods


def test_uniform_ranks_ignore_the_spectra(command: Command, folders: Path) -> None:
    words = ["method=uniform", "rank_reduction=0.75", "out=a", "perplexity=false"]
    assert command(folders / "opt", *words, *settings(folders))[0] == 0
    assert set(compressed_ranks(load_model(Path("a")).config).values()) == {8}


def test_whitening_keeps_the_ranks_and_calibrates_beyond_the_evaluated_text(
    command: Command, folders: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    original = compress_run.input_moments
    monkeypatch.setattr(compress_run, "input_moments", lambda m, c, b: (seen.extend(b), original(m, c, b))[1])
    assert command(folders / "opt", "rank_reduction=0.5", "whiten=true", "out=a", *settings(folders))[0] == 0
    white, plain = load_model(Path("a")), load_model(small / "opt")
    assert compressed_ranks(white.config) == compressed_ranks(plain.config)
    assert (logits(white) - logits(plain)).abs().max() > 1e-3
    blocks, _ = evaluation_blocks(TextConfig(str(folders / "text.jsonl"), seq_len=16, tokens=608), folders / "opt")
    assert torch.equal(torch.cat(seen), blocks[13:, :-1])  # 208 tokens are 13 rows; the other 25 calibrate


def test_owl_gives_blocks_shares_by_their_outliers(command: Command, folders: Path, tmp_path: Path) -> None:
    model = load_model(folders / "llama")
    model.model.layers[1].input_layernorm.weight.data[:3] *= 60  # outliers among the inputs of the second block
    model.save_pretrained(tmp_path / "outliers")
    shutil.copytree(folders / "tokenizer", tmp_path / "outliers", dirs_exist_ok=True)
    words = ["method=owl", "rank_reduction=0.5", "owl_strength=0.1", "classification=all", "out=a"]
    code, _, errors = command(tmp_path / "outliers", *words, *settings(folders))
    assert code == 0, errors
    blocks, _ = evaluation_blocks(TextConfig(str(folders / "text.jsonl"), seq_len=16, tokens=608), folders / "llama")
    energies = input_energies(model, linear_layers(model), [blocks[13:, :-1]])
    shares = [
        outlier_shares({n: m for n, m in linear_layers(model).items() if f"layers.{i}." in n}, energies) for i in (0, 1)
    ]
    assert shares[1] > shares[0]
    matrices = json.loads(Path("a/compress.json").read_text())["matrices"]
    for matrix in matrices:  # half the ranks, 0.1 more where there are more outliers
        share = 0.6 if "layers.1." in matrix["name"] else 0.4
        assert abs(matrix["rank"] - share * matrix["full_rank"]) < 1


# ---------------------------------------------------------------------------------------------------------------- cache


def test_spectra_are_made_once_for_the_same_weights(
    command: Command, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    original = compress_run.spectrum_of
    monkeypatch.setattr(compress_run, "spectrum_of", lambda name, w: (made.append(name), original(name, w))[1])
    shutil.copytree(folders / "llama", "copy")
    cache = tmp_path / "cache"
    number = iter(range(100))

    def run(folder: object, *more: str) -> tuple[int, bytes]:
        made.clear()
        out = Path(f"out{next(number)}")
        words = [folder, "rank_reduction=0.5", f"out={out}", "perplexity=false", *settings(folders), f"cache={cache}"]
        code, _, errors = command(*words, *more)
        assert code == 0, errors
        return len(made), (out / "low_rank.safetensors").read_bytes()

    count, weights = run(folders / "llama")
    assert count == 14
    assert run(folders / "llama") == (0, weights)
    assert run("copy") == (0, weights)  # the content counts, not the name
    assert len(list(cache.iterdir())) == 1

    file = next(cache.iterdir())
    file.write_bytes(file.read_bytes()[:100])
    assert run("copy") == (14, weights)  # a damaged cache is made anew
    assert run("copy") == (0, weights)
    assert run("copy", "layers=up_proj")[0] == 0  # all there
    stored = load_file("copy/model.safetensors")
    stored["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(stored, "copy/model.safetensors", {"format": "pt"})
    assert run("copy")[0] == 14
    assert len(list(cache.iterdir())) == 2
    cache.rename(tmp_path / "elsewhere")
    cache.write_text("no folder")
    assert run("copy")[0] == 14  # that nothing can be written loses only time
    assert run("copy")[0] == 14


# ---------------------------------------------------------------------------------------------------------------- ranks


def test_four_ranks_compress_as_one(folders: Path, small: Path, tmp_path: Path) -> None:
    words = [str(folders / "opt"), "rank_reduction=0.5", *settings(folders), f"cache={tmp_path / 'cache'}"]

    def work() -> tuple[int, str]:
        Figure.savefig = lambda _, path, **__: Path(path).touch()  # type: ignore[method-assign, assignment]
        made: list[str] = []
        original = compress_run.spectrum_of
        compress_run.spectrum_of = lambda name, weight: (made.append(name), original(name, weight))[1]
        os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
        table = compress_folder(*load_settings([*words, f"out={tmp_path / 'four'}"]))
        return len(made), table

    results = run_distributed(work, 4)
    assert [count for count, _ in results] == [3, 3, 3, 3]
    assert len({table for _, table in results}) == 1
    assert (tmp_path / "four" / "low_rank.safetensors").read_bytes() == (
        small / "opt" / "low_rank.safetensors"
    ).read_bytes()
    one, four = (json.loads((out / "compress.json").read_text()) for out in (small / "opt", tmp_path / "four"))
    assert one["matrices"] == four["matrices"]
    for key in ("perplexity_before", "perplexity_after"):
        assert four[key] == pytest.approx(one[key], rel=1e-6)


def test_an_error_reaches_all_ranks(folders: Path, broken: Path, tmp_path: Path) -> None:
    words = [str(broken / "not_finite"), "rank_reduction=0.5", *settings(folders), f"cache={tmp_path / 'cache'}"]

    def work() -> str:
        os.environ.update(RANK=str(dist.get_rank()), WORLD_SIZE=str(dist.get_world_size()))
        with pytest.raises(UserError) as caught:
            compress_folder(*load_settings([*words, "perplexity=false", f"out={tmp_path / 'out'}"]))
        return str(caught.value)

    messages = run_distributed(work, 2)
    assert messages[0] == messages[1]
    assert "'model.layers.1.mlp.up_proj' has no singular values" in messages[0]


# --------------------------------------------------------------------------------------------------------------- report


@pytest.mark.parametrize(("after", "ruined"), [(2.0, False), (9.0, True), (math.inf, True), (math.nan, True)])
def test_a_ruined_model_is_called_so(folders: Path, tmp_path: Path, after: float, ruined: bool) -> None:
    model = load_model(folders / "llama")
    found = spectra(model)
    plan = plan_ranks(model, found, rank_reduction=0.5)
    table = write_report(Compression("m", plan, found, 1000, 500, 2.0, after), {}, {}, tmp_path)
    assert ("of little use before it is fine-tuned (launch/finetune.py train=low_rank)" in table) == ruined
    assert "parameters 1000 B -> 500 B (50.0 %)" in table
    figures = json.loads((tmp_path / "compress.json").read_text())
    assert (figures["perplexity_after"] is None) == (not math.isfinite(after))
    assert (tmp_path / "ranks.png").stat().st_size > 5000


def test_sizes_as_people_write_them() -> None:
    assert [parse_bytes(text) for text in ("12B", "1 KiB", "1.5MB", "2gib", "3 TiB", "7B", "24G", "24GB")] == [
        12,
        1024,
        1_500_000,
        2**31,
        3 * 2**40,
        7,
        24 * 2**30,
        24 * 10**9,
    ]
    assert parse_bytes("60%", 1000) == 600
    for text in ("", "-1", "5 bananas", "60%", "nan", "1e9", "MiB", "1,000", "9" * 400 + "G"):
        with pytest.raises(ValueError, match="is not a size; expected a number above 0 with a unit, such as 600MiB"):
            parse_bytes(text)
    for text in ("12", "0", "24."):
        with pytest.raises(ValueError, match=r"has no unit; write .*GiB \(2\^30 bytes each\)"):
            parse_bytes(text)
    for text in ("0GiB", "0%", "0.1B"):
        with pytest.raises(ValueError, match="is no bytes at all; expected a number above 0"):
            parse_bytes(text, 100)
    assert [show_bytes(count) for count in (0, 1023, 1024, 3 * 2**19, 2**40)] == [
        "0 B",
        "1023 B",
        "1.00 KiB",
        "1.50 MiB",
        "1,024.00 GiB",
    ]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def broken(folders: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders with something wrong, and files of ranks."""
    root = tmp_path_factory.mktemp("broken")
    tiny = GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(tiny).save_pretrained(root / "gpt2")
    spoilt = trained("llama")
    spoilt.get_submodule("model.layers.1.mlp.up_proj").weight.data[3, 2] = float("nan")
    spoilt.save_pretrained(root / "not_finite")
    for name in ("gpt2", "not_finite"):
        shutil.copytree(folders / "tokenizer", root / name, dirs_exist_ok=True)
    trained("llama").save_pretrained(root / "no_tokenizer")
    build("llama", 0, "model.overrides.hidden_size=64").save_pretrained(root / "wider")
    shutil.copytree(folders / "tokenizer", root / "wider", dirs_exist_ok=True)
    (root / "empty").mkdir()
    (root / "file").write_text("x")

    name = "model.layers.0.self_attn.q_proj"
    for file, text in {
        "damaged.json": '{"model.layers.0',
        "list.json": "[1, 2]",
        "word.json": '"matrices"',
        "rankless.json": '{"matrices": [{"name": "a"}]}',
        "whole.json": json.dumps({name: 32}),
        "zero.json": json.dumps({name: 0}),
        "large.json": json.dumps({name: 33}),
        "fraction.json": json.dumps({name: 3.5}),
        "none.json": "{}",
    }.items():
        (root / file).write_text(text)

    def edited(folder: str, change: Callable[[dict[str, Any]], object]) -> None:
        shutil.copytree(small / "llama", root / folder)
        config = json.loads((root / folder / "config.json").read_text())
        change(config)
        (root / folder / "config.json").write_text(json.dumps(config))

    first = next(iter(compressed_ranks(load_model(small / "llama").config)))
    edited("rank_changed", lambda config: config["low_rank"]["ranks"].update({first: 2}))
    edited("rank_zero", lambda config: config["low_rank"]["ranks"].update({first: 0}))
    edited("rank_word", lambda config: config["low_rank"]["ranks"].update({first: "many"}))
    edited("rank_elsewhere", lambda config: config["low_rank"]["ranks"].update({"model.layers.9.x": 2}))
    edited("rank_missing", lambda config: config["low_rank"]["ranks"].pop(first))
    edited("ranks_missing", lambda config: config["low_rank"].pop("ranks"))
    edited("ranks_null", lambda config: config["low_rank"].update(ranks=None))
    edited("ranks_number", lambda config: config.update(low_rank=5))
    edited("ranks_gone", lambda config: config.pop("low_rank"))
    edited("truncated", lambda _: None)
    weights = root / "truncated" / "low_rank.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    edited("incomplete", lambda _: None)
    stored = load_file(root / "incomplete" / "low_rank.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, root / "incomplete" / "low_rank.safetensors", {"format": "pt"})
    return root


HALF = "rank_reduction=0.5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([HALF], "0 models given; expected one"),
        (["MODELS/llama", "MODELS/opt", HALF], "2 models given; expected one"),
        (["nowhere", HALF], "nowhere is not a folder"),
        (["BROKEN/empty", HALF], "has no config.json"),
        (["BROKEN/gpt2", HALF], "is a 'gpt2' model; expected one of llama, opt"),
        (["BROKEN/not_finite", HALF], "'model.layers.1.mlp.up_proj' has no singular values: the weight has entries"),
        (["BROKEN/no_tokenizer", HALF, "perplexity=false"], "cannot load the tokenizer in"),
        (["MODELS/llama"], "give one of rank_reduction, size, ranks and merge; got none"),
        (
            ["MODELS/llama", HALF, "size=60%"],
            "give one of rank_reduction, size, ranks and merge; got rank_reduction, size",
        ),
        (["MODELS/llama", HALF, "--merge"], "got rank_reduction, merge"),
        (["MODELS/llama", "rank_reduction=0"], "rank_reduction=0.0; expected a number above 0 and below 1"),
        (["MODELS/llama", "rank_reduction=1"], "rank_reduction=1.0; expected a number above 0"),
        (["MODELS/llama", "rank_reduction=1.5"], "rank_reduction=1.5; expected a number above 0"),
        (["MODELS/llama", "rank_reduction=nan"], "rank_reduction=nan; expected a number above 0"),
        (["MODELS/llama", "rank_reduction=half"], "wrong value for 'rank_reduction'"),
        (["MODELS/llama", "rank_reduction=0.999"], "a budget of 0 is too small: the least ranks cost 14"),
        (["MODELS/llama", "--rank-reduction"], "--rank-reduction has no value; expected --rank-reduction VALUE"),
        (["MODELS/llama", HALF, "floor=32"], "a budget of 224 is too small: the least ranks cost 448 (floor=32"),
        (["MODELS/llama", HALF, "multiple=0"], "multiple=0; expected a number >= 1"),
        (["MODELS/llama", HALF, "floor=0"], "floor=0; expected a number >= 1"),
        (["MODELS/llama", HALF, "ceiling=2", "floor=3"], "ceiling=2 is below floor=3"),
        (["MODELS/llama", HALF, "score=maxmin"], "score='maxmin'; expected one of minmax"),
        (["MODELS/llama", HALF, "classification=third"], "classification"),
        (["MODELS/llama", HALF, "method=svd"], "method"),
        (["MODELS/llama", HALF, "micro_batch=0"], "micro_batch=0; expected"),
        (["MODELS/llama", HALF, "calibration_tokens=0"], "calibration_tokens=0; expected"),
        (["MODELS/llama", HALF, "owl_strength=-1"], "owl_strength=-1.0; expected"),
        (["MODELS/llama", HALF, "data.tokens=0"], "data.tokens=0; expected a number >= 1"),
        (["MODELS/llama", HALF, "data.seq_len=0"], "data.seq_len=0; expected a number >= 1"),
        (["MODELS/llama", HALF, "data.validation_fraction=0"], "data.validation_fraction=0.0; expected"),
        (["MODELS/llama", HALF, "data.path=nowhere.jsonl"], "data.path=nowhere.jsonl does not exist"),
        (["MODELS/llama", HALF, "device=tpu"], "device"),
        (["MODELS/llama", HALF, "layers=nothing"], "layers='nothing' matches no nn.Linear"),
        (["MODELS/llama", HALF, "layers=(q"], "layers='(q' is not a regular expression"),
        (["MODELS/opt", HALF, "layers=."], "is tied to"),
        (["MODELS/llama", "size=1KB"], "size=1KB is below what is not compressed: embeddings, head and norms take"),
        (["MODELS/llama", "size=77.5KB"], "is too small: the least ranks cost"),
        (["MODELS/llama", "size=1GiB"], "size=1GiB is not below the model's"),
        (["MODELS/llama", "size=100%"], "size=100% is not below the model's"),
        (["MODELS/llama", "size=5 bananas"], "size='5 bananas' is not a size; expected a number above 0"),
        (["MODELS/llama", "size=60"], "size='60' has no unit; write 60GiB (2^30 bytes each)"),
        (["MODELS/llama", "size=-5MB"], "size='-5MB' is not a size"),
        (["MODELS/llama", HALF, "rank_reductoin=0.4"], "unknown key 'rank_reductoin'"),
        (["MODELS/llama", HALF, "rank_reductoin=0.4"], "did you mean 'rank_reduction'"),
        (["MODELS/llama", HALF, "--data.pth", "x"], "did you mean 'data.path'"),
        (["MODELS/llama", HALF, "out=BROKEN/empty/.."], "exists already; give another folder, or delete it"),
        (["MODELS/llama", HALF, "out=BROKEN/file"], "exists already; give another folder, or delete it"),
        (["MODELS/llama", HALF, "out=BROKEN/file/below"], "cannot write to out="),
        (["MODELS/llama", HALF, "out=null"], "no folder for the result; give --out small/"),
        (["SMALL/llama", HALF], "is compressed already; give the model it was made of, or --merge"),
        (["MODELS/llama", "--merge"], "no spectral or low-rank layer to merge; it is plain already"),
        (["MODELS/llama", "ranks=SMALL/opt/compress.json"], "which the model has not: it is of another model"),
        (
            ["BROKEN/wider", "ranks=SMALL/llama/compress.json"],
            "of shape (32, 32), not (64, 64): it is of another model",
        ),
        (["MODELS/llama", "ranks=nowhere.json"], "cannot read ranks=nowhere.json"),
        (["MODELS/llama", "ranks=BROKEN/empty"], "cannot read ranks="),
        (["MODELS/llama", "ranks=BROKEN/damaged.json"], "expected a compress.json, or JSON of name: rank"),
        (["MODELS/llama", "ranks=BROKEN/list.json"], "expected a compress.json, or JSON of name: rank"),
        (["MODELS/llama", "ranks=BROKEN/word.json"], "expected a compress.json, or JSON of name: rank"),
        (["MODELS/llama", "ranks=BROKEN/rankless.json"], "expected a compress.json, or JSON of name: rank"),
        (["MODELS/llama", "ranks=BROKEN/zero.json"], "rank 0 for 'model.layers.0.self_attn.q_proj'; expected 1 to 32"),
        (
            ["MODELS/llama", "ranks=BROKEN/large.json"],
            "rank 33 for 'model.layers.0.self_attn.q_proj'; expected 1 to 32",
        ),
        (["MODELS/llama", "ranks=BROKEN/fraction.json"], "rank 3.5 for"),
        (["MODELS/llama", "ranks=BROKEN/whole.json"], "no matrix qualifies"),
        (["MODELS/llama", "ranks=BROKEN/none.json"], "no matrix qualifies"),
        (["BROKEN/truncated", "--merge"], "cannot load the model in"),
        (["BROKEN/incomplete", "--merge"], "has nothing for 'model.norm.weight'; expected (32,)"),
        (["BROKEN/rank_changed", "--merge"], "its weights and ranks do not fit"),
        (["BROKEN/rank_missing", "--merge"], "its weights and ranks do not fit"),
        (["BROKEN/ranks_gone", "--merge"], "its weights and ranks do not fit"),
        (["BROKEN/rank_zero", "--merge"], "in the model's config.json do not fit it: cannot factor"),
        (["BROKEN/rank_word", "--merge"], "rank='many'; expected a whole number"),
        (["BROKEN/rank_elsewhere", "--merge"], "nothing named 'model.layers.9.x'"),
        (["BROKEN/ranks_missing", "--merge"], "its weights and ranks do not fit"),
        (["BROKEN/ranks_null", "--merge"], "low_rank.ranks in the model's config.json do not fit it"),
        (["BROKEN/ranks_number", "--merge"], "low_rank.ranks in the model's config.json do not fit it"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    command: Command, folders: Path, small: Path, broken: Path, words: list[str], message: str
) -> None:
    places = {"MODELS": folders, "SMALL": small, "BROKEN": broken}
    for place, path in places.items():
        words = [word.replace(place, str(path)) for word in words]
    code, said, errors = command("out=out", *settings(folders), *words)
    assert code == 2
    assert not said
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1, errors
    assert message in errors
    assert not Path("out").exists()


def test_no_matrix_qualifies_where_all_are_nearly_whole(command: Command, folders: Path, tmp_path: Path) -> None:
    """One matrix, of which a rank of nearly half is too much for the paper's rule."""
    words = [HALF, "floor=16", "layers=layers.0.*q_proj", "classification=all", "out=a", *settings(folders)]
    assert command(folders / "llama", *words, "perplexity=false")[0] == 0  # dense, but truncated
    assert not is_compressed("a")
    assert torch.linalg.matrix_rank(load_model(Path("a")).get_submodule("model.layers.0.self_attn.q_proj").weight) == 16


# -------------------------------------------------------------------------------------------------------- the benchmark


def compare(folders: Path, tmp_path: Path, *words: str) -> tuple[str, dict[str, Any]]:
    given = [word for word in settings(folders) if not word.startswith("cache=")]
    table = compression_benchmark.measure(
        compression_benchmark.load([f"model={folders / 'llama'}", f"output={tmp_path}", *given, *words])
    )
    return table, json.loads((tmp_path / "compression.json").read_text())


def test_the_benchmark_has_the_figures_of_the_command(
    folders: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ways = ["ways.a.method=welore", "ways.b.method=uniform", "ways.b.classification=all"]
    table, figures = compare(folders, tmp_path, *ways, "rank_reductions=[0.5]", "sizes=[90%,1%]")
    assert command(folders / "llama", *settings(folders), "rank_reduction=0.5", "out=c")[0] == 0
    alone = json.loads(Path("c/compress.json").read_text())
    cell = figures["cells"][0]
    assert (cell["way"], cell["rank_reduction"]) == ("a", 0.5)
    assert cell["perplexity"] == alone["perplexity_after"]
    assert figures["perplexity_before"] == alone["perplexity_before"]
    assert cell["ranks"] == {row["name"]: row["rank"] for row in alone["matrices"]}
    assert [row.split()[-2] for row in table.splitlines()[2:]] == ["-", "-"]  # a size below the embeddings
    assert "is below what is not compressed" in figures["cells"][2]["why"]
    assert figures["cells"][2]["why"] in (tmp_path / "compression.md").read_text()


def test_another_model_or_text_under_the_same_name_is_not_mixed_in(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "llama", tmp_path / "model")
    shutil.copy(folders / "text.jsonl", tmp_path / "text.jsonl")
    words = ["ways.a.method=uniform", "rank_reductions=[0.5]", f"model={tmp_path / 'model'}"]
    words += [f"data.path={tmp_path / 'text.jsonl'}"]
    table, _ = compare(folders, tmp_path / "out", *words)
    (tmp_path / "out" / "compression.json").unlink()
    assert compare(folders, tmp_path / "out", *words)[0] == table
    write_jsonl(tmp_path / "text.jsonl", documents(100, seed=1))
    with pytest.raises(UserError, match=r"a training with other settings: subject was .*; give another output"):
        compare(folders, tmp_path / "out", *words)
    with pytest.raises(UserError, match="no target can be reached; the first: size=1% is below what is not compressed"):
        compare(folders, tmp_path / "none", "ways.a.method=uniform", "rank_reductions=[]", "sizes=[1%]")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "there are no ways to compare"),
        (["ways.a.metod=owl"], r"ways.a.metod: unknown; expected one of method"),
        (["ways.a.method=owl", "rank_reductions=[]"], "no target given"),
        (["ways.a.method=owl", "model=nowhere"], "model=nowhere is not a folder"),
    ],
)
def test_bad_input_of_the_benchmark(folders: Path, tmp_path: Path, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare(folders, tmp_path, *words)


def test_the_benchmark_needs_a_model() -> None:
    with pytest.raises(UserError, match="no model given; expected model=FOLDER"):
        compression_benchmark.load([])


# ------------------------------------------------------------------------------------------- a word where one is needed


def test_ranks_that_jump_past_the_target_are_told_of(command: Command, folders: Path) -> None:
    words = [folders / "llama", "perplexity=false", "--method", "uniform", "out=a"]
    _, out, _ = command(*words, "--rank-reduction", "0.3")
    assert "30 % was asked for: matrices of equal scores" in out
    _, out, _ = command(*words[:-1], "out=b", "--rank-reduction", "0.3", "--classification", "all")
    assert "was asked for" not in out


def test_calibration_needs_text_that_is_not_evaluated(command: Command, folders: Path) -> None:
    words = [*settings(folders), "data.tokens=1000000", "rank_reduction=0.5", "out=a"]
    code, _, error = command(folders / "llama", *words, "--whiten", "true")
    assert code == 2
    assert "whiten and owl calibrate on text that follows the 1000000 tokens evaluated" in error
    assert command(folders / "llama", *words, "--whiten", "false")[0] == 0


def test_only_whole_rows_of_text_calibrate(folders: Path) -> None:
    _, config = load_settings(["--whiten", *settings(folders), str(folders / "llama"), "rank_reduction=0.5", "out=a"])
    with start("cpu") as ranks:
        model = load_model(folders / "llama")
        blocks, batches = compress_run._text(model, folders / "llama", config, ranks, calibrates=True)
    assert blocks is not None
    everything, _ = evaluation_blocks(TextConfig(**{**vars(config.data), "tokens": 608}), folders / "llama")
    torch.testing.assert_close(blocks, everything[:13])
    torch.testing.assert_close(torch.cat(batches), everything[13:38, :-1])
