"""Applies function-preserving transforms to a model on its way through the driver, one block at a time.

Rotation comes first, since it mixes channels that scaling tells apart. A scaling is kept only where the job's own
solver loses clearly less with it on held-out tokens: that a cheaper quantizer would gain says little.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmq.families import Linear, Structure, linears_of
from llmq.hessian import HessianSum
from llmq.layers import answer
from llmq.moe import banks_of
from llmq.preflight import Job
from llmq.stream import Stage, Stream
from llmq.transforms import (
    Fold,
    apply_scales_,
    awq_scales,
    clipped_rtn,
    find_wiring,
    refuse_shared,
    residual_rotation,
    rotate_block_,
    rotate_outer_,
    smooth_scales,
)
from llmq.transforms.scaling import pooled_max

_WORTHWHILE = 0.9  # of the loss without a scaling: below that it is kept; less is within what other layers undo


@dataclass
class Rewriter:
    """What has become of a model under the recipe's transforms."""

    job: Job
    rotation: Tensor | None = None  # float64 [D, D]
    changed: set[str] = field(default_factory=set)  # names of tensors that are no longer those of the files
    notes: list[str] = field(default_factory=list)  # what was done, for the report

    @torch.no_grad()
    def outer(self) -> None:
        """Rewrite what is around the blocks; it must be loaded.

        Raises:
            SpecError: the model cannot be rotated.
        """
        job = self.job
        if job.recipe.rotation == "none" and job.recipe.scaling == "none":
            return
        refuse_shared(job.structure.blocks)
        if job.recipe.rotation == "none":
            return
        self.rotation = residual_rotation(job.model, job.structure, job.recipe.rotation, job.recipe.seed)
        before = _tensors(job.model, job.structure)
        rotate_outer_(job.model, job.structure, self.rotation)
        for name, tensor in _tensors(job.model, job.structure).items():
            tensor.copy_(tensor.to(job.stored_dtype))  # what is written is what the rest is calibrated on
            if name in before:
                self.changed.add(name)
        self.notes.append(f"residual stream rotated ({job.recipe.rotation})")

    @torch.no_grad()
    def block(self, block: nn.Module, index: int, stream: Stream) -> None:
        """Rewrite a loaded block, in front of which `stream` stands.

        Raises:
            SpecError: the block cannot be rotated.
        """
        recipe, prefix = self.job.recipe, self.job.structure.prefixes[index]
        if recipe.rotation == "none" and recipe.scaling == "none":
            return
        linears = linears_of(block, prefix)

        def run(x: Tensor) -> Tensor:
            return stream.through(block, index, 0, x)

        # every argument of the call is made for the whole batch
        probe = stream.hidden[0]
        if self.rotation is not None:
            probe = (probe.double() @ self.rotation.T.to(probe.device)).to(probe.dtype)
        # what an expert reads is not one tensor: which tokens reach it differs from batch to batch
        routed = {module for bank in banks_of(block).values() for module in bank.places()}
        wiring = find_wiring(block, [linear for linear in linears if linear.module not in routed], run, probe)
        if self.rotation is not None:
            kind = recipe.rotation
            assert kind != "none", "there is a rotation"
            heads = rotate_block_(wiring, self.rotation, run, probe, kind=kind, seed=recipe.seed + index)
            self.notes.extend(f"{name}: heads rotated" for name in heads)
        if recipe.scaling != "none":
            for fold in wiring.folds:
                self._scale(block, index, stream, fold)
        dense = {f"{linear.name}.weight" for linear in linears}
        self.changed |= {prefix + name for name, _ in block.named_parameters() if prefix + name not in dense}

    def _scale(self, block: nn.Module, index: int, stream: Stream, fold: Fold) -> None:
        """Scale one fold if that pays."""
        if any(consumer.name not in self._packed for consumer in fold.consumers):
            return
        train, judge, mean_abs = _inputs(block, index, stream, fold)
        h = train.mean(fold.name)
        weights = [consumer.weight.float() for consumer in fold.consumers]
        stacked = torch.cat(weights)
        if self.job.recipe.scaling == "awq":
            quantize = clipped_rtn(self.job.grid, self.job.spec.group_columns(h.shape[0]))
            c = awq_scales(mean_abs, weights, h, quantize, fold.source).scales
        else:
            rms, norms = h.diagonal().sqrt(), stacked.norm(dim=0)
            c = smooth_scales(pooled_max(rms, fold.source), pooled_max(norms, fold.source))
        by_input = c[fold.source.to(c.device)].float()
        measure = h if judge is None else judge.mean(fold.name)
        plain = answer(self.job, stacked, h).dequantize() - stacked
        scaled = (
            answer(self.job, stacked * by_input, h / (by_input[:, None] * by_input)).dequantize() / by_input - stacked
        )
        losses = [float(((error @ measure) * error).sum()) for error in (plain, scaled)]
        if losses[1] < _WORTHWHILE * losses[0]:
            apply_scales_(fold, c)
            self.notes.append(f"{fold.name}: scaled ({self.job.recipe.scaling}), loss x {losses[1] / losses[0]:.3f}")

    @property
    def _packed(self) -> set[str]:
        return {linear.name for linear in self.job.linears}


def _tensors(model: nn.Module, structure: Structure) -> dict[str, Tensor]:
    """Return the float tensors outside the blocks, by name; tied ones once."""
    return {
        name: p.detach()
        for name, p in model.named_parameters()
        if not name.startswith(structure.prefixes) and p.is_floating_point() and not p.is_meta
    }


def _inputs(block: nn.Module, index: int, stream: Stream, fold: Fold) -> tuple[HessianSum, HessianSum | None, Tensor]:
    """Return the Hessian sums of a fold's inputs, those of held-out tokens apart, and the mean of their magnitudes."""
    first = fold.consumers[0]
    k, device = first.shape[1], stream.hidden.device
    train, judge = HessianSum(k, device), HessianSum(k, device)
    total = torch.zeros(k, device=device)
    stage = Stage([Linear(first.name, first.module, first.transposed)], calls=1)
    for number, batch in enumerate(stream.batches):
        for x in stream.inputs(block, index, stage, number):
            (judge if batch.held_out else train).add_(x, batch.valid)
            if not batch.held_out:
                flat = x.flatten(0, -2) if batch.valid is None else x[batch.valid]
                total += flat.float().abs().nan_to_num().sum(dim=0)
    return train, judge if judge.tokens else None, total / max(train.tokens, 1)
