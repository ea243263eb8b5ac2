"""Peak memory of a training step of one rank, by closed formulas: shapes and settings only, nothing is run.

A step has four phases, and the peak is that of the one that needs most:

    forward     weights, gradients so far, state | the root group gathered | activations | logits of a chunk
    backward    likewise                         | groups gathered ahead, reductions under way | activations left
    step        weights, gradients, state        | blocks of rows
    refresh     likewise                         | new directions, decompositions

FSDP2 here: one group per decoder layer and one, the root, for embeddings, final norm and head. The root stays gathered
from the start of forward to the end of backward. With more than one rank the buffer of the last all-gather lives on
until the next, and in backward the next layer is gathered while one is computed. Gradients of a group are copied to a
buffer in the type they are reduced in, which lives until the next group reduces its own.

A tracker in the tests (``tests/tools/memory_tracker.py``) counts the same by running the step on fake tensors; the two
agree within 3 percent.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowrank_train import optim
from lowrank_train.config import methods
from lowrank_train.config.schema import Config
from lowrank_train.layers.spectral import SpectralLinear
from lowrank_train.memory import static as memory_budget
from lowrank_train.memory.activations import Activations, Sizes, activations, loss_bytes, sizes
from lowrank_train.memory.updates import Workspace, re_svd_bytes, update_workspace
from lowrank_train.models.fsdp import shard_dims
from lowrank_train.models.recompute import checkpointed_layers
from lowrank_train.optim.shards.layout import StateTensor, local_shape, matrix_shape
from lowrank_train.optim.storage.int8_weight import Int8Weight, held_bytes
from lowrank_train.plan import build_optimizer, micro_batches, unsharded

__all__ = ["Fixed", "Phase", "StepMemory", "fixed", "predict"]


@dataclass(frozen=True)
class Phase:
    """Bytes of one rank at the worst moment of a phase, by term."""

    weights: int = 0
    """This rank's shards."""
    gradients: int = 0
    """Shards of them that have been made."""
    optimizer_state: int = 0
    activations: int = 0
    """What waits for backward, and gradients of it."""
    logits: int = 0
    """Of one chunk: logits, probabilities, their gradient."""
    gathered: int = 0
    """Whole parameters of groups, and buffers they travel in."""
    reductions: int = 0
    """Whole gradients, and buffers they travel in."""
    temporaries: int = 0
    """What an update, or a layer of factors, makes and frees; the cosine matrix or drawn directions between steps."""
    refresh: int = 0
    """As temporaries, when directions are chosen or factors decomposed."""

    @property
    def total(self) -> int:
        """Of all terms."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class StepMemory:
    """Predicted peak of a training step of one rank."""

    forward: Phase
    backward: Phase
    step: Phase
    refresh: Phase

    @property
    def phases(self) -> dict[str, int]:
        """The total of each."""
        return {f.name: getattr(self, f.name).total for f in fields(self)}

    @property
    def phase(self) -> str:
        """Which one needs most."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak(self) -> int:
        """Bytes it needs."""
        return max(self.phases.values())

    @property
    def terms(self) -> dict[str, int]:
        """Its bytes by term."""
        return asdict(getattr(self, self.phase))


