"""Low-rank optimizers that drop into any training loop and stay exact under FSDP2.

from lowrank_train.optim import DCTAdamW, param_groups
optimizer = DCTAdamW(param_groups(model), lr=1e-3, rank=256, weight_decay=0.1)

To understand one step of DCT-AdamW, read in this order:

1. ``methods/low_rank/dct_adamw.py``: the equation of the method and the parts it is made of.
2. ``core/optimizer.py``: ``step()``; every role of parameters has an ``Update`` (``core/update.py``).
3. ``low_rank/engine.py``: all matrices at once, and ``low_rank/step.py``: one, in the order of the equation.
4. ``low_rank/bases/columns.py`` and ``low_rank/bases/dct.py``: which columns, and the transform.
5. ``low_rank/residuals.py``: ``Drop``, what becomes of the gradient outside of them.
6. ``shards/tall.py``: the same where the matrix is sharded.
"""

from typing import TYPE_CHECKING

from lowrank_train.optim import methods
from lowrank_train.optim.core.backward import BackwardUpdates as BackwardUpdates
from lowrank_train.optim.core.backward import attach_to_backward as attach_to_backward
from lowrank_train.optim.core.groups import keep_manifolds as keep_manifolds
from lowrank_train.optim.core.groups import param_groups as param_groups
from lowrank_train.optim.core.optimizer import MatrixOptimizer as MatrixOptimizer
from lowrank_train.optim.costs.state import layout_bytes as layout_bytes
from lowrank_train.optim.costs.state import predicted_state_bytes as predicted_state_bytes
from lowrank_train.optim.costs.state import state_bytes as state_bytes
from lowrank_train.optim.frameworks.torchtitan import titan_config as titan_config
from lowrank_train.optim.frameworks.trainer import hf_factory as hf_factory
from lowrank_train.optim.methods import *  # noqa: F403
from lowrank_train.optim.parameters.group_checks import SHARED_SETTINGS as SHARED_SETTINGS
from lowrank_train.optim.shards.layout import preferred_shard_dim as preferred_shard_dim
from lowrank_train.optim.spectral.weight_ranks import ranks_from_weights as ranks_from_weights
from lowrank_train.optim.storage.int8_weight import keep_in_int8 as keep_in_int8

if not TYPE_CHECKING:  # what a type checker sees are the imports
    __all__ = sorted(
        [
            *methods.__all__,
            *("SHARED_SETTINGS", "BackwardUpdates", "MatrixOptimizer", "attach_to_backward", "hf_factory"),
            *("keep_in_int8", "keep_manifolds", "layout_bytes", "param_groups", "predicted_state_bytes"),
            *("preferred_shard_dim", "ranks_from_weights", "state_bytes", "titan_config"),
        ]
    )
