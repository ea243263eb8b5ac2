"""Peak memory of a training step of one rank, by closed formulas: shapes and settings only, nothing is run.

A step has four phases, and the peak is that of the one that needs most:

    forward     weights, gradients so far, state | the root group gathered | activations | logits of a chunk
    backward    the same                         | groups gathered ahead, reductions under way | activations left
    step        weights, gradients, state        | blocks of rows
    refresh     the same                         | a new basis, decompositions

FSDP2 here: one group per decoder layer and one, the root, for embeddings, final norm and head. The root stays gathered
from the start of forward to the end of backward. With more than one rank the buffer of the last all-gather lives on
until the next, and in backward the next layer is gathered while one is computed. Gradients of a group are copied to a
buffer in the type they are reduced in, which lives until the next group reduces its own.

A tracker in the tests (``tests/tools/memory_tracker.py``) counts the same by running the step on fake tensors; the two
agree within 3 percent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lowrank_train import optim
from lowrank_train.common.errors import UserError
from lowrank_train.memory import static as memory_static
from lowrank_train.memory.activations import Activations, activations, loss_bytes, sizes
from lowrank_train.memory.groups import Group, fsdp_groups
from lowrank_train.memory.phases import Phase, StepMemory
from lowrank_train.models.families import Sizes, family_of
from lowrank_train.models.recompute import checkpointed_layers
from lowrank_train.optim.costs.workspace import step_workspace
from lowrank_train.optim.shards.layout import local_shape
from lowrank_train.optim.shards.workspace import Workspace
from lowrank_train.plan import Plan

__all__ = ["Fixed", "fixed", "not_predicted", "predict"]


@dataclass(frozen=True)
class Fixed:
    """What does not depend on the micro-batch, the loss or checkpointing."""

    static: memory_static.StaticMemory
    workspace: Workspace
    of_layers: Workspace
    """The workspace of the parameters in decoder layers only."""
    of_root: Workspace
    """The workspace of embeddings, final norm and head only."""
    after: int
    """What follows all updates, now and then: decompositions, restarts."""
    waiting: int
    """Gradients, or coordinates of them, that several micro-batches sum where updates are made in backward."""
    layers: list[Group]
    root: Group


def fixed(plan: Plan, *, shard: int = 0) -> Fixed:
    """Return the part of ``predict`` that takes time; arguments as there."""
    config, model, shards = plan.config, plan.model, plan.mesh.shards
    optimizer = plan.optimizer(model)
    inside = {param for layer in model.get_decoder().layers for param in layer.parameters()}
    workspace, of_layers, of_root = (
        step_workspace(
            optimizer,
            world_size=shards,
            shard=shard,
            on_cpu=config.device == "cpu",
            one_at_a_time=config.fused_backward,
            among=among,
        )
        for among in (None, inside, {param for param in model.parameters() if param not in inside})
    )
    after = optimizer.end_bytes(shards)
    static = memory_static.predicted(plan, shard=shard)
    if config.device != "cpu":
        state = optim.layout_bytes(optimizer, world_size=shards, shard=shard, on_device_only=True)
        static = replace(static, optimizer_state=state)
    layers, root = fsdp_groups(plan, sizes(config, model).compute)
    waiting = _waiting_gradients(optimizer, shards, shard)
    workspace = replace(workspace, refresh=max(workspace.refresh, after))
    return Fixed(static, workspace, of_layers, of_root, after, waiting, layers, root)


def _waiting_gradients(optimizer: optim.MatrixOptimizer, world_size: int, shard: int) -> int:
    """What has to wait of the gradients of several micro-batches, or for their norm, with updates in backward."""
    total = 0
    for slot in optimizer.slots():
        if slot.group["role"] != "frozen":
            dim = optimizer.shard_dim(slot.group["role"], slot.param.shape, world_size)
            spec = optimizer.update_of(slot.group).summed_gradient(slot)
            total += math.prod(local_shape(spec, dim, shard, world_size)) * spec.dtype.itemsize
    return total


def not_predicted(plan: Plan) -> str | None:
    """Return why the memory of a step is not predicted; None if it is."""
    config, kind = plan.config, plan.model.config.model_type
    if config.adapter.name is not None:
        return (
            f"the memory of a step is not predicted with adapter.name={config.adapter.name}; leave the adapter out for "
            "that of training everything"
        )
    if family_of(kind, config.model.name).activations is None:
        return f"the memory of a step is not predicted: what layers of a {kind} model keep for backward is not known"
    return None


def predict(plan: Plan, *, shard: int = 0, known: Fixed | None = None) -> StepMemory:
    """Return what one rank will need for a step.

    Args:
        plan: of the run; ``device=cpu`` asks for the CPU's smaller blocks.
        shard: which of the ranks that share a copy of the model.
        known: what ``fixed`` gave for the same model, optimizer and ranks.

    Raises:
        UserError: the activations are not known, as ``not_predicted`` says.
    """
    config, model = plan.config, plan.model
    reason = not_predicted(plan)
    if reason is not None:
        raise UserError(reason)
    known = fixed(plan, shard=shard) if known is None else known
    static, workspace = known.static, known.workspace
    size = sizes(config, model)
    kept = Phase(weights=static.weights, optimizer_state=static.optimizer_state, temporaries=workspace.kept_bytes)
    accumulates = plan.passes > 1
    run = _Run(plan, known, kept, activations(model, size), size)
    if not config.fused_backward:
        return StepMemory(
            _forward(run, static.gradients * accumulates),
            _backward(run, static.gradients, accumulates),
            kept.plus(gradients=static.gradients, temporaries=workspace.step),
            kept.plus(gradients=static.gradients, refresh=workspace.refresh),
        )
    for_norm = config.clip is not None and config.clip_by == "global"
    waiting = known.waiting if accumulates or for_norm else 0
    return StepMemory(
        _forward(run, waiting * accumulates),
        _backward_with_updates(run, waiting),
        kept.plus(gradients=waiting * for_norm, temporaries=workspace.step * for_norm),
        kept.plus(gradients=waiting * for_norm, refresh=workspace.refresh if for_norm else known.after),
    )


@dataclass(frozen=True)
class _Run:
    plan: Plan
    known: Fixed
    kept: Phase
    """What is there all the time."""
    saved: Activations
    size: Sizes

    @property
    def checkpointed(self) -> int:
        """Of the layers, from the first on."""
        return checkpointed_layers(self.plan.model, self.plan.config.model)

    @property
    def waiting(self) -> list[int]:
        """Activations of each layer, from forward to its backward."""
        few = self.saved.selective if self.plan.config.model.checkpointing == "selective" else self.saved.inputs
        return [*few[: self.checkpointed], *self.saved.layers[self.checkpointed :]]


def _forward(run: _Run, gradients: int) -> Phase:
    """When the first layer is gathered, at the loss, or inside the last layer where nothing is kept of it."""
    model, kept, saved, size = run.plan.model, run.kept, run.saved, run.size
    layers, root, world_size = run.known.layers, run.known.root, run.plan.mesh.shards
    head = model.get_output_embeddings().weight
    vocabulary, width = head.shape
    loss, logits, _ = loss_bytes(size, vocabulary, width, trains_head=head.requires_grad)
    checkpoints = run.checkpointed == len(layers)
    waiting = sum(run.waiting)
    travelled = layers[-1].travelling if world_size > 1 else 0
    here = kept.plus(gradients=gradients, activations=waiting)
    # activations: hidden states for the loss, and their gradient, in loss already
    hidden = size.tokens * width * size.compute
    at_loss = here.plus(
        activations=saved.around + hidden,
        logits=logits,
        reductions=loss - logits,
        gathered=root.gathered + travelled,
    )
    # this layer, what it came in, the next
    both = layers[-1].gathered + (layers[-1].travelling if world_size > 1 else 0) + travelled
    in_layer = here.plus(
        activations=saved.forward if checkpoints else saved.stream,
        gathered=root.gathered + max(both, layers[-1].gathered + travelled + layers[-1].turned),
        temporaries=saved.products[-1],
    )
    # the buffer the root came in lives until the first layer is there
    first = root.gathered + layers[0].gathered + (layers[0].travelling if world_size > 1 else layers[0].widened)
    start = kept.plus(
        gradients=gradients,
        activations=saved.stream,
        gathered=first + (root.travelling if world_size > 1 else 0),
    )
    return max(start, at_loss, in_layer, key=lambda phase: phase.total)


def _backward(run: _Run, gradients: int, accumulates: bool) -> Phase:
    """When the loss's gradients are scaled, inside one of the layers, or when the root's gradients are reduced."""
    model, kept, saved, size = run.plan.model, run.kept, run.saved, run.size
    layers, root, world_size = run.known.layers, run.known.root, run.plan.mesh.shards
    waiting = run.waiting
    weight = model.get_output_embeddings().weight
    head = weight.numel() * size.compute if weight.requires_grad else 0
    hidden = size.tokens * weight.shape[1] * size.compute
    travelled = layers[-1].travelling if world_size > 1 else 0
    total = sum(waiting)
    of_layers = [group.stored // world_size for group in layers]
    moments = [
        kept.plus(
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
        common = kept.plus(gradients=made, gathered=root.gathered, activations=left + saved.stream)
        feed_forward = size.hidden * size.feed_forward * size.compute * (group.gradients > 0)
        middle = common.plus(
            activations=here + saved.feed_forward,
            gathered=group.gathered + ahead,
            reductions=head + reduced + min(feed_forward, group.gradients),
            temporaries=saved.products[j],
        )
        arriving = common.plus(
            activations=here if not checkpoints else waiting[j],
            gathered=group.gathered + (group.travelling + group.turned if world_size > 1 else group.widened),
            reductions=head + reduced,
        )
        end = common.plus(
            activations=saved.stream + saved.norm_backward,
            gathered=group.gathered + ahead,
            reductions=head + reduced + group.gradients,
        )
        reducing = common.plus(
            gathered=ahead,
            reductions=head + summed + group.reducing(world_size),
        )
        moments += [middle, arriving, end, reducing]
        summed += group.summed(world_size, accumulates) if run.plan.mesh.replicas > 1 else 0
        reduced = group.reduced + summed
    made = gradients if accumulates else sum(of_layers)
    # a tied weight: its gradient as embedding is added to the one as head
    embedding = root.gradients + (head if model.config.tie_word_embeddings else 0)
    last = kept.plus(gradients=made, activations=saved.stream)
    moments.append(last.plus(gathered=root.gathered, reductions=embedding + reduced))
    moments.append(last.plus(reductions=summed + root.reducing(world_size)))
    return max(moments, key=lambda phase: phase.total)


def _backward_with_updates(run: _Run, waiting: int) -> Phase:
    """As ``_backward``, when a group's gradients are reduced and one of its parameters is updated."""
    layers, root, world_size, saved = run.known.layers, run.known.root, run.plan.mesh.shards, run.saved
    moments = [_backward(run, waiting, accumulates=True)]
    weight = run.plan.model.get_output_embeddings().weight
    head = weight.numel() * run.size.compute if weight.requires_grad else 0
    for j, group in [*enumerate(layers), (0, root)]:
        left = sum(run.waiting[:j]) if group is not root else 0
        ahead = layers[j - 1].gathered if world_size > 1 and j > 0 else 0
        moments.append(
            run.kept.plus(
                gradients=waiting + group.stored // world_size,
                activations=left + saved.stream,
                gathered=ahead + (root.gathered if group is not root else 0),
                reductions=group.reduced + (head if group is not root else 0),
                refresh=(run.known.of_root if group is root else run.known.of_layers).refresh,
            )
        )
    return max(moments, key=lambda phase: phase.total)
