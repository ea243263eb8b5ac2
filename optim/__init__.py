"""Low-rank optimizers that drop into any training loop and stay exact under FSDP2.

from optim import DCTAdamW, param_groups
optimizer = DCTAdamW(param_groups(model), lr=1e-3, rank=256, weight_decay=0.1)
"""

from optim.adamw import AdamW
from optim.backward import BackwardUpdates, attach_to_backward
from optim.base import SHARED_SETTINGS, MatrixOptimizer
from optim.hf import hf_factory
from optim.int8_weight import keep_in_int8
from optim.low_rank_adamw import APOLLO, FRUGAL, APOLLOMini, DCTAdamW, Fira, GaLoreAdamW, LDAdam, LowRankAdamW
from optim.memory import layout_bytes, predicted_state_bytes, state_bytes
from optim.muon import Muon
from optim.param_groups import keep_manifolds, param_groups
from optim.registry import check_arguments, create, describe, find, names
from optim.relora import ReLoRA
from optim.riemannian import RiemannianAdamW
from optim.scale import SCALE
from optim.sharding import preferred_shard_dim
from optim.sst import SST
from optim.titan import titan_config
from optim.trion import Trion
from optim.welore_adamw import WeLoreAdamW

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
    "state_bytes",
    "titan_config",
]
