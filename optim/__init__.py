"""Low-rank optimizers that drop into any training loop and stay exact under FSDP2.

from lowrank_train.optim import DCTAdamW, param_groups
optimizer = DCTAdamW(param_groups(model), lr=1e-3, rank=256, weight_decay=0.1)
"""

from lowrank_train.optim.core.backward import BackwardUpdates, attach_to_backward
from lowrank_train.optim.core.groups import keep_manifolds, param_groups
from lowrank_train.optim.core.optimizer import SHARED_SETTINGS, MatrixOptimizer
from lowrank_train.optim.costs.state import layout_bytes, predicted_state_bytes, state_bytes
from lowrank_train.optim.frameworks.torchtitan import titan_config
from lowrank_train.optim.frameworks.trainer import hf_factory
from lowrank_train.optim.methods.adamw import AdamW
from lowrank_train.optim.methods.low_rank_adamw import (
    APOLLO,
    FRUGAL,
    APOLLOMini,
    DCTAdamW,
    Fira,
    GaLoreAdamW,
    LDAdam,
    LowRankAdamW,
)
from lowrank_train.optim.methods.muon import Muon
from lowrank_train.optim.methods.registry import check_arguments, create, describe, find, names
from lowrank_train.optim.methods.relora import ReLoRA
from lowrank_train.optim.methods.riemannian import RiemannianAdamW
from lowrank_train.optim.methods.scale import SCALE
from lowrank_train.optim.methods.sst import SST
from lowrank_train.optim.methods.trion import Trion
from lowrank_train.optim.methods.welore_adamw import WeLoreAdamW
from lowrank_train.optim.shards.layout import preferred_shard_dim
from lowrank_train.optim.spectral.weight_ranks import ranks_from_weights
from lowrank_train.optim.storage.int8_weight import keep_in_int8

__all__ = [
    "APOLLO",
    "FRUGAL",
    "SCALE",
    "SHARED_SETTINGS",
    "SST",
    "APOLLOMini",
    "AdamW",
    "BackwardUpdates",
    "DCTAdamW",
    "Fira",
    "GaLoreAdamW",
    "LDAdam",
    "LowRankAdamW",
    "MatrixOptimizer",
    "Muon",
    "ReLoRA",
    "RiemannianAdamW",
    "Trion",
    "WeLoreAdamW",
    "attach_to_backward",
    "check_arguments",
    "create",
    "describe",
    "find",
    "hf_factory",
    "keep_in_int8",
    "keep_manifolds",
    "layout_bytes",
    "names",
    "param_groups",
    "predicted_state_bytes",
    "preferred_shard_dim",
    "ranks_from_weights",
    "state_bytes",
    "titan_config",
]
