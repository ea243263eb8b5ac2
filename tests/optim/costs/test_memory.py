"""Bytes of state: predicted = counted = a formula written down independently."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from lowrank_train import optim
from lowrank_train.optim.low_rank.bases import BASES
from lowrank_train.optim.low_rank.residuals import RESIDUALS
from tests.distributed import run_distributed
from tests.optim.models import (
    LAYER_RANK,
    MixedModel,
    build,
    build_without_weights,
    manifold_of,
    prepare,
    tiny_llama,
    tiny_opt,
)
from tests.tiers import only_first_quick

RANK = 2


class WideModel(nn.Module):
    """Large enough for 8 bits: 128 numbers to a scale, and some left over."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 150)
        self.tall = nn.Linear(140, 200)
        self.wide = nn.Linear(300, 131)
        self.small = nn.Linear(150, 20)
        self.head = nn.Linear(150, 50, bias=False)


# An nn.Linear with one input has min(m, n) = 1, so the mixed model is used with the default rank.
MODELS: list[Any] = [
    pytest.param(tiny_llama, RANK, id="llama"),
    pytest.param(lambda: tiny_llama(tied=True), RANK, id="llama_tied"),
    pytest.param(tiny_opt, RANK, id="opt"),
    pytest.param(lambda: nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 5)), RANK, id="sequential"),
    pytest.param(MixedModel, None, id="mixed"),
    pytest.param(WideModel, None, id="wide"),
]

# ------------------------------------------------------------------------------------------------------- the formulas

COUNTER_BYTES = 4  # a step, or the refreshes skipped
INDEX_BYTES = 4
AGE_BYTES = 4
SEED_BYTES = 8
SCALE_BYTES = 4


class Sizes:
    """Of one matrix, oriented tall: m_local rows of this rank's of m, d columns, r directions; item = bytes of one.

    ``own``: this rank's numbers of the matrix itself.
    """

    def __init__(self, m_local: int, own: int, m: int, d: int, r: int, item: int, dtype: str | None) -> None:
        self.m_local, self.own, self.m, self.d, self.r, self.item, self.dtype = m_local, own, m, d, r, item, dtype
        self.wide_item = max(4, item)

    def moments(self, count: int = 2) -> int:
        """Of m x r numbers."""
        return count * moment_bytes(self.m_local, self.m * self.r, self.r, self.item, self.dtype)


def moment_bytes(rows: int, numbers: int, columns: int, item: int, dtype: str | None) -> int:
    """One moment of which this rank holds some rows of ``columns`` numbers; ``numbers`` in all."""
    if dtype == "8bit" and numbers >= 4096 and columns >= 32:
        return rows * (columns + SCALE_BYTES * math.ceil(columns / 128))
    return rows * columns * {"float32": 4, "bfloat16": 2}.get(str(dtype), item)


BASIS: dict[str, Callable[[Sizes], int]] = {
    **dict.fromkeys(("dct", "dct_l1", "hadamard", "identity", "random_columns"), lambda s: s.r * INDEX_BYTES),
    **dict.fromkeys(("gaussian", "random"), lambda s: SEED_BYTES),
    **dict.fromkeys(("svd", "subspace", "power"), lambda s: s.r * s.d * s.item),
}
RESIDUAL: dict[str, Callable[[Sizes], int]] = {
    **dict.fromkeys(("drop", "normalized", "sign"), lambda s: 0),
    **dict.fromkeys(("apollo", "apollo_mini", "fira", "fira_released"), lambda s: s.wide_item),
    **dict.fromkeys(("error_feedback", "ldadam"), lambda s: s.m_local * s.d * s.item),
    "error_feedback_8bit": lambda s: s.m_local * (s.d + s.wide_item),
}


def low_rank_bytes(basis: str, residual: str) -> Callable[[Sizes], int]:
    """Two moments, an age per direction, two counters, basis and residual."""
    return lambda s: s.moments() + s.r * AGE_BYTES + 2 * COUNTER_BYTES + BASIS[basis](s) + RESIDUAL[residual](s)


