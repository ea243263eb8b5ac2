"""What an optimizer's step needs beyond its state: blocks of rows, bases, decompositions. From shapes and settings.

m x d a matrix, m >= d; this rank has m_l of its rows; r its rank; e bytes of the arithmetic, float32 or wider; b rows
of a block (``optim.shards.blocks``). What a solver of torch.linalg uses inside is counted as ``SOLVER`` times its
input: a guess, the only one here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_train import optim
from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.core.working_copies import AT_ONCE as COPIED_AT_ONCE
from lowrank_train.optim.core.working_copies import is_copied
from lowrank_train.optim.low_rank.bases import find_basis
from lowrank_train.optim.low_rank.engine import LowRankOptimizer
from lowrank_train.optim.low_rank.residuals import find_residual
from lowrank_train.optim.low_rank.settings import resolved_rank
from lowrank_train.optim.orthogonalize import CHUNK_NUMBERS
from lowrank_train.optim.parameters.slot import COUNTER, Slot
from lowrank_train.optim.shards.blocks import chunks, row_blocks
from lowrank_train.optim.shards.layout import StateTensor, local_shape, matrix_shape
from lowrank_train.optim.storage.int8_weight import Int8Weight
from lowrank_train.optim.storage.quantization import MOMENTS

__all__ = ["Workspace", "re_svd_bytes", "update_workspace"]

SOLVER = 2

_COORDINATES_AT_ONCE = 2**24
"""As in ``optim.low_rank.engine``: coordinates of the matrices whose sums are made together."""


@dataclass(frozen=True)
class Workspace:
    """Bytes."""

    step: int
    """At every step."""
    refresh: int
    """At one that chooses new directions, of an update of its own after them: the larger of the two."""
    kept: int
    """Between steps, and not in the optimizer's state: drawn directions, the matrix of the cosine transform."""


@dataclass(frozen=True)
class _Matrix:
    """One matrix on this rank."""

    m: int
    d: int
    r: int
    rows: int
    """m_l."""
    e: int
    group: dict[str, Any]
    turned: bool
    """Sharded along its projected dimension, so that it travels before and after."""
    name: str
    narrow: bool
    """Its gradient is in fewer bytes than the arithmetic, and converted."""
    widened: bool
    """The weight itself is converted too, block by block: no copy in float32 stands for it."""

    @property
    def block(self) -> int:
        """Numbers in a block of rows, b d."""
        rows = row_blocks(self.rows, self.d, torch.device("meta"))  # any kind but the CPU: large blocks
        return max((part.stop - part.start for part in rows), default=0) * self.d


@dataclass(frozen=True)
class _Update:
    """Parameters of one optimizer that are updated together."""

    matrices: list[_Matrix]
    slots: list[Slot]
    optimizer: MatrixOptimizer
    world_size: int
    on_cpu: bool