@dataclass(frozen=True)
class _Group:
    """Bytes of an FSDP group."""

    gathered: int
    """Whole parameters, in the type of the arithmetic; beside them, with more than one rank, those kept in int8."""
    travelling: int
    """The buffer they are gathered in."""
    widened: int
    """For a single rank, the largest of those kept in int8, in the type of the arithmetic: it is copied then."""
    turned: int
    """Those of them that are sharded along dimension 1: they are put together in a second copy."""
    gradients: int
    """Whole gradients, in the type of the arithmetic."""
    reduced: int
    """In the type they are reduced in."""
    stored: int
    """In that of the weights, in which shards of them are kept."""
    last: int
    """The last of the gradients, which FSDP2 holds on to until all are reduced, with more than one rank."""

    def reducing(self, world_size: int) -> int:
        """Most that is needed to reduce: gradients beside their copy, or that beside this rank's share of the sum."""
        last = self.last if world_size > 1 else 0
        converted = self.stored // world_size if self.stored < self.reduced else 0
        return self.reduced + max(self.gradients, self.reduced // world_size + last + converted)

    def summed(self, world_size: int, accumulates: bool) -> int:
        """Of HSDP, the share of a rank as it was summed, where that is not the gradient itself: FSDP2 keeps both."""
        return self.reduced // world_size if self.stored < self.reduced or accumulates else 0


@dataclass(frozen=True)
class Fixed:
    """What does not depend on the micro-batch, the loss or checkpointing."""

    static: memory_budget.StaticMemory
    workspace: Workspace
    of_layers: Workspace
    """Of the parameters in decoder layers only."""
    of_root: Workspace
    """Of embeddings, final norm and head only."""
    waiting: int
    """Gradients, or coordinates of them, that several micro-batches sum where updates are made in backward."""
    layers: list[_Group]
    root: _Group


def fixed(config: Config, model: PreTrainedModel, *, world_size: int = 1, shard: int = 0, replicas: int = 1) -> Fixed:
    """The part of ``predict`` that takes time; arguments as there."""
    optimizer = build_optimizer(config, model)
    inside = {param for layer in model.get_decoder().layers for param in layer.parameters()}
    workspace, of_layers, of_root = (
        update_workspace(
            optimizer,
            world_size=world_size,
            shard=shard,
            on_cpu=config.device == "cpu",
            one_at_a_time=config.fused_backward,
            among=among,
        )
        for among in (None, inside, {param for param in model.parameters() if param not in inside})
    )
    spectral = [module for module in model.modules() if isinstance(module, SpectralLinear)]
    decomposed = max((re_svd_bytes(layer.out_features, layer.in_features) for layer in spectral), default=0)
    static = memory_budget.predicted(config, model, world_size=world_size, shard=shard)
    if config.device != "cpu":
        state = optim.layout_bytes(optimizer, world_size=world_size, shard=shard, on_device_only=True)
        static = replace(static, optimizer_state=state)
    layers, root = _groups(config, model, world_size, alone=world_size * replicas == 1)
    waiting = _waiting_gradients(optimizer, world_size, shard)
    workspace = replace(workspace, refresh=max(workspace.refresh, decomposed))
    return Fixed(static, workspace, of_layers, of_root, waiting, layers, root)


def _waiting_gradients(optimizer: optim.MatrixOptimizer, world_size: int, shard: int) -> int:
    """What has to wait of the gradients of several micro-batches, or for their norm, with updates in backward."""
    total = 0
    for slot in optimizer.slots():
        spec = StateTensor(tuple(slot.param.shape), slot.param.dtype, "parameter")
        dim = optimizer.shard_dim(slot.group["role"], slot.param.shape, world_size)
        size = math.prod(local_shape(spec, dim, shard, world_size)) * spec.dtype.itemsize
        if slot.group["role"] == "frozen":
            continue
        if optimizer.coordinates_suffice(slot):
            m = max(matrix_shape(slot.param.shape))
            r = slot.state["column_age"].numel()
            rows = local_shape(StateTensor((m, r), slot.param.dtype, "rows"), dim, shard, world_size)[0]
            size = rows * r * torch.promote_types(slot.param.dtype, torch.float32).itemsize
        total += size
    return total


def predict(
    config: Config,
    *,
    world_size: int = 1,
    shard: int = 0,
    replicas: int = 1,
    model: PreTrainedModel | None = None,
    known: Fixed | None = None,
) -> StepMemory:
    """What one rank will need for a step.

    Args:
        config: of the run; ``device=cpu`` asks for the CPU's smaller blocks.
        world_size: ranks the model is sharded over.
        shard: which of them.
        replicas: sharded copies (HSDP); with one shard each they are what DistributedDataParallel would be.
        model: what is trained, on meta, if there is one already: ``run.unsharded(config)``.
        known: what ``fixed`` gave for the same model, optimizer and ranks.

    Raises:
        UserError: sequences that do not divide, unknown models; ValueError: settings that do not fit the model.
    """
    model = unsharded(config) if model is None else model
    if known is None:
        known = fixed(config, model, world_size=world_size, shard=shard, replicas=replicas)
    static, workspace = known.static, known.workspace
    size = sizes(config, model)
    saved = activations(model, size)
    kept = Phase(weights=static.weights, optimizer_state=static.optimizer_state, temporaries=workspace.kept)
    accumulates = micro_batches(config, world_size * replicas) > 1
    run = _Run(config, model, kept, saved, size, known.layers, known.root, world_size, replicas)
    if not config.fused_backward:
        return StepMemory(
            _forward(run, static.gradients * accumulates),
            _backward(run, static.gradients, accumulates),
            _add(kept, gradients=static.gradients, temporaries=workspace.step),
            _add(kept, gradients=static.gradients, refresh=workspace.refresh),
        )
    for_norm = config.clip is not None and config.clip_by == "global"
    waiting = known.waiting if accumulates or for_norm else 0
    return StepMemory(
        _forward(run, waiting * accumulates),
        _backward_with_updates(run, waiting, known),
        _add(kept, gradients=waiting * for_norm, temporaries=workspace.step * for_norm),
        _add(kept, gradients=waiting * for_norm, refresh=workspace.refresh * for_norm),
    )


@dataclass(frozen=True)
class _Run:
    config: Config
    model: PreTrainedModel
    kept: Phase
    """What is there all the time."""
    saved: Activations
    size: Sizes
    layers: list[_Group]
    root: _Group
    world_size: int
    replicas: int

    @property
    def checkpointed(self) -> int:
        """Of the layers, from the first on."""
        return checkpointed_layers(self.model, self.config.model)

    @property
    def waiting(self) -> list[int]:
        """Activations of each layer, from forward to its backward."""
        few = self.saved.selective if self.config.model.checkpointing == "selective" else self.saved.inputs
        return [*few[: self.checkpointed], *self.saved.layers[self.checkpointed :]]


def _groups(config: Config, model: PreTrainedModel, world_size: int, *, alone: bool) -> tuple[list[_Group], _Group]:
    """Those of the decoder layers, in order, and the root."""
    method = methods.find(config.optimizer["name"])
    dims = shard_dims(model, optim.find(method.optimizer), world_size)
    blocks = [list(layer.parameters()) for layer in model.get_decoder().layers]
    inside = {param for block in blocks for param in block}
    rest = [param for param in model.parameters() if param not in inside]
    compute = sizes(config, model).compute
    narrowest = compute if alone else 4  # in which gradients are reduced, unless the weights are wider
    groups = [_group(params, dims, compute, narrowest, shared=world_size > 1) for params in (*blocks, rest)]
    return groups[:-1], groups[-1]


def _group(
    params: list[nn.Parameter], dims: dict[Tensor, int], itemsize: int, narrowest: int, *, shared: bool
) -> _Group:
    def compute(param: Tensor) -> int:
        return param.numel() * (itemsize if param.is_floating_point() else param.element_size())

    trained = [param for param in params if param.requires_grad]
    in_int8 = [param for param in params if isinstance(param, Int8Weight)]
    held = sum(map(held_bytes, in_int8))
    whole = sum(map(compute, params))
    return _Group(
        gathered=whole + held * shared,
        travelling=whole - sum(map(compute, in_int8)) + held,
        widened=max(map(compute, in_int8), default=0) * (not shared),
        turned=sum(compute(param) for param in params if dims.get(param, 0) != 0),
        gradients=sum(map(compute, trained)),
        reduced=sum(param.numel() * max(param.element_size(), narrowest) for param in trained),
        stored=sum(param.numel() * param.element_size() for param in trained),
        last=compute(trained[-1]) if trained else 0,
    )


def _forward(run: _Run, gradients: int) -> Phase:
    """When the first layer is gathered, at the loss, or inside the last layer where nothing is kept of it."""
    model, kept, saved, size = run.model, run.kept, run.saved, run.size
    layers, root, world_size = run.layers, run.root, run.world_size
    head = model.get_output_embeddings().weight
    vocabulary, width = head.shape
    loss, logits, _ = loss_bytes(size, vocabulary, width, trains_head=head.requires_grad)
    checkpoints = run.checkpointed == len(layers)
    waiting = sum(run.waiting)
    travelled = layers[-1].travelling if world_size > 1 else 0
    here = _add(kept, gradients=gradients, activations=waiting)
    # activations: hidden states for the loss, and their gradient, in loss already
    hidden = size.tokens * width * size.compute
    at_loss = _add(
        here,
        activations=saved.around + hidden,
        logits=logits,
        reductions=loss - logits,
        gathered=root.gathered + travelled,
    )
    # this layer, what it came in, the next
    both = layers[-1].gathered + (layers[-1].travelling if world_size > 1 else 0) + travelled
    in_layer = _add(
        here,
        activations=saved.forward if checkpoints else saved.stream,
        gathered=root.gathered + max(both, layers[-1].gathered + travelled + layers[-1].turned),
        temporaries=saved.products[-1],
    )
    # the buffer the root came in lives until the first layer is there
    first = root.gathered + layers[0].gathered + (layers[0].travelling if world_size > 1 else layers[0].widened)
    start = _add(
        kept,
        gradients=gradients,
        activations=saved.stream,
        gathered=first + (root.travelling if world_size > 1 else 0),
    )
    return max(start, at_loss, in_layer, key=lambda phase: phase.total)


def _backward(run: _Run, gradients: int, accumulates: bool) -> Phase:
    """When the loss's gradients are scaled, inside one of the layers, or when the root's gradients are reduced."""
    model, kept, saved, size = run.model, run.kept, run.saved, run.size
    layers, root, world_size = run.layers, run.root, run.world_size
    waiting = run.waiting
    weight = model.get_output_embeddings().weight
    head = weight.numel() * size.compute if weight.requires_grad else 0
    hidden = size.tokens * weight.shape[1] * size.compute
    travelled = layers[-1].travelling if world_size > 1 else 0
    total = sum(waiting)
    of_layers = [group.stored // world_size for group in layers]
    moments = [
        _add(
            kept,
            gradients=gradients * accumulates,
            activations=total + saved.around + 2 * hidden,
            reductions=2 * head,  # as made in forward, and scaled
            gathered=root.gathered + travelled,
        )
    ]
    reduced = summed = 0  # the buffer of the layer before, in the order of backward; what all so far hold on to
    for j in reversed(range(len(layers))):
        group = layers[j]
        made = gradients if accumulates else sum(of_layers[j + 1 :])
        left = sum(waiting[:j])
        checkpoints = j < run.checkpointed
        here = saved.recomputed[j] if checkpoints else saved.layers[j]
        ahead = layers[j - 1].gathered if world_size > 1 and j > 0 else 0
        common = _add(kept, gradients=made, gathered=root.gathered, activations=left + saved.stream)
        feed_forward = size.hidden * size.feed_forward * size.compute * (group.gradients > 0)
        middle = _add(
            common,
            activations=here + saved.feed_forward,
            gathered=group.gathered + ahead,
            reductions=head + reduced + min(feed_forward, group.gradients),
            temporaries=saved.products[j],
        )
        arriving = _add(
            common,
            activations=here if not checkpoints else waiting[j],
            gathered=group.gathered + (group.travelling + group.turned if world_size > 1 else group.widened),
            reductions=head + reduced,
        )
        end = _add(
            common,
            activations=saved.stream + saved.norm_backward,
            gathered=group.gathered + ahead,
            reductions=head + reduced + group.gradients,
        )
        reducing = _add(
            common,
            gathered=ahead,
            reductions=head + summed + group.reducing(world_size),
        )
        moments += [middle, arriving, end, reducing]
        summed += group.summed(world_size, accumulates) if run.replicas > 1 else 0
        reduced = group.reduced + summed
    made = gradients if accumulates else sum(of_layers)
    # a tied weight: its gradient as embedding is added to the one as head
    embedding = root.gradients + (head if model.config.tie_word_embeddings else 0)
    last = _add(kept, gradients=made, activations=saved.stream)
    moments.append(_add(last, gathered=root.gathered, reductions=embedding + reduced))
    moments.append(_add(last, reductions=summed + root.reducing(world_size)))
    return max(moments, key=lambda phase: phase.total)


def _backward_with_updates(run: _Run, waiting: int, known: Fixed) -> Phase:
    """As ``_backward``, when a group's gradients are reduced and one of its parameters is updated."""
    layers, root, world_size, saved = run.layers, run.root, run.world_size, run.saved
    moments = [_backward(run, waiting, accumulates=True)]
    weight = run.model.get_output_embeddings().weight
    head = weight.numel() * run.size.compute if weight.requires_grad else 0
    for j, group in [*enumerate(layers), (0, root)]:
        left = sum(run.waiting[:j]) if group is not root else 0
        ahead = layers[j - 1].gathered if world_size > 1 and j > 0 else 0
        moments.append(
            _add(
                run.kept,
                gradients=waiting + group.stored // world_size,
                activations=left + saved.stream,
                gathered=ahead + (root.gathered if group is not root else 0),
                reductions=group.reduced + (head if group is not root else 0),
                refresh=(known.of_root if group is root else known.of_layers).refresh,
            )
        )
    return max(moments, key=lambda phase: phase.total)


def _add(phase: Phase, **more: int) -> Phase:
    """The phase with more bytes of some terms."""
    return replace(phase, **{name: getattr(phase, name) + value for name, value in more.items()})
