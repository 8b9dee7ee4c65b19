"""How much each calibration token matters to the end loss, layer by layer: token weights for Hessians.

An error E of a weight changes the outputs of its linear by ``E x_t`` at token t, and the end loss, to second order and
with the gradients of different tokens taken as independent, by ``Σ_t (g_t · E x_t)²``, g_t the gradient of the loss
with respect to the output y_t. Keeping the diagonal of ``g gᵀ`` gives row o the Hessian ``Σ_t g_to² x_t x_tᵀ``; rows
share the mean of g² over their group (Kim et al. 2025, GuidedQuant, arXiv 2505.07004).

One forward and one backward pass of the original model give all of them. No weight gets a gradient, and each block is
run again on the way back, so that what is kept of it in between is its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmq.calibration import Calibration
from llmq.errors import CalibrationError, SpecError
from llmq.families import Linear, find_structure
from llmq.moe import Bank, banks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_GROUPS = 4
# The logits of a batch and their gradient are held at once: 8 bytes per token and word, 2 GB at 128 000 words.
TOKENS_PER_BATCH = 2048


def token_weights(
    model: PreTrainedModel,
    linears: Sequence[Linear],
    calibration: Calibration,
    *,
    groups: int = 1,
    batch_tokens: int = TOKENS_PER_BATCH,
    loss: Literal["nll", "self"] = "nll",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the weight of every calibration token for each linear, by name, float32 [groups, S, L] on the CPU.

    It is the mean over a group of rows of ``(∂ loss / ∂ y)²``, scaled to a mean of 1 over the tokens that the attention
    mask lets through; padding weighs 0. The loss is the sum of the cross entropies at `calibration.counted`: a sum and
    not a mean, so that no gradient underflows and the batches do not matter. Tokens at which no loss counts do weigh
    something wherever later ones attend to them. A group of rows on which the loss does not depend weighs all tokens
    alike. Where one forward pass calls a linear several times, the squares add up.

    Args:
        model: the original model in evaluation mode with all weights loaded, on the device to run on; left as it was.
        linears: linears of the blocks of `model`.
        calibration: S windows of L tokens.
        groups: contiguous groups of output rows, 1 to 4; `group_rows` has their sizes.
        batch_tokens: tokens that run at a time, rounded to whole windows, at least one.
        loss: the next token to predict is the one in the text ("nll": the empirical Fisher matrix) or one drawn from
            the model's own prediction ("self": the Fisher matrix, the curvature of the KL divergence).
        seed: of the tokens drawn for "self"; they do not depend on `batch_tokens`.

    Raises:
        SpecError: `groups` is out of range, or a linear is unused or sees other tokens than those of the windows.
        CalibrationError: no position counts, or gradients are not finite.
    """
    for linear in linears:
        group_rows(linear.shape[0], groups, linear.name)
    counted = calibration.counted
    if not counted.any():
        raise CalibrationError(f"{calibration.source}: no token has a next one to predict; give longer samples")
    samples, length = calibration.input_ids.shape
    sums = {linear.name: torch.zeros(groups, samples, length) for linear in linears}
    used: set[str] = set()
    blocks = find_structure(model).blocks
    device = next(model.parameters()).device
    size = max(1, batch_tokens // length)
    for start in range(0, samples, size):
        rows = slice(start, start + size)
        ids = calibration.input_ids[rows].to(device)
        mask = None if calibration.attention_mask is None else calibration.attention_mask[rows].long().to(device)
        parts = {name: total[:, rows] for name, total in sums.items()}
        with _differentiable(model, blocks), _watched(linears, parts, used, banks_of(model).values()):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            targets = ids.roll(-1, dims=1) if loss == "nll" else _draw(logits.detach(), seed + start)
            _loss(logits, targets, counted[rows].to(device)).backward()
    routed = {module for bank in banks_of(model).values() for module in bank.places()}
    for linear in linears:
        if linear.name not in used and linear.module not in routed:
            raise SpecError(f"{linear.name}: the loss does not depend on it; leave it out with --ignore")
    valid = torch.ones_like(counted) if calibration.attention_mask is None else calibration.attention_mask
    return {name: _normalized(total, valid, name) for name, total in sums.items()}


def winsorize(weights: dict[str, Tensor], share: float, attention_mask: Tensor | None) -> dict[str, Tensor]:
    """Return `weights` limited, per linear and group, to their `share` quantile, again with a mean of 1.

    Gradients have heavy tails: on an 8 M Llama the 1 % heaviest tokens carried a quarter of the weight of q, k and v
    projections, one token up to 5000 times the mean, and the rest hardly counted.

    Args:
        weights: from `token_weights`, [groups, S, L] each.
        share: of the tokens that keep their weight, above 0 and up to 1, which changes nothing.
        attention_mask: bool [S, L] of the calibration; what it leaves out keeps weight 0. None: every token is valid.

    Raises:
        SpecError: `share` is out of range.
    """
    if not 0 < share <= 1:
        raise SpecError(f"share of tokens that keep their weight is {share}; use a number above 0 and up to 1")
    limited = {}
    for name, weight in weights.items():
        valid = torch.ones_like(weight[0], dtype=torch.bool) if attention_mask is None else attention_mask
        inside = weight[:, valid]  # [groups, tokens]
        rank = math.ceil(share * inside.shape[1])
        limit = inside.kthvalue(rank, dim=1).values[:, None, None]
        # more tokens than `share` weigh nothing: there is no tail to limit, only the few that matter
        limited[name] = _normalized(torch.where(limit > 0, weight.minimum(limit), weight), valid, name)
    return limited


def group_rows(n: int, groups: int, where: str) -> list[int]:
    """Return how many of the `n` rows of a linear are in each group; the sizes differ by one at most.

    Raises:
        SpecError: `groups` is not 1 to 4, or there are fewer rows; `where` names the linear.
    """
    if not 1 <= groups <= min(MAX_GROUPS, n):
        raise SpecError(f"{where}: {groups} groups of {n} output rows; use 1 to {MAX_GROUPS}, and at most one per row")
    return [len(part) for part in torch.arange(n).tensor_split(groups)]


def _loss(logits: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
    """Return the summed cross entropy of `targets` [B, L] where `counted` [B, L]; `logits` are [B, L, V]."""
    logits = logits[counted].to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits, targets[counted], reduction="sum")


def _draw(logits: Tensor, seed: int) -> Tensor:
    """Return one token per position drawn from softmax of `logits` [B, L, V], int64 [B, L]; row b has seed + b."""
    cumulative = logits.float().softmax(dim=-1).cumsum(dim=-1)
    draws = [
        torch.rand(logits.shape[1], 1, generator=torch.Generator().manual_seed(seed + b)) for b in range(len(logits))
    ]
    # the last entry is 1 up to rounding; with it as the unit no draw lies beyond
    found = torch.searchsorted(cumulative, torch.stack(draws).to(logits.device) * cumulative[..., -1:], right=True)
    return found.squeeze(-1).clamp(max=logits.shape[-1] - 1)


def _normalized(total: Tensor, valid: Tensor, where: str) -> Tensor:
    """Return `total` [groups, S, L] with a mean of 1 over `valid` [S, L] and 0 elsewhere."""
    total = torch.where(valid, total, 0.0)
    if not total.isfinite().all():
        raise CalibrationError(
            f"{where}: gradients of the end loss are NaN or infinite; run with --dtype float32 (float16 overflows on "
            "models trained in bfloat16) or check the weights"
        )
    mean = total.sum(dim=(1, 2), keepdim=True) / valid.sum()
    return torch.where(mean > 0, total / mean, valid.float())


@contextmanager
def _watched(
    linears: Sequence[Linear], sums: dict[str, Tensor], used: set[str], banks: Iterable[Bank]
) -> Iterator[None]:
    """Add the squared gradients of the linears' outputs to `sums`, [groups, B, L] each, while a batch goes back.

    Linears in `banks` get the tokens that are routed to them; the others weigh nothing there.
    """
    bank_of = {module: bank for bank in banks for module in bank.places()}

    def watch(linear: Linear) -> Callable[[nn.Module, Any, Tensor], None]:
        total = sums[linear.name]
        sizes = group_rows(linear.shape[0], len(total), linear.name)

        def add(rows: Tensor | None, gradient: Tensor) -> None:
            squares = gradient.reshape(-1, gradient.shape[-1]).float().square()
            means = torch.stack([part.mean(dim=1) for part in squares.split(sizes, dim=1)])
            if rows is None:
                total.add_(means.view(total.shape).to(total.device))
            else:  # no copy: a batch's windows lie side by side
                for part, mean in zip(total, means.to(total.device), strict=True):
                    part.view(-1).index_add_(0, rows.to(total.device), mean)
            used.add(linear.name)

        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            rows = bank_of[linear.module].rows if linear.module in bank_of else None
            if rows is None and output.numel() != total[0].numel() * output.shape[-1]:
                raise SpecError(
                    f"{linear.name}: gets {output.numel() // output.shape[-1]} tokens of {total[0].numel()}; end-loss "
                    "weights need layers that see every token: leave it out, or calibrate without them"
                )
            if output.requires_grad:
                output.register_hook(partial(add, rows))

        return hook

    with ExitStack() as stack:
        for linear in linears:
            stack.callback(linear.module.register_forward_hook(watch(linear)).remove)
        yield


@contextmanager
def _differentiable(model: PreTrainedModel, blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let gradients flow back to what enters the first block, and to no weight; each block is checkpointed."""
    with ExitStack() as stack:
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_)
                parameter.requires_grad_(False)
        for block in blocks:
            block.forward = _checkpointed(block.forward, first=block is blocks[0])
            stack.callback(delattr, block, "forward")
        with torch.enable_grad():
            yield


def _checkpointed(forward: Callable[..., Any], *, first: bool) -> Callable[..., Any]:
    """Return `forward` that keeps only its inputs; the `first` block's are where gradients end."""

    def run(*args: Any, **kwargs: Any) -> Any:
        if not args:
            args = (kwargs.pop("hidden_states"),)
        if first:
            args = (args[0].detach().requires_grad_(), *args[1:])
        # nothing is random in a model that is not being trained
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run
