"""Translation from end to end: it is learned, scored, stopped, continued bit for bit; and what the user must mend."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from matplotlib.figure import Figure
from pyarrow import parquet

from lowrank_train.bench import translation as translation_benchmark
from lowrank_train.common.errors import UserError
from lowrank_train.config.loading import given_value
from lowrank_train.hyperbolic import lorentz
from lowrank_train.hyperbolic.graphs.config import GraphModelConfig
from lowrank_train.hyperbolic.graphs.run import load_network
from lowrank_train.hyperbolic.recipes import load_recipe
from lowrank_train.hyperbolic.translation import train as translation_training
from lowrank_train.hyperbolic.translation.bleu import bleu
from lowrank_train.hyperbolic.translation.config import TranslationConfig, TranslationModelConfig
from lowrank_train.hyperbolic.translation.data import load_translation_data
from lowrank_train.hyperbolic.translation.network import Translator
from lowrank_train.hyperbolic.translation.record import TranslationRecord
from lowrank_train.hyperbolic.translation.run import load_translator
from lowrank_train.train.metrics import read_metrics
from tests.distributed import run_distributed
from tests.runs import ROOT, Launched, assert_equal_tensors, checkpoint_tensors, checkpoints, send

pytestmark = pytest.mark.slow

METHODS = {
    "adamw": [],
    "lora": ["optimizer.name=lora", "optimizer.rank=2"],
    "relora": ["optimizer.name=relora", "optimizer.rank=2", "optimizer.restart_every=7", "optimizer.warmup_steps=2"],
    "sst": ["optimizer.name=sst", "optimizer.rank=2", "optimizer.resample_every=7", "optimizer.warmup_steps=2"],
}
COLOURS = {"rot": "red", "blau": "blue", "alt": "old", "neu": "new"}
THINGS = {"Haus": "house", "Hund": "dog", "Baum": "tree", "Auto": "car"}
DEEDS = {"schläft": "sleeps", "läuft": "runs", "fällt": "falls"}


def corpus() -> list[tuple[str, str]]:
    """All 48 sentences of a small language, the adjective behind the noun in one of the two."""
    return [
        (f"Das {thing} {colour} {deed}.", f"The {COLOURS[colour]} {THINGS[thing]} {DEEDS[deed]}.")
        for thing in THINGS
        for colour in COLOURS
        for deed in DEEDS
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parts, and the tokenizer."""
    folder = tmp_path_factory.mktemp("pairs")
    sentences = corpus()
    for part, chosen in (("train", sentences), ("validation", sentences[::5]), ("test", sentences[1::5])):
        write(folder / f"{part}.parquet", chosen)
    return folder


def write(file: Path, sentences: Sequence[tuple[str | None, str]], columns: tuple[str, str] = ("de", "en")) -> None:
    sides = [list(side) for side in zip(*sentences, strict=True)] or [[], []]
    parquet.write_table(pyarrow.table(dict(zip(columns, sides, strict=True))), file)


def words(folder: Path, run_dir: Path, *more: str) -> list[str]:
    """A run of 30 batches of about six sentences."""
    return [
        "data.task=translation",
        f"data.folder={folder}",
        f"data.tokenizer_folder={folder / 'tokenizer'}",
        "data.vocab_size=300",
        "data.batch_tokens=120",
        "model.width=8",
        "model.inner_width=12",
        "model.layers=1",
        "model.heads=2",
        "model.places=20",
        "optimizer.lr=0.01",
        "optimizer.points_lr=0.1",
        "schedule.warmup_steps=3",
        "steps=30",
        "longest=12",
        "evaluate_every=10",
        "checkpoint_every=10",
        "log_every=1",
        f"run_dir={run_dir}",
        *more,
    ]


def train(
    arguments: Sequence[str], before: Callable[[], None] | None = None, *, plot: bool = False
) -> TranslationRecord:
    """In a forked process, after calling ``before`` in it."""
    records: list[TranslationRecord] = run_distributed(_train, 1, list(arguments), before, plot)
    return records[0]


def failure(arguments: Sequence[str], before: Callable[[], None] | None = None) -> str:
    """The message of the UserError that the run raises."""
    message = run_distributed(_fail, 1, list(arguments), before)[0]
    assert message is not None, "training was expected to fail"
    return str(message)