def welore_bytes(s: Sizes) -> int:
    """r directions; or all columns, where that takes no more of the whole matrix."""
    few, all_columns = low_rank_bytes("subspace", "drop"), low_rank_bytes("identity", "drop")
    whole = Sizes(s.m, s.m * s.d, s.m, s.d, s.r, s.item, s.dtype)
    if all_columns(Sizes(s.m, s.m * s.d, s.m, s.d, s.d, s.item, s.dtype)) <= few(whole):
        return all_columns(Sizes(s.m_local, s.own, s.m, s.d, s.d, s.item, s.dtype))
    return few(s)


MATRIX: dict[str, Callable[[Sizes], int]] = {
    "apollo": low_rank_bytes("gaussian", "apollo"),
    "apollo_mini": low_rank_bytes("gaussian", "apollo_mini"),
    "dct_adamw": low_rank_bytes("dct", "drop"),
    "fira": low_rank_bytes("subspace", "fira"),
    "frugal": low_rank_bytes("random_columns", "sign"),
    "galore_adamw": low_rank_bytes("subspace", "drop"),
    "ldadam": low_rank_bytes("power", "ldadam"),
    "low_rank_adamw": low_rank_bytes("dct", "normalized"),
    "muon": lambda s: s.own * s.item + COUNTER_BYTES,
    "scale": lambda s: COUNTER_BYTES,
    "trion": lambda s: s.own * s.item + COUNTER_BYTES + s.r * INDEX_BYTES,
    "welore_adamw": welore_bytes,
}
"""Of one matrix. What is not named here has AdamW's state everywhere."""

EMBEDDING: dict[str, Callable[[int, int], int]] = {"scale": lambda numbers, item: COUNTER_BYTES}
HEAD: dict[str, Callable[[int, int], int]] = {"scale": lambda numbers, item: numbers * item + COUNTER_BYTES}
"""From this rank's numbers, where the method itself updates these."""


def spectral_bytes(key: str, shape: Sequence[int], rows: int, item: int, dtype: str | None) -> int | None:
    """Moments in float32 or wider, an age for each row, a clock: of all sigma, and of the vectors in training."""
    factor, columns = key.rpartition(".")[2], math.prod(shape[1:])
    if factor in ("u_frozen", "v_frozen"):
        return 0
    if factor not in ("u_active", "sigma_active", "v_active", "sigma_frozen"):
        return None
    return 2 * rows * columns * max(4, item) + rows * AGE_BYTES + COUNTER_BYTES


def adapter_bytes(key: str, shape: Sequence[int], rows: int, item: int, dtype: str | None) -> int | None:
    """AdamW's state of A and B, and a clock."""
    if key.endswith("base_layer.weight"):
        return 0
    return 2 * rows * math.prod(shape[1:]) * item + 2 * COUNTER_BYTES if ".lora_" in key else None


def point_bytes(key: str, shape: Sequence[int], rows: int, item: int, dtype: str | None) -> int | None:
    """The first moment, in as many numbers as a tangent vector has; one more for a point; a step count."""
    if "head" in key or "embed" in key or len(shape) < 2 or min(shape) < RANK:
        return None
    wide = max(4, item)
    columns = shape[1] - (manifold_of(shape)[0] == "lorentz")
    return moment_bytes(rows, shape[0] * columns, columns, wide, dtype) + rows * wide + COUNTER_BYTES


LAYERS: dict[str, Callable[[str, Sequence[int], int, int, str | None], int | None]] = {
    "relora": adapter_bytes,
    "riemannian_adamw": point_bytes,
    "sst": spectral_bytes,
}
"""Of a parameter of converted layers, by name and shape: bytes from this rank's rows of it; None for others."""


def takes(name: str, argument: str) -> bool:
    return argument in inspect.signature(optim.find(name)).parameters


def arguments_of(name: str, rank: int | None) -> dict[str, Any]:
    return {"rank": rank} if rank is not None and takes(name, "rank") else {}


def role(key: str, param: Tensor) -> str:
    if "embed" in key:
        return "embedding"
    if "head" in key:
        return "head"
    return "matrix" if param.ndim == 2 else "vector"


