"""Rotations folded into the weights: the residual stream (R1) and the values of every head (R2).

The hidden states become x Q throughout. Norms that only divide by a length commute with Q once their gain is folded
into the linears that read them; readers become W Q, writers Qᵀ W, the embeddings E Q. Values are rotated within each
head by the rows of v_proj and back by the columns of o_proj. All in float64, cast once; nothing is left to do at run
time (Ashkboos et al. 2024, QuaRot, arXiv 2404.00456, section 4; Liu et al. 2024, SpinQuant, arXiv 2405.16406, fig. 1).

LayerNorm also subtracts the mean, which a general Q does not commute with and no fold removes from the architecture.
Such models get a Q that leaves the mean alone, and need no centring of writers and embeddings then.

What cannot be rotated is found out by running it: a part is run before and after, and must agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmq.errors import SpecError
from llmq.families import Linear, Structure, blocks_replaced
from llmq.transforms.folds import Fold, Norm, bias_of
from llmq.transforms.hadamard import Kind, rotation_fixing_mean, rotation_matrix
from llmq.transforms.wiring import Run, Wiring, is_norm, probe_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-4  # of a block's own contribution, and of the logits
_ROWS = 8192  # of an embedding that are held in float64 at a time


def residual_rotation(model: PreTrainedModel, structure: Structure, kind: Kind, seed: int) -> Tensor:
    """Return the Q that the hidden states of `model` will be multiplied by, float64 [D, D].

    Where the final norm subtracts the mean, Q leaves the mean alone, and is a random rotation of either kind. The
    final norm must be loaded.

    Raises:
        SpecError: the model has no norm, or several, outside the blocks.
    """
    norm = _final_norm(model, structure)
    size = len(norm.weight)
    return rotation_fixing_mean(size, seed) if norm.centers else rotation_matrix(size, kind, seed)


@torch.no_grad()
def rotate_outer_(model: PreTrainedModel, structure: Structure, q: Tensor) -> bool:
    """Rotate what is around the blocks: embeddings, final norm and head. Return whether the head was untied.

    Everything outside the blocks must be loaded; the blocks are not run. A head tied to the embedding gets a weight of
    its own, since the final norm's gain belongs to it alone: then ``tie_word_embeddings`` of the model's configuration
    has become false, and must in config.json.

    Args:
        model: what `structure` was found in.
        structure: tells the blocks from the rest.
        q: what `residual_rotation` returned.

    Raises:
        SpecError: a module outside the blocks is none of these, or the logits change; the model is then spoilt.
    """
    norm = _final_norm(model, structure)
    head, tied = _own_head(model)
    outer = [(name, m) for name, m in _outside(model, structure) if m not in (norm.module, head)]
    embeddings = [m for _, m in outer if isinstance(m, nn.Embedding) and m.weight.shape[1] == len(q)]
    for name, module in outer:
        if module not in embeddings:
            raise SpecError(
                f"{name}: a {type(module).__name__} outside the blocks, which rotation does not know; it can rotate "
                f"embeddings of width {len(q)}, one final norm and a linear head; quantize this model without rotation"
            )
    before = _logits(model, structure, norm)
    for embedding in embeddings:
        for rows in embedding.weight.detach().split(_ROWS):
            rows.copy_(rows.double() @ q.to(rows.device))
    consumers = [Linear("lm_head", head, transposed=False)]
    _fold_gain_(Fold(norm, 0, len(q), consumers, torch.arange(len(q))), q)
    after = _logits(model, structure, norm)
    _check_same("the parts around the blocks", after, before, before, model.dtype)
    return tied


@torch.no_grad()
def rotate_block_(wiring: Wiring, q: Tensor, run: Run, x: Tensor, *, kind: Kind, seed: int) -> list[str]:
    """Rotate one loaded block, and return the folds whose heads were rotated too, by name.

    Scaling folds of the block remain valid afterwards.

    Args:
        wiring: of this block, found with all of its linears, those that stay dense included.
        q: what `residual_rotation` returned, float64 [D, D].
        run: how to run the block.
        x: hidden states to check with, float32 or float64 [B, T, D], as the block takes them before: those of a stream
            that is rotated already, times Qᵀ.
        kind: of the rotation of the heads' values.
        seed: of that rotation; give every block its own.

    Raises:
        SpecError: the residual stream is not plain (a norm after attention or MLP, a router, …), or the block does
            something else after rotation; it is then spoilt.
    """
    for refusal in wiring.refused:
        if refusal.residual_norm:
            raise SpecError(f"{refusal.name}: {refusal.reason}, so that this model cannot be rotated")
    before = run(x)
    norms = [f for f in wiring.folds if isinstance(f.producer, Norm) and len(f.producer.weight) == len(q)]
    for fold in norms:
        _fold_gain_(fold, q)
    for linear in wiring.writers:
        linear.weight.copy_(q.T.to(linear.weight.device) @ linear.weight.double())
        bias = bias_of(linear.module)
        if bias is not None:
            bias.copy_(bias.double() @ q.to(bias.device))
    heads = [fold for fold in wiring.folds if isinstance(fold.producer, Linear) and fold.head_dim is not None]
    for fold in heads:
        _rotate_heads_(fold, kind, seed)
    q = q.to(x.device)
    after = run((x.double() @ q).to(x.dtype))
    rotated = before.double() @ q
    where = ", ".join(fold.producer.name for fold in norms) or "a block without norms"
    _check_same(where, after, rotated, (before - x).double(), x.dtype)
    return [fold.name for fold in heads]


def _fold_gain_(fold: Fold, q: Tensor) -> None:
    """Move a norm's gain into its consumers, and rotate what they read.

    A bias moves into the consumers' biases. Where some have none it stays: divided by the gain and rotated, it adds
    the same as before.

    Raises:
        SpecError: it would have to stay, and the gain of some channel is 0.
    """
    norm = fold.producer
    assert isinstance(norm, Norm)
    gain, bias = norm.gain, fold.bias
    if norm.centers and not torch.allclose(q.sum(dim=1), torch.ones(len(q), dtype=q.dtype)):
        raise SpecError(f"{norm.name}: subtracts the mean, which this rotation changes")
    q = q.to(gain.device)
    if bias is not None:
        theirs = [bias_of(consumer.module) for consumer in fold.consumers]
        if all(t is not None for t in theirs):
            for consumer, their in zip(fold.consumers, theirs, strict=True):
                assert their is not None
                their.copy_(their.double() + consumer.weight.double() @ bias.double())
            bias.zero_()
        else:
            moved = torch.where(bias == 0, 0.0, bias.double() / gain)
            if not moved.isfinite().all():
                raise SpecError(
                    f"{norm.name}: has a channel of gain 0 with a bias, and readers without; cannot be rotated"
                )
            bias.copy_(moved @ q)
    for consumer in fold.consumers:
        consumer.weight.copy_((consumer.weight.double() * gain) @ q)
    norm.weight.fill_(1.0 - norm.plus_one)


def _rotate_heads_(fold: Fold, kind: Kind, seed: int) -> None:
    """Rotate the values within each head by the producer's rows, and back by the consumers' columns."""
    assert fold.head_dim is not None
    r = rotation_matrix(fold.head_dim, kind, seed).to(fold.producer.weight.device)
    rows = fold.producer.weight[fold.start : fold.start + fold.channels]
    per_head = rows.double().reshape(-1, fold.head_dim, rows.shape[1])
    rows.copy_((r.T @ per_head).reshape(rows.shape))
    if fold.bias is not None:
        fold.bias.copy_((fold.bias.double().view(-1, fold.head_dim) @ r).view(-1))
    for consumer in fold.consumers:
        weight = consumer.weight
        weight.copy_((weight.double().reshape(len(weight), -1, fold.head_dim) @ r).reshape(weight.shape))


def _check_same(where: str, found: Tensor, expected: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Raise SpecError unless `found` is `expected` up to TOLERANCE of `scale` and what rounding to `dtype` explains."""
    off = float((found.double() - expected.double()).norm())
    allowed = TOLERANCE * float(scale.double().norm()) + 16 * torch.finfo(dtype).eps * float(expected.double().norm())
    if not off <= allowed:  # also where it is NaN
        raise SpecError(
            f"{where}: rotation changes what is computed by {off:g} where {allowed:g} would be rounding; something "
            "in it does not commute with rotations; quantize this model without rotation"
        )