def at_step(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """For ``train``: act when the n-th training loss of that process is computed."""

    def install() -> None:
        original, calls = translation_training.batch_loss, [0]

        def batch_loss(*arguments: object, **more: object) -> torch.Tensor:
            calls[0] += "mean" not in more
            if calls[0] == number and "mean" not in more:
                act()
            return original(*arguments, **more)  # type: ignore[arg-type]

        translation_training.batch_loss = batch_loss

    return install


def _train(arguments: list[str], before: Callable[[], None] | None, plot: bool) -> TranslationRecord:
    os.environ.update(RANK="0", WORLD_SIZE="1")
    if not plot:
        Figure.savefig = lambda *_, **__: None  # type: ignore[method-assign]
    if before is not None:
        before()
    return translation_training.train_translation(load_recipe(TranslationConfig, arguments))


def _fail(arguments: list[str], before: Callable[[], None] | None) -> str | None:
    try:
        _train(arguments, before, plot=False)
    except UserError as error:
        return str(error)
    return None


def history(run_dir: Path) -> list[dict[str, object]]:
    """Rows of metrics.jsonl without what depends on the clock and the machine."""
    clock = ("throughput/", "memory/", "optimizer/resvd_time_share")
    return [{key: value for key, value in row.items() if not key.startswith(clock)} for row in read_metrics(run_dir)]


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.parametrize("geometry", ["lorentz", "euclidean"])
def test_a_small_language_is_learned(folder: Path, tmp_path: Path, geometry: str) -> None:
    run_dir = tmp_path / "run"
    more = [
        f"model.geometry={geometry}",
        "model.width=16",
        "steps=150",
        "data.batch_tokens=600",
        "clip=1.0",
        "model.max_time=4",
    ]
    more += ["optimizer.points_lr=0.1", "checkpoint_every=0", "evaluate_every=0"]
    record = train(words(folder, run_dir, *more), plot=geometry == "lorentz")
    assert record.status == "finished"
    assert record.bleu["test"] > 50  # always the same sentence: 19; words one by one, in the wrong order: 8
    assert record.validation_loss is not None
    assert record.validation_loss < 0.5
    names = {"encoder", "decoder"} | (
        {"source.words.weight", "target.words.weight", "decision.centres"} if geometry == "lorentz" else set()
    )
    assert set(record.manifold_error) == set(record.time_error) == names
    assert max(record.time_error.values()) < 1e-6
    assert max(record.manifold_error.values()) < (1e-3 if geometry == "lorentz" else 1e-30)

    with (run_dir / "test.tsv").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [(row["source"], row["reference"]) for row in rows] == corpus()[1::5]
    assert bleu([row["translation"] for row in rows], [row["reference"] for row in rows])[0] == record.bleu["test"]
    assert TranslationRecord(**json.loads((run_dir / "record.json").read_text())) == record
    text = (run_dir / "report.md").read_text()
    for expected in (
        f"| test BLEU | {record.bleu['test']:.2f} |",
        "nrefs:1|case:mixed|eff:no|tok:13a",
        f"{record.trainable_parameters:,} (100 %",
        f"{max(record.manifold_error.values()):.1e}",
        rows[0]["translation"],
    ):
        assert expected in text
    if geometry == "lorentz":
        assert (run_dir / "curves.png").stat().st_size > 5000
    assert list((run_dir / "tensorboard").iterdir())


@pytest.mark.parametrize(
    ("method", "geometry"), [*((method, "lorentz") for method in METHODS), ("relora", "euclidean")]
)
def test_every_method_trains_resumes_and_leaves_a_plain_network(
    folder: Path, tmp_path: Path, method: str, geometry: str
) -> None:
    """With dropout; stopped by a signal at step 13, in the second epoch, then to the end: bit for bit the same."""
    more = [f"model.geometry={geometry}", "model.dropout=0.1", *METHODS[method]]
    whole = train(words(folder, tmp_path / "whole", *more))
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "whole")]
    assert losses[-1] < 0.75 * losses[0]
    _check_network(whole, load_translator(tmp_path / "whole"), method)

    cut = words(folder, tmp_path / "cut", *more)
    stopped = train(cut, at_step(13, send(signal.SIGTERM)))
    assert (stopped.status, stopped.steps, stopped.bleu) == ("interrupted", 13, {})
    assert stopped.epochs > 1
    assert checkpoints(tmp_path / "cut") == ["step-10", "step-13"]
    resumed = train(cut)
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert (resumed.bleu, resumed.validation_loss) == (whole.bleu, whole.validation_loss)
    ends = [tmp_path / name / "checkpoints" / "step-30" for name in ("cut", "whole")]
    for section in ("model.", "optimizer."):
        assert_equal_tensors(*(checkpoint_tensors(end, section) for end in ends))


