"""What a step costs, counted: known kernels are counted as they are, and every method keeps to its row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowrank_train.bench.steps.cost import GPUS, LAUNCH, measure, of_language_models, step_costs
from lowrank_train.bench.steps.kernels import count
from lowrank_train.common.errors import UserError

N = 4 * 8 * 16
"""Bytes of the matrix of the tests below."""


class Steps(torch.optim.Optimizer):
    """An optimizer whose step is one function of a matrix (8, 16) on the meta device."""

    def __init__(self, step: Callable[[Tensor], object]) -> None:
        self.matrix = torch.empty(8, 16, device="meta")
        super().__init__([self.matrix], {})
        self._step = step

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            self._step(self.matrix)


@pytest.mark.parametrize(
    ("step", "kernels", "moved", "flops"),
    [
        (lambda w: w.mT[1:].view(15, 8), 0, 0, 0),
        (torch.empty_like, 0, 0, 0),
        (lambda w: w.mul_(2), 1, 2 * N, 0),
        (lambda w: w + w, 1, 3 * N, 0),
        (lambda w: w.copy_(torch.empty_like(w)), 1, 2 * N, 0),
        (lambda w: w @ w.mT, 1, 2 * N + 4 * 64, 2 * 8 * 8 * 16),
        (lambda w: w.addmm_(torch.empty(8, 8, device="meta"), w), 1, 3 * N + 4 * 64, 2 * 8 * 8 * 16),
        (lambda w: w.add_(torch.zeros(1, 1, device="meta").expand(8, 16)), 2, 2 * N + 4 + 4, 0),
        (lambda w: torch._foreach_mul_([w, w], 2.0), 1, 4 * N, 0),
        (lambda w: torch.zeros(3).add_(1), 0, 0, 0),
    ],
)
def test_a_kernel_counts_with_what_it_reads_and_writes(
    step: Callable[[Tensor], object], kernels: int, moved: int, flops: int
) -> None:
    found = count(Steps(step))
    assert (len(found.kernels), found.bytes, found.flops) == (kernels, moved, flops)


def test_fused_adamw_moves_seven_numbers_a_parameter() -> None:
    weight = torch.nn.Parameter(torch.empty(64, 32, device="meta"))
    weight.grad = torch.empty_like(weight)
    optimizer = torch.optim.AdamW([weight], foreach=False)
    optimizer.step()
    state, steps = optimizer.state[weight], torch.ones((), device="meta")
    fused = Steps(
        lambda w: torch._fused_adamw_(
            [weight],
            [weight.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [steps],
            lr=1e-3,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
    )
    found = count(fused)
    assert len(found.kernels) == 1
    assert found.bytes == 7 * 4 * 64 * 32 + 4  # and the count of steps


def test_reads_of_the_device_are_counted_and_answered() -> None:
    found = count(Steps(lambda w: (w[0, 0].item(), w[0].cpu(), w.sum().item())))
    assert found.device_reads == 3


def test_a_kernel_takes_the_longest_of_its_three_needs() -> None:
    found = count(Steps(lambda w: (w.mul_(2), w @ w.mT)))
    assert found.seconds(bandwidth=1e30, rate=1e30, launch=4e-6) == pytest.approx(8e-6)
    assert found.seconds(bandwidth=1.0, rate=1e30, launch=0.0) == pytest.approx(found.bytes)
    assert found.seconds(bandwidth=1e30, rate=1.0, launch=0.0) == pytest.approx(found.flops)


# ------------------------------------------------------------------------------------------------------- every method

COUNTS: dict[str, tuple[float, float]] = {
    "adamw": (0.29, 1.0),
    "apollo": (47.0, 1.916),
    "apollo_mini": (44.0, 1.002),
    "dct_adamw": (22.0, 1.718),
    "fira": (61.0, 2.688),
    "frugal": (38.0, 3.252),
    "galore_adamw": (20.0, 1.328),
    "ldadam": (103.14, 6.482),
    "lora": (0.57, 0.396),
    "low_rank_adamw": (41.0, 2.862),
    "muon": (25.0, 5.536),
    "relora": (0.57, 0.396),
    "scale": (8.0, 0.572),
    "sst": (82.0, 1.586),
    "trion": (35.29, 4.155),
    "welore_adamw": (20.0, 1.328),
}
"""Method -> kernels a matrix, and bytes over fused AdamW's: one layer of llama_1b, rank 512, float32.

Exact: a change of a step that adds or saves a kernel changes its row, and says so here."""


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, object]]:
    names = of_language_models()
    found, refused = step_costs("llama_1b", rank=512, layers=1, dtype="float32", state_dtype=None, names=names)
    assert not refused
    return {row["method"]: row for row in found}


@pytest.mark.parametrize("name", of_language_models())
def test_every_method_keeps_to_its_row(name: str, rows: dict[str, dict[str, object]]) -> None:
    row = rows[name]
    assert (row["kernels_per_matrix"], row["bytes_over_fused_adamw"]) == COUNTS[name]


def test_the_command_writes_its_record(tmp_path: Path) -> None:
    words = [
        "--model",
        "llama_9m",
        "--layers",
        "1",
        "--rank",
        "8",
        "--state-dtype",
        "8bit",
        "--methods",
        "adamw",
        "sst",
    ]
    said = measure([*words, "--methods", "adamw", "sst", "--out", str(tmp_path)])
    assert "not counted: sst, because state_dtype='8bit'" in said
    record = json.loads((tmp_path / "step_cost.json").read_text())
    assert [row["method"] for row in record["rows"]] == ["adamw"]
    assert list(record["rows"][0]["predicted_ms"]) == [gpu.name for gpu in GPUS]
    assert record["launch_seconds"] == LAUNCH
    assert {path.name for path in tmp_path.iterdir()} == {f"step_cost.{kind}" for kind in ("json", "csv", "md", "png")}
    assert "*predicted*" in (tmp_path / "step_cost.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "adamww"], "--methods: unknown optimizer 'adamww'; did you mean 'adamw'?"),
        (["--rank", "0"], "--rank 0; expected a whole number >= 1"),
        (["--model", "llama_2b"], "llama_2b"),
        (["--methods", "sst", "--state-dtype", "8bit"], "sst: state_dtype='8bit'"),
    ],
)
def test_bad_input_is_one_message(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        measure([*words, "--out", str(tmp_path)])
    assert message in str(caught.value)
