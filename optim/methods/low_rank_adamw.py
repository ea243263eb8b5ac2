"""The published low-rank methods, each a row of choices for the engine, and the open form ``LowRankAdamW``."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.low_rank.engine import LowRankOptimizer

__all__ = ["APOLLO", "FRUGAL", "APOLLOMini", "DCTAdamW", "Fira", "GaLoreAdamW", "LDAdam", "LowRankAdamW"]


class LowRankAdamW(LowRankOptimizer):
    """Adam in a low-rank basis, every part of it chosen by name: for experiments, and for the best combination found.

    Source: the equations of ``optim.low_rank.engine``.

    Args:
        params: groups from ``optim.param_groups(model)``, before or after ``fully_shard``.
        lr: learning rate, a step of about ``lr`` per coordinate; float or tensor.
        rank: directions kept per matrix, 1 .. min(m, n); None keeps a quarter of them (at least 1).
        basis: how they are chosen, a name of ``optim.low_rank.bases.BASES``.
        residual: what becomes of the rest of the gradient, a name of ``optim.low_rank.residuals.RESIDUALS``.
        moments: what becomes of Adam's moments when directions change: keep, reset or rotate.
        refresh_interval: steps between two choices of directions.
        scale: factor of the part inside the directions.
        residual_scale: factor of the part outside, where the treatment has one (sign, normalized).
        seed: of the random bases.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, per unit of ``lr``.
        state_dtype: of the moments, those of embeddings and head included: None (the parameter's), "float32",
            "bfloat16" or "8bit".

    Raises:
        ValueError: at construction, for groups without roles, unknown names, parts that do not go together, and a rank
            or basis that does not fit a matrix (named).

    State of an m x n matrix, m >= n: 2 m r elements, 4 r bytes of ages, 8 bytes of counters, basis and residual.
    """

    source = "this project"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = None,
        basis: str = "dct",
        residual: str = "normalized",
        moments: str = "rotate",
        refresh_interval: int = 100,
        scale: float = 1.0,
        residual_scale: float = 1.0,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_dtype: str | None = None,
    ) -> None:
        parts = {"basis": basis, "residual": residual, "moments": moments, "refresh_interval": refresh_interval}
        scales = {"lr": lr, "rank": rank, "scale": scale, "residual_scale": residual_scale, "seed": seed}
        adam = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype}
        super().__init__(params, {**parts, **scales, **adam})


class DCTAdamW(LowRankOptimizer):
    """AdamW whose moments live on r columns of the discrete cosine transform; the projector costs r integers.

    Source: Modoranu et al. (arXiv 2505.17967), DCT-AdamW. See ``optim.low_rank.bases`` for the bases and how they
    differ.

    Args:
        params: groups from ``optim.param_groups(model)``, before or after ``fully_shard``.
        lr: learning rate, a step of about ``lr`` per coordinate; float or tensor.
        rank: directions kept per matrix, 1 .. min(m, n); None keeps a quarter of them (at least 1).
        refresh_interval: steps between two choices of columns.
        basis: dct; dct_l1, for comparison, ranks the columns as the released code.
        residual: drop, or error_feedback or error_feedback_8bit, the paper's option.
        moments: rotate (by index, exact), keep or reset.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, per unit of ``lr``.
        state_dtype: of the moments: None (the parameter's), "float32", "bfloat16" or "8bit".

    Raises:
        ValueError: at construction, for groups without roles and for a rank that does not fit a matrix (named).

    State of an m x n matrix, m >= n: 2 m r elements in the parameter's dtype, 8 r bytes of integers, two counters.
    Communication when sharded: one all-reduce of sum(min(m, n)) numbers per refresh; nothing at other steps.

    We differ from the paper's code: ``refresh_interval`` defaults to 100, not 1, because a column that enters starts
    from nothing (measured on a small LLaMA: docs/quickstart.md); moments follow their columns exactly, where it
    multiplies them by a matrix in place, or by default not at all; bias correction is per column; columns are ranked by
    l2; no error feedback unless asked, and then with all 256 levels; more than two dimensions are not skipped.
    """

    source = "Modoranu et al., arXiv 2505.17967"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = None,
        refresh_interval: int = 100,
        basis: str = "dct",
        residual: str = "drop",
        moments: str = "rotate",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_dtype: str | None = None,
    ) -> None:
        parts = {"basis": basis, "residual": residual, "moments": moments, "refresh_interval": refresh_interval}
        adam = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype}
        super().__init__(params, {"lr": lr, "rank": rank, **parts, **adam})


class GaLoreAdamW(LowRankOptimizer):
    """AdamW on the projection of the gradient onto its leading singular vectors; the rest is dropped.

    Source: Zhao et al. (arXiv 2403.03507), Algorithm 2.

    Args:
        params: groups from ``optim.param_groups(model)``, before or after ``fully_shard``.
        lr: learning rate of everything; matrices move by ``lr * scale``.
        rank: directions kept per matrix, 1 .. min(m, n); None keeps a quarter of them, as the paper does up to 1B.
        refresh_interval: steps between two choices of directions (the paper's T).
        scale: the paper's alpha.
        basis: subspace (two rounds of subspace iteration from the old directions) or svd (exact).
        moments: keep (the paper), reset or rotate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, per unit of ``lr``.
        state_dtype: of the moments: None (the parameter's), "float32", "bfloat16" or "8bit".

    Raises:
        ValueError: at construction, for groups without roles and for a rank that does not fit a matrix (named).

    State of an m x n matrix, m >= n: 2 m r + n r elements in the parameter's dtype.
    Communication when sharded: n r numbers summed and n r broadcast per round of a refresh (svd: n^2 summed).

    We differ: directions by subspace iteration unless ``basis="svd"``; one orientation rule, also where rank equals a
    dimension; rank above min(m, n) is an error, not a silent clamp; weight decay comes first, as torch's.
    """

    source = "Zhao et al., arXiv 2403.03507"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        rank: int | None = None,
        refresh_interval: int = 200,
        scale: float = 0.25,
        basis: str = "subspace",
        moments: str = "keep",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
    ) -> None:
        parts = {"basis": basis, "residual": "drop", "moments": moments, "refresh_interval": refresh_interval}
        adam = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype}
        super().__init__(params, {"lr": lr, "rank": rank, "scale": scale, **parts, **adam})


class Fira(LowRankOptimizer):
    """GaLore, and the rest of the gradient scaled row by row as Adam scaled the projection, with a limit on its growth.

    Source: Chen et al. (arXiv 2410.01623), Algorithm 1.

    Args:
        params: groups from ``optim.param_groups(model)``, before or after ``fully_shard``.
        lr: learning rate of everything.
        rank: directions kept per matrix, 1 .. min(m, n); None keeps a quarter of them.
        refresh_interval: steps between two choices of directions.
        scale: the paper's alpha, of the part inside the directions.
        basis: subspace or svd, as for GaLore, or any orthonormal one.
        residual: fira (the paper); fira_released, for comparison, removes only ``scale`` of the inside from the rest,
            as the released code.
        moments: keep (the paper), reset or rotate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, per unit of ``lr``.
        state_dtype: of the moments: None (the parameter's), "float32", "bfloat16" or "8bit".

    Raises:
        ValueError: at construction, for groups without roles and for a rank that does not fit a matrix (named).

    State of an m x n matrix, m >= n: 2 m r + n r elements in the parameter's dtype and one norm.
    Communication when sharded: as GaLore, and one number per matrix at every step.
    """

    source = "Chen et al., arXiv 2410.01623"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        rank: int | None = None,
        refresh_interval: int = 200,
        scale: float = 0.25,
        basis: str = "subspace",
        residual: str = "fira",
        moments: str = "keep",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
    ) -> None:
        parts = {"basis": basis, "residual": residual, "moments": moments, "refresh_interval": refresh_interval}
        adam = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype}
        super().__init__(params, {"lr": lr, "rank": rank, "scale": scale, **parts, **adam})


class FRUGAL(LowRankOptimizer):
    """AdamW on a random quarter of the columns of every matrix, the sign of the gradient on the others.

    Source: Zmushko et al. (arXiv 2411.07837), column-wise splitting.

    Args:
        params: groups from ``optim.param_groups(model)``, before or after ``fully_shard``.
        lr: learning rate of everything.
        rank: columns with Adam state per matrix, 1 .. min(m, n); None keeps a quarter (the paper's density 0.25).
        refresh_interval: steps between two draws of columns.
        basis: random_columns, or random, svd, subspace, as the paper compares.
        residual_scale: of the sign part: 1 for pretraining, 0.1 for fine-tuning in the paper.
        seed: of the draws.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, per unit of ``lr``.
        state_dtype: of the moments: None (the parameter's), "float32", "bfloat16" or "8bit".

    Raises:
        ValueError: at construction, for groups without roles and for a rank that does not fit a matrix (named).

    State of an m x n matrix, m >= n: 2 m r elements in the parameter's dtype, 8 r bytes of integers.
    Communication when sharded: one number per matrix at a refresh.

    We differ: the density is spent on columns of every matrix, not on a drawn set of whole matrices, so that state does
    not move between parameters.
    """

    source = "Zmushko et al., arXiv 2411.07837"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = None,
        refresh_interval: int = 200,
        basis: str = "random_columns",
        residual_scale: float = 1.0,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
    ) -> None:
        parts = {"basis": basis, "residual": "sign", "moments": "reset", "refresh_interval": refresh_interval}
        scales = {"lr": lr, "rank": rank, "residual_scale": residual_scale, "seed": seed}
        adam = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype}
        super().__init__(params, {**scales, **parts, **adam})


class APOLLO(LowRankOptimizer):
    """The gradient itself, each row scaled as Adam scales its random projection: full-rank steps, low-rank state.

    Source: Zhu et al. (arXiv 2412.05270), Algorithm 1.

    Args:
        params: groups from ``optim.param_groups(model)``, before or after ``fully_shard``.
        lr: learning rate of everything; matrices move by ``lr * scale``.
        rank: directions per matrix, 1 .. min(m, n); None keeps a quarter of them, as the paper does up to 1B.
        refresh_interval: steps between two draws of directions.
        scale: multiplies the step. The released code takes the root of its argument of this name, ours does not.
        basis: gaussian (the paper), random (orthonormal), or any other.
        seed: of the draws.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, per unit of ``lr``.
        state_dtype: of the moments: None (the parameter's), "float32", "bfloat16" or "8bit".

    Raises:
        ValueError: at construction, for groups without roles and for a rank that does not fit a matrix (named).

    State of an m x n matrix, m >= n: 2 m r elements in the parameter's dtype, a seed and a norm.
    Communication when sharded: one number per matrix at every step.

    We differ: directions are drawn alike on every device and rank (``optim.low_rank.bases.random``).
    """

    source = "Zhu et al., arXiv 2412.05270"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        rank: int | None = None,
        refresh_interval: int = 200,
        scale: float = 1.0,
        basis: str = "gaussian",
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
    ) -> None:
        parts = {"basis": basis, "residual": "apollo", "moments": "keep", "refresh_interval": refresh_interval}
        scales = {"lr": lr, "rank": rank, "scale": scale, "seed": seed}
        adam = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype}
        super().__init__(params, {**scales, **parts, **adam})


class APOLLOMini(LowRankOptimizer):
    """The gradient itself, scaled by one number as Adam scales its projection on one random direction: SGD's memory.

    Source: Zhu et al. (arXiv 2412.05270), APOLLO-Mini.

    Args:
        params: groups from ``optim.param_groups(model)``, before or after ``fully_shard``.
        lr: learning rate of everything; matrices move by ``lr * scale``.
        rank: directions per matrix.
        refresh_interval: steps between two draws of directions.
        scale: multiplies the step; the root of the 128 that the released code is given.
        seed: of the draws.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, per unit of ``lr``.
        state_dtype: of the moments: None (the parameter's), "float32", "bfloat16" or "8bit".

    Raises:
        ValueError: at construction, for groups without roles and for a rank that does not fit a matrix (named).

    State of an m x n matrix, m >= n: 2 m elements in the parameter's dtype, a seed and a norm.
    Communication when sharded: three numbers per matrix at every step.
    """

    source = "Zhu et al., arXiv 2412.05270"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        rank: int = 1,
        refresh_interval: int = 200,
        scale: float = 128**0.5,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
    ) -> None:
        parts = {
            "basis": "gaussian",
            "residual": "apollo_mini",
            "moments": "keep",
            "refresh_interval": refresh_interval,
        }
        scales = {"lr": lr, "rank": rank, "scale": scale, "seed": seed}
        adam = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype}
        super().__init__(params, {**scales, **parts, **adam})


class LDAdam(LowRankOptimizer):
    """Adam in directions that follow the gradient at every step, with rotated moments and error feedback.

    Source: Robert et al. (arXiv 2410.16103), Algorithm 1.

    Args:
        params: groups from ``optim.param_groups(model)``, before or after ``fully_shard``.
        lr: learning rate of everything.
        rank: directions per matrix, 1 .. min(m, n); None keeps a quarter of them.
        rho: share of the old momentum in the matrix whose leading directions are followed.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, per unit of ``lr``.
        state_dtype: of the moments: None (the parameter's), "float32", "bfloat16" or "8bit".

    Raises:
        ValueError: at construction, for groups without roles and for a rank that does not fit a matrix (named).

    State of an m x n matrix, m >= n: m n (error feedback) + 2 m r + n r elements in the parameter's dtype.
    Communication when sharded: n r numbers summed and n r broadcast at every step.

    We differ: error feedback is state of its own, where the released code keeps it in ``p.grad`` and so breaks
    clipping and ``zero_grad``; the first directions come from six rounds of subspace iteration, not from an SVD.
    """

    source = "Robert et al., arXiv 2410.16103"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        rank: int | None = None,
        rho: float = 0.908,
        betas: tuple[float, float] = (0.908, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
    ) -> None:
        parts = {"basis": "power", "residual": "ldadam", "moments": "rotate", "refresh_interval": 1}
        adam = {"betas": betas, "eps": eps, "weight_decay": weight_decay, "state_dtype": state_dtype}
        super().__init__(params, {"lr": lr, "rank": rank, "rho": rho, **parts, **adam})