def update_workspace(
    optimizer: MatrixOptimizer,
    *,
    world_size: int = 1,
    shard: int = 0,
    on_cpu: bool = False,
    one_at_a_time: bool = False,
    among: Collection[Tensor] | None = None,
) -> Workspace:
    """Of any of our optimizers.

    Args:
        optimizer: of a model on meta, never sharded: only shapes and settings are read.
        world_size: ranks a parameter is sharded over.
        shard: which of them.
        on_cpu: smaller blocks, and cosine transforms by FFT.
        one_at_a_time: parameters are updated singly, as their gradients come.
        among: parameters whose updates count; None: all.
    """
    together: list[list[Slot]] = []
    slots = [slot for slot in optimizer.slots() if slot.group["role"] != "frozen"]
    if among is not None:
        slots = [slot for slot in slots if slot.param in among]
    if one_at_a_time:
        together = [[slot] for slot in slots]
    else:
        plain = [slot for slot in slots if not is_copied(slot, optimizer.update_of(slot.group).promotes(slot))]
        copied = [slot for slot in slots if is_copied(slot, optimizer.update_of(slot.group).promotes(slot))]
        sizes = [slot.param.numel() // world_size for slot in copied]
        together = [plain, *chunks(copied, sizes, COPIED_AT_ONCE)]
    found = [_workspace(optimizer, members, world_size, shard, on_cpu) for members in together if members]
    step, refresh = (max((getattr(part, phase) for part in found), default=0) for phase in ("step", "refresh"))
    return Workspace(step, refresh, _workspace(optimizer, slots, world_size, shard, on_cpu).kept)


def _workspace(optimizer: MatrixOptimizer, slots: list[Slot], world_size: int, shard: int, on_cpu: bool) -> Workspace:
    """Of parameters that are updated together."""
    matrices = list(_matrices(optimizer, slots, world_size, shard))
    element_wise = _adamw(optimizer, slots, world_size, shard, on_cpu)
    copies = sum(_copy_bytes(optimizer, slot, world_size, shard) for slot in slots)
    found = Workspace(0, 0, 0)  # element by element, in place
    if matrices:
        own = next((of for cls, of in _METHODS.items() if isinstance(optimizer, cls)), None)
        found = found if own is None else own(_Update(matrices, slots, optimizer, world_size, on_cpu))
    storing = max((_storing(optimizer, slot, world_size, on_cpu) for slot in slots), default=0)
    step = max(found.step + _widened(matrices, on_cpu), element_wise, storing)
    return Workspace(copies + step, copies + max(found.refresh, step), found.kept)


def _widened(matrices: Sequence[_Matrix], on_cpu: bool) -> int:
    """Rows of a weight in the arithmetic's type, to add an update to (``optim.core.weight_update``)."""
    largest = 0
    for x in matrices:
        blocks = row_blocks(x.rows, x.d, torch.device("cpu" if on_cpu else "meta")) if x.widened else []
        largest = max(largest, x.e * x.d * max((part.stop - part.start for part in blocks), default=0))
    return largest


def _storing(optimizer: MatrixOptimizer, slot: Slot, world_size: int, on_cpu: bool) -> int:
    """To round a block of a copy: noise, its magnitudes and what is finite, or what is chosen, and that in bfloat16.

    In int8 the numbers in units of their scale too, the nearest codes, which of them are exact; of half a block.
    """
    if not optimizer.update_of(slot.group).promotes(slot).rounded:
        return 0
    in_int8 = isinstance(slot.param, Int8Weight)
    width = math.prod(slot.param.shape[1:])
    rows = row_blocks(slot.param.shape[0] // world_size, width, torch.device("cpu" if on_cpu else "meta"))
    return (11 if not in_int8 else 21 // 2) * width * max((part.stop - part.start for part in rows), default=0)


def _copy_bytes(optimizer: MatrixOptimizer, slot: Slot, world_size: int, shard: int) -> int:
    """What a step works on in place of a parameter and its state (``optim.core.working_copies``)."""
    promotion = optimizer.update_of(slot.group).promotes(slot)
    if not is_copied(slot, promotion):
        return 0
    dim = optimizer.shard_dim(slot.group["role"], slot.param.shape, world_size)
    exact = torch.promote_types(slot.param.dtype, torch.float32).itemsize
    stored = optimizer.state_layout(slot.name, slot.param, slot.group)
    plain = optimizer.state_layout(slot.name, slot.param, {**slot.group, "state_dtype": None})
    total = 0
    for key, spec in stored.items():
        converts = key in MOMENTS and (promotion.moments or (promotion.rounded and spec.dtype == torch.bfloat16))
        if converts:
            total += math.prod(local_shape(plain[key], dim, shard, world_size)) * exact
        elif slot.group["offload_state"] and spec.layout != "host":
            total += math.prod(local_shape(spec, dim, shard, world_size)) * spec.dtype.itemsize
    if promotion.rounded:
        weight = StateTensor(tuple(slot.param.shape), torch.bfloat16, "parameter")
        total += math.prod(local_shape(weight, dim, shard, world_size)) * exact
    return total


def _matrices(optimizer: MatrixOptimizer, slots: Sequence[Slot], world_size: int, shard: int) -> Iterable[_Matrix]:
    for slot in slots:
        role, shape = slot.group["role"], tuple(slot.param.shape)
        if role not in optimizer.updates or len(shape) < 2:
            continue
        d, m = sorted(matrix_shape(shape))
        r = resolved_rank(slot.name, shape, slot.group["rank"]) if "rank" in slot.group else d
        dim = optimizer.shard_dim(role, shape, world_size)
        spec = StateTensor((m, d), slot.param.dtype, "rows")
        rows = local_shape(spec, 0, shard, world_size)[0]
        turned = world_size > 1 and dim != 1 - (1 if shape[0] >= math.prod(shape[1:]) else 0)
        exact = torch.promote_types(slot.param.dtype, torch.float32).itemsize
        narrow = slot.param.dtype.itemsize < exact
        widened = narrow and not optimizer.update_of(slot.group).promotes(slot).rounded
        yield _Matrix(m, d, r, rows, exact, slot.group, turned, slot.name, narrow, widened)


def _adamw(optimizer: MatrixOptimizer, slots: Sequence[Slot], world_size: int, shard: int, on_cpu: bool) -> int:
    """AdamW is fused and in place, unless something has another type: that is converted in blocks of rows."""
    largest = 0
    for slot in slots:
        state_dtype, shape = slot.group["state_dtype"], tuple(slot.param.shape)
        if len(shape) < 2 or not optimizer.update_of(slot.group).is_element_wise:
            continue
        rounded = COUNTER in slot.state
        if not rounded and slot.state["exp_avg"].dtype == slot.param.dtype:
            continue
        rows = local_shape(StateTensor(shape, slot.param.dtype, "parameter"), 0, shard, world_size)[0]
        width = math.prod(shape[1:])
        blocks = row_blocks(rows, width, torch.device("cpu" if on_cpu else "meta"))
        numbers = max((part.stop - part.start for part in blocks), default=0) * width
        # both moments in float32; in 8 bits also: numbers in units of their scale, their roots, what to store, its sign
        # both moments in float32, the weight too if it is not; and the most of: its gradient likewise; to store 8 bits
        # the numbers in units of their scale, their roots, codes, signs; to round the noise, half of it shifted or what
        # is finite, what is chosen, and that in bfloat16
        widened = 4 if slot.param.dtype == torch.bfloat16 else 0
        coded = {"8bit": 3 * 4 + 1, "4bit": 2 * 4}.get(str(state_dtype), 0)
        largest = max(largest, numbers * (2 * 4 + widened + max(widened, coded, 11 if rounded else 0)))
    return largest


def _low_rank(update: _Update) -> Workspace:
    matrices, on_cpu = update.matrices, update.on_cpu
    group = matrices[0].group
    basis, residual = find_basis(group["basis"]), find_residual(group["residual"])
    e = matrices[0].e
    # gradients and updates of matrices that travel: both stay until the step ends
    travelling = sum(2 * x.e * x.rows * x.d for x in matrices if x.turned)
    travelling += max((x.e * x.rows * x.d for x in matrices if x.turned), default=0)  # as sent
    kept = _kept_between(matrices, on_cpu)

    per_block = max(_block_step(x, on_cpu) for x in matrices)
    step = travelling + per_block
    if residual.sums:  # coordinates and updates of all blocks wait for the sum
        waiting = [[x.rows * x.r for x in part] for part in _chunked(matrices, _COORDINATES_AT_ONCE)]
        step += max(2 * e * sum(part) for part in waiting)

    # LDAdam: moments and directions as they were, of every matrix, until the step ends
    before = sum(e * (x.rows * x.r + x.r * x.d) for x in matrices) if residual.tracks_momentum else 0
    step += before

    # target: mixed with the lifted mean; of a gradient that is converted
    whole = max(x.e * x.rows * x.d * ((2 if group["rho"] else 0) + x.narrow) for x in matrices)
    if type(residual).__name__ == "ErrorFeedback":
        whole = max(whole, max(x.e * x.rows * x.d for x in matrices))  # G + E
    carried = 0
    if group["moments"] != "keep":
        copies = 6 if basis.owner_computed or type(basis).__name__ == "RandomVectors" else 3  # rotated; or by index
        carried = max(copies * x.e * x.rows * x.r for x in matrices)
    kind = type(basis).__name__
    if kind == "ExactSVD":
        # of every matrix the new directions; of one: Gram matrix, eigenvectors twice, a block, the solver, all float64
        everything = sum(x.e * x.r * x.d for x in matrices)
        choice = everything + max((3 + SOLVER) * 8 * x.d * x.d + 8 * x.r * x.d for x in matrices)
    elif kind == "SubspaceIteration":
        # of every matrix the directions of this round and of the last
        rounds = basis.rounds(1)
        everything = sum(x.e * x.r * x.d for x in matrices) * (2 if rounds > 1 else 1)
        everything = max(everything, 2 * sum(x.e * x.r * x.d for x in matrices))  # the first choice has six rounds
        # of one: G Q, Y, Q, R, signs and their product, contiguous; and the solver
        one = max(x.e * (x.rows * x.r + (4 + SOLVER) * x.r * x.d + x.r * x.r) for x in matrices)
        choice = everything + one
    elif kind == "ColumnBasis":
        choice = max(_energies(x, on_cpu) for x in matrices)
    else:  # random: a sum of squares, and the draw
        choice = max(x.e * x.rows * x.d for x in matrices)
    refresh = travelling // 2 + max(choice + whole, carried) + before
    return Workspace(step, refresh, kept)


def _block_step(x: _Matrix, on_cpu: bool) -> int:
    """Directions made ready, and one block of rows through Adam and the residual."""
    rows = row_blocks(x.rows, x.d, torch.device("cpu" if on_cpu else "meta"))
    b = max((part.stop - part.start for part in rows), default=0)
    wide, narrow = x.e * b * x.d, x.e * b * x.r
    directions = _vectors(x, on_cpu)
    needed = 4 * narrow + wide * x.narrow  # coordinates, roots, update, its scaled copy
    if _is_fourier(x, on_cpu):
        needed += 3 * wide  # permuted rows, spectrum; lifted rows, permuted back
    if x.group.get("state_dtype"):
        needed += 6 * narrow  # moments converted, and stored again
    residual = x.group["residual"]
    needed += {"drop": 0, "sign": 2, "normalized": 1, "apollo": 1, "apollo_mini": 1}.get(residual, 2) * wide
    return directions + needed


def _vectors(x: _Matrix, on_cpu: bool) -> int:
    """Chosen rows of the matrix of the cosine transform, ready to multiply."""
    named = x.group["basis"].startswith(("dct", "hadamard"))
    return x.e * x.r * x.d if named and not _is_fourier(x, on_cpu) else 0


def _is_fourier(x: _Matrix, on_cpu: bool) -> bool:
    return on_cpu and x.group["basis"].startswith("dct") and x.r >= 96


def _energies(x: _Matrix, on_cpu: bool) -> int:
    """Of all columns: a copy of the transform's matrix, coordinates of a block. It is made once, in float64."""
    if not x.group["basis"].startswith("dct"):
        return x.e * x.rows * x.d
    rows = row_blocks(x.rows, x.d, torch.device("cpu" if on_cpu else "meta"))
    b = max((part.stop - part.start for part in rows), default=0)
    if on_cpu:
        return 4 * x.e * b * x.d
    made = 3 * 8 * x.d * x.d  # angles, and the next two of the chain of operations
    return max(made, x.e * (x.d * x.d + b * x.d))


def _kept_between(matrices: Sequence[_Matrix], on_cpu: bool) -> int:
    """One copy for matrices of the same sizes."""
    basis = matrices[0].group["basis"]
    if basis in ("gaussian", "random"):
        return sum(e * d * r for d, r, e in {(x.d, x.r, x.e) for x in matrices})
    if basis.startswith("dct"):
        return sum(e * d * d for d, e in {(x.d, x.e) for x in matrices if not (on_cpu and x.r >= 96)})
    return 0


def _trion(update: _Update) -> Workspace:
    matrices, on_cpu = update.matrices, update.on_cpu
    together = 0
    for part in _chunked(matrices, CHUNK_NUMBERS):
        coordinates = sum(x.e * x.rows * x.r for x in part)
        vectors = sum(_vectors(x, on_cpu) for x in part)
        grams = sum(x.e * x.r * x.r for x in part)
        # b and its orthogonalized twin; A, A^2, P, p and a product of them; one update scaled
        orthogonal = vectors + 2 * coordinates + 6 * grams + max(x.e * x.rows * x.r for x in part)
        together = max(together, orthogonal)
    return Workspace(max(together, max(_energies(x, on_cpu) for x in matrices)), 0, _kept_between(matrices, on_cpu))


def _muon(update: _Update) -> Workspace:
    matrices = update.matrices
    together = 0
    for part in chunks(list(matrices), [x.rows * x.d for x in matrices], CHUNK_NUMBERS):
        numbers, largest = sum(x.rows * x.d for x in part), max(x.m * x.d for x in part)
        # X, its copy in bfloat16 and the result; of one whole matrix two iterates and, three times, Y^T Y
        together = max(together, numbers * (part[0].e + 2 + 2) + 2 * (2 * largest + 3 * max(x.d for x in part) ** 2))
    return Workspace(together, 0, 0)


def _relora(update: _Update) -> Workspace:
    largest = max(matrix.rows * matrix.d for matrix in update.matrices)
    return Workspace(0, 4 * max(largest, _frozen(update.optimizer, update.world_size)), 0)  # W + B A in float32


def _scale(update: _Update) -> Workspace:
    """Where the head's average has another type than its gradient, that in float32."""
    heads = [slot.param.numel() for slot in update.slots if slot.group["role"] == "head"]
    rounded = any(COUNTER in slot.state for slot in update.slots)
    return Workspace(max(heads, default=0) // update.world_size * 4 * rounded, 0, 0)


def _sst(update: _Update) -> Workspace:
    vectors = [x for x in update.matrices if x.group["role"] == "singular_vectors"]
    largest = max(4 * x.rows * x.d for x in vectors)
    return Workspace(3 * largest, 0, 0)  # Adam's direction, its denominator, the direction scaled


def _chunked(matrices: Sequence[_Matrix], at_most: int) -> Iterable[list[_Matrix]]:
    return chunks(list(matrices), [x.m * x.r for x in matrices], at_most)


def _frozen(optimizer: MatrixOptimizer, world_size: int) -> int:
    sizes = [slot.param.numel() // world_size for slot in optimizer.slots() if slot.group["role"] == "frozen"]
    return max(sizes, default=0)


def re_svd_bytes(out: int, width: int) -> int:
    """Of one spectral layer (``optim.linalg.decompose``), W (out, in) on its owner, float64."""
    s, long = sorted((out, width))
    # W, sums of its parts in float32; eigenvectors twice, the Gram matrix; images, sorted and signed pairs
    return 4 * 2 * s * long + 8 * (s * long + (4 + SOLVER) * s * s + 4 * s * long)


_METHODS: dict[type[MatrixOptimizer], Callable[[_Update], Workspace]] = {
    LowRankOptimizer: _low_rank,
    optim.Muon: _muon,
    optim.ReLoRA: _relora,
    optim.SCALE: _scale,
    optim.SST: _sst,
    optim.Trion: _trion,
}
"""What an update of matrices needs; a method that is not here works element by element, in place."""