def _outside(model: nn.Module, structure: Structure) -> list[tuple[str, nn.Module]]:
    """Return the modules outside the blocks that have parameters of their own, with their names."""
    inside = {module for block in structure.blocks for module in block.modules()}
    every = [(name, module) for name, module in model.named_modules() if module not in inside]
    return [(name, m) for name, m in every if any(True for _ in m.parameters(recurse=False))]


def _final_norm(model: nn.Module, structure: Structure) -> Norm:
    norms = [(name, module) for name, module in _outside(model, structure) if is_norm(module)]
    if len(norms) != 1:
        names = ", ".join(name for name, _ in norms) or "none"
        raise SpecError(f"{type(model).__name__}: rotation needs one norm outside the blocks, found {names}")
    return probe_norm(*norms[0])


def _own_head(model: PreTrainedModel) -> tuple[nn.Linear, bool]:
    """Return the head with a weight of its own, and whether it shared the embedding's before."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        raise SpecError(f"{type(model).__name__}: has no linear head behind an embedding, so that it cannot be rotated")
    # a tie is lost where tensors are loaded one by one: the head's then stays on the meta device
    tied = head.weight is embedding.weight or (head.weight.is_meta and model.config.tie_word_embeddings)
    if tied:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
    return head, tied


def _logits(model: PreTrainedModel, structure: Structure, norm: Norm) -> Tensor:
    """Return the logits, float64, of some tokens with every block left out.

    Raises:
        SpecError: the final norm does not come after the blocks.
    """
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding), "checked before"
    ids = torch.randint(len(embedding.weight), (1, 16), generator=torch.Generator().manual_seed(0))
    ids = ids.to(embedding.weight.device)
    order: list[str] = []

    def identity(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        order.append("block")
        return hidden

    with blocks_replaced(structure, identity):
        handle = norm.module.register_forward_hook(lambda *_: order.append("norm"))
        try:
            logits: Tensor = model.forward(input_ids=ids, use_cache=False).logits
        finally:
            handle.remove()
    if order[-1:] != ["norm"] or order.count("norm") != 1:
        raise SpecError(f"{type(model).__name__}: its norm outside the blocks does not come after them")
    return logits.double()
