"""Peak memory of a training step, counted while torch runs it on tensors that have shapes and no numbers.

Model, FSDP2, loss, backward and optimizer are those of a run; the memory and the other ranks are not there, so eight
ranks of a 7B model take seconds on a laptop. What is counted is every tensor that lives, by its bytes: neither what an
allocator rounds up nor what a kernel uses inside (cuSOLVER, cuBLAS, LAPACK).

Our optimizers read a few numbers of theirs on the host (their clock, whether a gradient is zero). Tensors without
numbers have no answer, so the tracker gives it: the clock by the phase that is wanted, 1 for all else. Where shapes
depend on numbers (a draw of SST, a restart of ReLoRA) there is nothing to trace: ``TrackedStep.refresh`` is None.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import MethodType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers.masking_utils
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.models import fsdp
from lowrank_train.models.loss import token_loss
from lowrank_train.models.recompute import checkpoint_layers
from lowrank_train.optim.low_rank.bases import dct
from lowrank_train.optim.shards import blocks
from lowrank_train.plan import Plan

__all__ = ["TrackedStep", "track"]

_UNTRACEABLE_REFRESH = {"sst", "relora"}
"""Methods at whose refresh shapes depend on numbers."""


@dataclass(frozen=True)
class TrackedStep:
    """Largest bytes of one rank in each phase, by the tracker's own categories and ``Total``."""

    forward: dict[str, int]
    backward: dict[str, int]
    step: dict[str, int] | None = None
    """An update without a refresh."""
    refresh: dict[str, int] | None = None
    """Updates with one, the first and a later; None where that cannot be traced, or there is none."""

    @property
    def phases(self) -> dict[str, int]:
        """The total of each."""
        found = {name: getattr(self, name) for name in ("forward", "backward", "step", "refresh")}
        return {name: categories["Total"] for name, categories in found.items() if categories is not None}

    @property
    def peak(self) -> int:
        """Of all of them."""
        return max(self.phases.values())


def track(plan: Plan, *, updates: bool = True) -> TrackedStep:
    """Run a step of a configuration on fake tensors, as the first of as many fake ranks as it is planned for.

    Of its micro-batches two are run, if it has as many: in the second there are gradients to add to. With updates in
    backward three: in the last they are used up.

    Args:
        plan: of the run; block sizes and the path of the DCT are those of a CUDA device.
        updates: False leaves out the optimizer's steps, which take longest for matrices; its state is there.

    Raises:
        UserError: this torch has no tracker, or the process is in a process group; settings that do not fit.
    """
    config = plan.config
    plain = plan.shapes(plan.model.config)  # outside the fake mode, in which transformers cannot convert types
    with ExitStack() as stack:
        mesh = stack.enter_context(fake_ranks(*plan.mesh))
        tracker_class = _tracker_class()
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of torch, about its own private parts
        fsdp.shard_model(plain, mesh, plan.optimizer_class, config.precision)
        model = plain.to_empty(device="cpu")
        model.tie_weights()
        # the tracker knows forward hooks only, and has to see the root's
        model.forward = MethodType(token_loss, model)  # type: ignore[method-assign]
        checkpoint_layers(model, config.model)
        model.train()
        tied = model.get_output_embeddings().weight
        optimizer = plan.optimizer(model)
        ids = torch.zeros(config.micro_batch, config.seq_len, dtype=torch.int64)
        labels = torch.zeros_like(ids)
        apart = torch.zeros_like(ids) if config.data.separates else None
        tracker = tracker_class(model, optimizer)
        tracker.track_inputs((ids, labels) if apart is None else (ids, labels, apart))
        answers = stack.enter_context(_host_reads(optimizer))
        stack.enter_context(_causal())
        _as_on_cuda(stack)
        with tracker:
            peaks: dict[str, dict[str, int]] = {}
            passes = min(3 if config.fused_backward else 2, plan.passes)

            def gradients() -> None:
                for _ in range(passes):
                    with _phase(tracker, peaks, "forward"):
                        loss = model(ids, labels, config.loss_chunk, apart)
                    with _phase(tracker, peaks, "backward"):
                        answers.tied = tuple(tied.shape) if plain.config.tie_word_embeddings else None
                        loss.backward()
                        answers.tied = None
                    del loss
                    tracker.reset_mod_stats()

            interval = refresh_interval(optimizer)
            traces_refresh = interval and plan.method.optimizer not in _UNTRACEABLE_REFRESH
            if config.fused_backward:
                optim.attach_to_backward(
                    model, optimizer, accumulation_steps=passes, max_norm=config.clip, clip=config.clip_by
                )
                for answers.clock in (0, interval) if traces_refresh else (1,):
                    gradients()
                    with _phase(tracker, peaks, "step"):
                        optimizer.step()
                return TrackedStep(**peaks)
            gradients()
            if updates and traces_refresh:
                with _phase(tracker, peaks, "refresh"):
                    for answers.clock in (0, interval):  # the first choice, and one that has moments to carry over
                        optimizer.step()
            if updates:
                answers.clock = 1
                with _phase(tracker, peaks, "step"):
                    optimizer.step()
    return TrackedStep(**peaks)