def expected_bytes(
    name: str,
    model: nn.Module,
    rank: int | None,
    world_size: int = 1,
    shard: int = 0,
    state_dtype: str | None = None,
    matrix: Callable[[Sizes], int] | None = None,
) -> int:
    """The closed formula, with torch.chunk's share of an uneven dimension: ceil(size / world_size) for the first."""

    def share(size: int) -> int:
        step = math.ceil(size / world_size)
        return min(step, max(0, size - shard * step))

    matrix = matrix or MATRIX.get(name)
    total = 0
    for key, param in model.named_parameters():
        item, kind = param.element_size(), role(key, param)
        columns = math.prod(param.shape[1:])
        of_layer = LAYERS[name](key, param.shape, share(param.shape[0]), item, state_dtype) if name in LAYERS else None
        if of_layer is not None:
            total += of_layer
            continue
        numbers = share(param.shape[0]) * columns
        if kind == "matrix" and matrix is not None:
            m, d = max(param.shape), min(param.shape)
            # The larger dimension is sharded; but FSDP2 wants the second to be divisible.
            by_columns = param.shape[0] < columns and columns % world_size == 0
            own = param.shape[0] * share(columns) if by_columns else numbers
            default = 1 if name == "apollo_mini" else max(1, d // 4)
            total += matrix(Sizes(share(m), own, m, d, rank or default, item, state_dtype))
        elif kind in ("embedding", "head") and name in EMBEDDING:
            total += (EMBEDDING if kind == "embedding" else HEAD)[name](numbers, item)
        elif param.ndim == 2:
            total += 2 * moment_bytes(share(param.shape[0]), param.numel(), columns, item, state_dtype) + COUNTER_BYTES
        else:
            total += 2 * moment_bytes(share(param.shape[0]), 0, columns, item, state_dtype) + COUNTER_BYTES
    return total


def test_every_registered_optimizer_and_part_has_a_formula() -> None:
    assert sorted([*MATRIX, *LAYERS, "adamw"]) == optim.names()
    assert set(LAYERS) == {name for name in optim.names() if optim.find(name).layers is not None}
    assert set(BASIS) == set(BASES)
    assert set(RESIDUAL) == set(RESIDUALS)


# ---------------------------------------------------------------------------------------------------------- one process


def state_dtypes(name: str) -> list[str | None]:
    return [None, "float32", "bfloat16", "8bit"] if takes(name, "state_dtype") else [None]


# Of the other models no matrix is large enough for 8 bits.
COMBINATIONS = [
    pytest.param(name, state_dtype, *model.values, id=f"{model.id}-{name}-{state_dtype}")
    for model in MODELS
    for name in optim.names()
    for state_dtype in (state_dtypes(name) if model.id in ("mixed", "wide") else [None])
]


@pytest.mark.parametrize(("name", "state_dtype", "make", "rank"), COMBINATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_predicted_equals_counted_equals_formula(
    name: str, state_dtype: str | None, make: Callable[[], nn.Module], rank: int | None, dtype: torch.dtype
) -> None:
    layer_rank = rank or LAYER_RANK
    model = prepare(name, make().to(dtype), rank=layer_rank)
    arguments = arguments_of(name, rank)
    if state_dtype is not None:
        arguments["state_dtype"] = state_dtype
    counted = optim.state_bytes(build_without_weights(name, model, **arguments))
    assert counted == optim.predicted_state_bytes(name, model, **arguments)
    assert counted == expected_bytes(name, model, rank, state_dtype=state_dtype)
    with torch.device("meta"):
        weightless = prepare(name, make().to(dtype), rank=layer_rank)
    assert optim.predicted_state_bytes(name, weightless, **arguments) == counted


@pytest.mark.parametrize(
    ("basis", "residual"), [*((basis, "drop") for basis in BASES), *(("dct", residual) for residual in RESIDUALS)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_formula_of_every_part(basis: str, residual: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 13), nn.Linear(13, 16)).to(dtype)
    if basis == "hadamard":
        model = nn.Sequential(nn.Linear(8, 13), nn.Linear(12, 16)).to(dtype)
    arguments = {"rank": 3, "basis": basis, "residual": residual, "moments": "keep"}
    counted = optim.state_bytes(build("low_rank_adamw", model, **arguments))
    assert counted == optim.predicted_state_bytes("low_rank_adamw", model, **arguments)
    assert counted == expected_bytes("low_rank_adamw", model, 3, matrix=low_rank_bytes(basis, residual))


def test_what_8_bits_save() -> None:
    """A quarter of float32, and a scale for 128 numbers."""
    model = nn.Linear(512, 1024, bias=False)
    whole, coded = (optim.predicted_state_bytes("adamw", model, state_dtype=d) - COUNTER_BYTES for d in (None, "8bit"))
    assert coded / whole == (1 + 4 / 128) / 4


@pytest.mark.parametrize("frozen_dtype", ["bfloat16", "8bit"])
def test_the_storage_of_frozen_vectors_is_the_models_and_not_the_optimizers(frozen_dtype: str) -> None:
    model, plain = prepare("sst", MixedModel(), frozen_dtype=frozen_dtype), prepare("sst", MixedModel())
    counted = optim.state_bytes(build("sst", model))
    assert counted == optim.predicted_state_bytes("sst", model) == optim.state_bytes(build("sst", plain))


def test_state_bytes_counts_torch_optimizers_too() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    assert optim.state_bytes(optimizer) == 0
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    assert optim.state_bytes(optimizer) == 2 * (12 + 3) * 4 + 2 * 4


def test_prediction_reports_arguments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="rank=1000 exceeds"):
        optim.predicted_state_bytes("dct_adamw", MixedModel(), rank=1000)
    with pytest.raises(ValueError, match="takes no argument 'rnk'"):
        optim.predicted_state_bytes("dct_adamw", MixedModel(), rnk=1)


# ------------------------------------------------------------------------------------------------------------ sharded


def sharded_models() -> dict[str, tuple[Callable[[], nn.Module], int | None, str | None]]:
    return {
        "llama": (tiny_llama, RANK, None),
        "mixed": (MixedModel, None, None),
        "8bit": (WideModel, None, "8bit"),
        "bfloat16": (MixedModel, None, "bfloat16"),
    }


def cases() -> list[tuple[str, str]]:
    return [
        (name, label)
        for name in optim.names()
        for label, (_, _, dtype) in sharded_models().items()
        if dtype is None or takes(name, "state_dtype")
    ]


def new_sharded_model(name: str, label: str) -> nn.Module:
    make, rank, _ = sharded_models()[label]
    return prepare(name, make(), rank=rank or LAYER_RANK)


def arguments_of_case(name: str, label: str) -> dict[str, Any]:
    _, rank, state_dtype = sharded_models()[label]
    return {**arguments_of(name, rank), **({} if state_dtype is None else {"state_dtype": state_dtype})}


def sharded_bytes() -> dict[tuple[str, str], int]:
    """Counted on this rank, by optimizer and model."""
    world_size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world_size,))
    counted = {}
    for name, label in cases():
        model = new_sharded_model(name, label)
        roles = {param: group["role"] for group in optim.param_groups(model) for _, param in group["params"]}
        cls = optim.find(name)
        fully_shard(
            model,
            mesh=mesh,
            shard_placement_fn=lambda p, cls=cls, roles=roles: Shard(cls.shard_dim(roles[p], p.shape, world_size)),
        )
        counted[name, label] = optim.state_bytes(build_without_weights(name, model, **arguments_of_case(name, label)))
    return counted


def predicted_is_counted(by_rank: list[dict[tuple[str, str], int]]) -> None:
    world_size = len(by_rank)
    for name, label in cases():
        _, rank, state_dtype = sharded_models()[label]
        model = new_sharded_model(name, label)
        for shard, counted in enumerate(by_rank):
            predicted = optim.predicted_state_bytes(
                name, model, world_size=world_size, shard=shard, **arguments_of_case(name, label)
            )
            assert counted[name, label] == predicted, (shard, name, label)
            expected = expected_bytes(name, model, rank, world_size, shard, state_dtype)
            assert predicted == expected, (shard, name, label)


@pytest.mark.parametrize("world_size", only_first_quick([2, 3]))
def test_each_rank_holds_what_is_predicted_for_it(world_size: int) -> None:
    by_rank = run_distributed(sharded_bytes, world_size)
    predicted_is_counted(by_rank)
    assert by_rank[0] != by_rank[-1], "sizes must be uneven, or the test could not tell the shards apart"
