"""RiemannianAdamW: Adam on points of manifolds, AdamW on everything else. The update of points is
``optim.manifolds.points``.

Source: Becigneul & Ganea, "Riemannian adaptive optimization methods" (arXiv 1810.00760).

We differ from geoopt's RiemannianAdam:
  * the exponential map and parallel transport, exact, for ball and sphere too (as its ``...Exact`` manifolds; on the
    sphere even those transport by projection);
  * closed forms in float64 on what is stored: float32 points stay on the manifold, and second moments positive;
  * no ``stabilize``: every step leaves points and moments where stabilisation would put them;
  * one second moment a point, one number in memory, where geoopt repeats it for every coordinate;
  * no weight decay of points, which is no decay there.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lowrank_train.optim.core.common_updates import POINTS
from lowrank_train.optim.core.groups import param_groups
from lowrank_train.optim.core.optimizer import MatrixOptimizer
from lowrank_train.optim.core.published import Published, arguments

__all__ = ["RiemannianAdamW"]


class RiemannianAdamW(MatrixOptimizer):
    """Riemannian Adam on parameters whose rows are points of a manifold, AdamW on everything else.

    Args:
        params: a model whose modules say which parameters are points (``optim.param_groups``), groups made of it, or
            groups of your own: ``{"params": [...], "manifold": geoopt.Lorentz()}`` beside Euclidean ones.
        lr: learning rate; a point moves about ``lr`` far in a step, in the manifold's own distance. Float or tensor.
        weight_decay: decoupled, per unit of ``lr``; of Euclidean parameters only.
        amsgrad: divide by the largest second moment a point has had.
        point_rank: keep first moments of points in that many directions that all of them share; None: whole.
        point_refresh_interval: steps between two choices of these directions.
        state_dtype: of first moments: None (float32, or the parameter's if wider), "float32", "bfloat16" or "8bit";
            of Euclidean parameters, of both moments.

    Raises:
        ValueError: at construction, if no parameter is a point (a lost manifold would mean Euclidean steps), for a
            manifold unknown here or of learned or non-positive curvature, a shape or sharding that cuts points, and
            values out of range; at the first step, for points that are not on their manifold.

    State of n points: n p numbers (p: dimension of the manifold for Lorentz and ball, of the ambient space otherwise),
    or n r + r p with ``point_rank``; n, with amsgrad 2 n, second moments; a step count.
    Communication when sharded: nothing in a step; at a refresh of ``point_rank`` p^2 numbers of 8 bytes summed, r p
    broadcast.

    Points in bfloat16 or float16 are rounded to nearest after each step, which then changes little or nothing: hold
    them in float32, with autocast or FSDP2's mixed precision for the arithmetic. Every optimizer of this package
    updates points so; this one treats all other parameters as vectors.
    """

    name = "riemannian_adamw"
    published = Published(paper="Becigneul & Ganea, arXiv 1810.00760", when="parameters are points of a manifold")
    updates: ClassVar = {"points": POINTS}

    def __init__(
        self,
        params: ParamsT | nn.Module,
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        point_rank: int | None = None,
        point_refresh_interval: int = 200,
        state_dtype: str | None = None,
    ) -> None:
        settings = arguments(locals())
        super().__init__(param_groups(params) if isinstance(params, nn.Module) else params, settings)
        if not any(group["role"] == "points" for group in self.param_groups):
            raise ValueError(
                "the model has no points of a manifold in its layers, so this would be AdamW; expected "
                "parameter_manifolds in a module, or a group with a manifold. geoopt's ManifoldParameter becomes a "
                "plain one in fully_shard, to_empty and from_pretrained: call optim.keep_manifolds(model) before, or "
                "on self in __init__"
            )