def _check_network(record: TranslationRecord, network: Translator, method: str) -> None:
    assert record.parameters == sum(p.numel() for p in network.parameters())
    assert record.bleu.keys() == {"validation", "test"}
    for name, points in network.points().items():
        lorentz.check_points(points, name=name)
    inside = (*network.encoder.modules(), *network.decoder.modules())
    maps = [module for module in inside if isinstance(module, torch.nn.Linear)]
    assert len(maps) == (4 + 2) + (4 + 4 + 2)
    frozen = sum(linear.weight.numel() for linear in maps)
    factors = 2 * sum(sum(linear.weight.shape) for linear in maps)
    sigma = sum(min(linear.weight.shape) for linear in maps)
    trained = {"adamw": frozen, "lora": factors, "relora": factors, "sst": factors + sigma}[method]
    assert record.trainable_parameters == record.parameters - frozen + trained


def test_rates_of_groups(folder: Path, tmp_path: Path) -> None:
    """What has rate 0 stays; sst, so that factors are a group of their own."""
    run_dir = tmp_path / "run"
    frozen = ["optimizer.other_lr=0", "optimizer.points_lr=0", "checkpoint_every=1", "steps=1"]
    train(words(folder, run_dir, *METHODS["sst"], *frozen, "resume=never"))
    begun = load_translator(run_dir).state_dict()
    train(words(folder, tmp_path / "on", *METHODS["sst"], *frozen, "steps=5"))
    moved = load_translator(tmp_path / "on").state_dict()
    for name, value in begun.items():
        assert torch.equal(value, moved[name]) != name.endswith(".linear.weight"), name


# ------------------------------------------------------------------------------------------------------------ going on


def test_a_finished_run_is_not_trained_again(folder: Path, tmp_path: Path) -> None:
    first = train(words(folder, tmp_path / "run"))
    again = train(words(folder, tmp_path / "run"), at_step(1, send(signal.SIGKILL)))
    assert (again.bleu, again.steps, again.seconds) == (first.bleu, first.steps, first.seconds)
    message = failure(words(folder, tmp_path / "run", "label_smoothing=0.2"))
    assert "is finished at step 30; label_smoothing was 0.1, is 0.2: set run_dir" in message
    assert "model.width = 8; expected 12" in failure(words(folder, tmp_path / "run", "model.width=12"))