@contextmanager
def fake_ranks(shards: int, replicas: int) -> Iterator[DeviceMesh]:
    """The mesh of a group whose collectives move nothing: this process is its first rank."""
    if dist.is_initialized():
        raise UserError("this process is in a process group already; count memory in a process of its own")
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore  # private: absent in some builds
    except ImportError as error:
        raise UserError(f"this torch has no process group of fake ranks ({error}); memory cannot be tracked") from None
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=shards * replicas)
    try:
        sizes = {"replicate": replicas, "shard": shards} if replicas > 1 else {"shard": shards}
        yield init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    finally:
        dist.destroy_process_group()


def _as_on_cuda(stack: ExitStack) -> None:
    """What our optimizers do by the kind of device; and the DCT's matrix, which fake runs would make every time."""
    stack.enter_context(mock.patch.object(blocks, "_CPU_BLOCK_NUMBERS", blocks._DEVICE_BLOCK_NUMBERS))
    stack.enter_context(mock.patch.object(dct, "_FFT_MIN_RANK", 2**62))
    stack.enter_context(mock.patch.object(dct, "dct_matrix", lru_cache(maxsize=None)(dct.dct_matrix)))


def refresh_interval(optimizer: optim.MatrixOptimizer) -> int:
    """Steps between two refreshes; 0 for a method without."""
    settings = [update.interval_setting for update in optimizer.updates.values()]
    return max((int(optimizer.defaults[key]) for key in settings if key is not None), default=0)


def _tracker_class() -> Any:
    try:
        from torch.distributed._tools import fsdp2_mem_tracker as private  # and so only where it is used

        kinds, states = private._FSDPRefType, private._FSDPState
        base: Any = private.FSDPMemTracker
    except (ImportError, AttributeError) as error:
        raise UserError(f"this torch ({torch.__version__}) has no memory tracker for FSDP2: {error}") from None

    class Tracker(base):  # type: ignore[misc]
        """Torch's own holds on to the last gradient of a group while the group reduces."""

        def _fsdp_param_group_post_backward(self, fsdp_mod: Any, original: Any) -> Any:
            group = fsdp_mod._get_fsdp_state()._fsdp_param_group

            def label(kind: Any, of: str) -> None:
                for param in group.fsdp_params:
                    grad = getattr(param, of).grad if hasattr(param, of) else None
                    if grad is not None:
                        self._update_and_maybe_create_winfos(grad, kind)

            def inner(*args: Any, **kwargs: Any) -> None:
                label(kinds.UNSHARDED_GRAD, "_unsharded_param")
                self._fsdp_state = states.POST_BW
                original(*args, **kwargs)
                label(kinds.SHARDED_GRAD, "sharded_param")

            return inner

    return Tracker


@contextmanager
def _phase(tracker: Any, peaks: dict[str, dict[str, int]], name: str) -> Iterator[None]:
    """Put the tracker's peak of what happens inside into ``peaks``."""
    before = tracker.get_tracker_snapshot()
    tracker._peak_mem_snap = before
    tracker._peak_mem = {device: snapshot["Total"] for device, snapshot in before.items()}
    yield
    snapshot = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    found = {str(getattr(key, "value", key)): int(size) for key, size in snapshot.items()}
    if found["Total"] >= peaks.get(name, found)["Total"]:
        peaks[name] = found


class _HostReads(TorchDispatchMode):
    """Answers what Python asks of tensors without numbers; and adds in place where autograd does, but not to those."""

    clock = 1
    tied: tuple[int, ...] | None = None
    """Shape of a weight with two gradients, while there is a backward pass."""

    def __init__(self, clocks: set[int]) -> None:
        super().__init__()
        self.clocks = clocks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            value = self.clock if id(args[0]) in self.clocks else 1
            return float(value) if args[0].is_floating_point() else value
        if (
            func is torch.ops.aten.add.Tensor
            and self.tied
            and tuple(args[0].shape) == self.tied == tuple(args[1].shape)
        ):
            func = torch.ops.aten.add_.Tensor
        return func(*args, **(kwargs or {}))


@contextmanager
def _host_reads(optimizer: optim.MatrixOptimizer) -> Iterator[_HostReads]:
    """While inside, reads of a fake tensor by Python get an answer."""
    clocks = {id(slot.state["step"]) for slot in optimizer.slots() if "step" in slot.state}

    def to_list(tensor: Tensor) -> Any:
        return torch.ones(tensor.shape, device="meta").numel() * [1.0]

    with mock.patch.object(torch.Tensor, "tolist", to_list), _HostReads(clocks) as answers:
        yield answers


@contextmanager
def _causal() -> Iterator[None]:
    """Transformers tells fake tensors from real ones, and would make the T x T masks that real ones do without."""
    with mock.patch.object(transformers.masking_utils, "is_tracing", return_value=False):
        yield