# ------------------------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.vocabulary=3", r"unknown key 'data\.vocabulary'"),
        ("model.convolutions=3", r"unknown key 'model\.convolutions'"),
        ("optimizer.rank=3", r"in optimizer: optimizer 'adamw' takes no argument 'rank'"),
        ("optimizer.other_lr=-1", r"optimizer\.other_lr=-1; expected a number >= 0"),
        ("optimizer.points_lr=fast", r"optimizer\.points_lr='fast'; expected a number >= 0"),
        ("label_smoothing=1", r"label_smoothing=1\.0; expected a number from 0 to below 1"),
        ("steps=0", r"steps=0; expected a number >= 1"),
        ("data.vocab_size=256", r"data\.vocab_size=256; expected a number >= 257"),
        ("data.task=summaries", r"wrong value .*data\.task"),
        ("clip=0", r"clip=0\.0; expected a number > 0, or null"),
        ("model.curvature=0", r"model\.curvature=0\.0; expected a number >= 1e-06"),
        ("model.max_time=0", r"model\.max_time=0\.0; expected a number > 0"),
        ("seed=-1", r"seed=-1; expected a number >= 0"),
    ],
)
def test_settings_that_are_wrong(folder: Path, tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(TranslationConfig, words(folder, tmp_path, change))


def test_files_that_are_wrong(folder: Path, tmp_path: Path) -> None:
    def load(source: str = "de", places: int = 20) -> None:
        load_translation_data(
            str(tmp_path), source, "en", vocab_size=300, places=places, tokenizer_folder=folder / "tokenizer"
        )

    with pytest.raises(UserError, match=r"there is no .*train\.parquet; expected train\.parquet.*data\.folder="):
        load()
    (tmp_path / "train.parquet").write_text("no parquet")
    with pytest.raises(UserError, match=r"cannot read .*train\.parquet: "):
        load()
    for part in ("train", "validation", "test"):
        write(tmp_path / f"{part}.parquet", corpus()[:9])
    with pytest.raises(UserError, match=r"train\.parquet has no column 'fr'; it has de, en: set data\.source="):
        load("fr")
    with pytest.raises(UserError, match=r"model\.places=3: a sentence of train\.parquet has \d+ tokens; raise it"):
        load(places=3)
    write(tmp_path / "test.parquet", [("Ja.", "Yes."), (None, "No.")])
    with pytest.raises(UserError, match=r"test\.parquet: row 1 of column 'de' is empty"):
        load()
    write(tmp_path / "validation.parquet", [])
    with pytest.raises(UserError, match=r"validation\.parquet is empty; expected pairs"):
        load()


def test_without_sacrebleu_nothing_is_trained(folder: Path, tmp_path: Path) -> None:
    def hide() -> None:
        sys.modules["sacrebleu"] = None  # type: ignore[assignment]

    message = failure(words(folder, tmp_path / "run"), hide)
    assert "sacrebleu, which is not installed; run 'pip install lowrank-train[hyperbolic]'" in message
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run(folder: Path, tmp_path: Path) -> None:
    def spoil() -> None:
        translation_training.batch_loss = lambda network, *_, **__: network.target.places.sum() * torch.nan

    assert "of step 1 is not finite; " in failure(words(folder, tmp_path / "run"), spoil)


def test_a_folder_without_a_network_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*network\.pt.*expected the run_dir of a finished run"):
        load_translator(tmp_path)
    torch.save({"network": {"geometry": "lorentz", "curvature": 1.0}}, tmp_path / "network.pt")  # of the first version
    with pytest.raises(UserError, match=r"network\.pt was written by another version of lowrank-train \('words'\)"):
        load_translator(tmp_path)


SAVED: dict[str, tuple[Any, dict[str, int], Callable[[Path], torch.nn.Module]]] = {
    "translation": (TranslationModelConfig(), {"words": 5}, load_translator),
    "graph": (GraphModelConfig(), {"features": 3, "classes": 2}, load_network),
}
"""Kind of network -> the settings it is built from, what else network.pt says of it, and its reader."""


@pytest.mark.parametrize(
    ("kind", "key"), [(kind, key) for kind, (model, more, _) in SAVED.items() for key in (*asdict(model), *more)]
)
def test_a_network_without_one_of_its_settings_is_refused_and_takes_no_default(
    kind: str, key: str, tmp_path: Path
) -> None:
    model, more, load = SAVED[kind]
    network = {**asdict(model), **more}
    del network[key]
    torch.save({"network": network, "precision": "float32", "state": {}}, tmp_path / "network.pt")
    with pytest.raises(UserError, match=rf"network\.pt was written by another version of lowrank-train \('{key}'\)"):
        load(tmp_path)


# ----------------------------------------------------------------------------------------------- the front door, tables


def test_the_task_is_found_in_files_and_overrides(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("data: {task: translation}\n")
    assert given_value([str(recipe), "steps=3"], "data.task") == "translation"
    assert given_value([str(recipe), "data.task=link_prediction"], "data.task") == "link_prediction"
    assert given_value(["steps=3"], "data.task") is None


def test_the_launcher_translates_and_says_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    launcher = ROOT / "launch" / "hyperbolic.py"
    process = Launched([*words(folder, tmp_path / "run"), "--steps", "3"], tmp_path / "log", launcher)
    assert process.finish() == 0, process.output
    assert "test BLEU" in process.output
    process = Launched(["data.task=translatoin"], tmp_path / "log2", launcher)
    assert process.finish() == 2
    assert "'translatoin'; expected one of link_prediction, node_classification, translation" in process.output
    process = Launched(["data.task=translation", "--help"], tmp_path / "log3", launcher)
    assert process.finish() == 0
    assert "data.batch_tokens (4096): " in process.output


def _measure(arguments: list[str], training: bool) -> str:
    os.environ.update(RANK="0", WORLD_SIZE="1")
    Figure.savefig = lambda *_, **__: None  # type: ignore[method-assign]
    if not training:
        translation_benchmark.train_translation = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, return-value]
    try:
        return translation_benchmark.measure(translation_benchmark.load(arguments))
    except UserError as error:
        return f"error: {error}"


def test_the_table_shows_the_rate_that_validation_chose(folder: Path, tmp_path: Path) -> None:
    recipe, file, out = tmp_path / "recipe.yaml", tmp_path / "benchmark.yaml", tmp_path / "out"
    recipe.write_text(
        "data: {vocab_size: 300, batch_tokens: 400}\nmodel: {width: 8, inner_width: 8, layers: 1, heads: 2}\n"
    )
    file.write_text(
        f"recipe: {recipe}\nfolder: {folder}\noutput: {out}\noverrides: [steps=2, longest=3]\n"
        "rows: {full: [], sst: [optimizer.name=sst, optimizer.rank=2]}\nrates: {full: [0.01, 0.1], sst: [0.02, 0.2]}\n"
    )
    table = str(run_distributed(_measure, 1, [str(file)], True)[0])
    saved = json.loads((out / "multi30k.json").read_text())
    runs = saved["runs"]
    keys = {(run["geometry"], run["row"], run["rate"]) for run in runs}
    assert len(keys) == len(runs) == 2 * 2 * 2
    lines = table.splitlines()[2:]
    assert len(lines) == 4
    for line, (geometry, row) in zip(
        lines, [(g, r) for g in ("euclidean", "lorentz") for r in ("full", "sst")], strict=True
    ):
        own = [run for run in runs if (run["geometry"], run["row"]) == (geometry, row)]
        best = max(own, key=lambda run: run["bleu"]["validation"])
        assert line.startswith(
            f"| {geometry} | {row} | {best['bleu']['test']:.2f} | {best['bleu']['validation']:.2f} |"
        )
        assert f"| {best['rate']:g} | {best['trainable_parameters']:,} | {best['trainable_in_layers']:,} |" in line
    assert str(tmp_path) not in json.dumps([runs, saved["data"]])
    assert str(run_distributed(_measure, 1, [str(file)], False)[0]) == table  # all were there already
    changed = run_distributed(_measure, 1, [str(file), "overrides=[steps=3, longest=3]"], False)[0]
    assert "holds a training with other settings: steps was 2, is 3" in str(changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rates={full: [0.1], sst: [0.1, 0.2]}", "rates: full 1, sst 2; expected equally many for every row"),
        ("rates={full: [0.1], sst: []}", "rates: full 1, sst 0; expected equally many"),
        ("geometries=[flat]", "geometries: unknown 'flat'; expected lorentz or euclidean"),
        ("seeds=[]", "seeds is empty"),
    ],
)
def test_a_benchmark_that_is_not_fair_or_empty_is_refused(change: str, message: str) -> None:
    rows = ["rows={full: [], sst: [optimizer.name=sst]}", "rates={full: [0.1], sst: [0.1]}"]
    with pytest.raises(UserError, match=re.escape(message)):
        translation_benchmark.load([*rows, change])


def test_the_recipe_is_readable_with_every_method() -> None:
    recipe = str(ROOT / "configs" / "hyperbolic" / "multi30k.yaml")
    for method in METHODS:
        rank = [] if method == "adamw" else ["optimizer.rank=4"]
        config = load_recipe(TranslationConfig, [recipe, f"optimizer.name={method}", *rank])
        assert (config.optimizer.get("warmup_steps") == 10) == (method in ("sst", "relora"))
    given = load_recipe(TranslationConfig, [recipe, "optimizer.name=sst", "optimizer.rank=4", "optimizer.lr=0.3"])
    assert given.optimizer["lr"] == 0.3
    translation_benchmark.load([str(ROOT / "configs" / "benchmark" / "translation.yaml")])
