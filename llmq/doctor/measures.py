"""Numbers that tell a damaged layer from a sound one, from a sample of its codes.

Weights of a trained linear layer lie around zero. So codes lie around their zero point: the mean of ``q - z`` over a
layer is near 0, and -1 or 1 if zeros were read by the wrong version's rule. A group's scale follows its largest weight,
which makes the spread of its codes smaller the larger the scale is, and its zero point follows the mean of its codes.
Both correlations vanish where codes, zeros and scales of different outputs are put together, as a wrong order of the
nibbles does. An order is called wrong only if another one explains the layer clearly better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmq.formats import FORMATS, Stored
from llmq.types import QuantizedWeight

Fetch = Callable[..., Tensor]  # local name, and rows of the first dimension, to tensor

_SAMPLE = 2**20  # codes
_BETTER = 0.25  # by which a correlation must be better for another order to be believed
_CLEAR = 0.3
_DEVIATIONS = 5  # of a correlation of noise, 1 / sqrt(count)
_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # output in nibble 0, 1, … of AWQ's words


@dataclass(frozen=True)
class Measures:
    """Statistics of one layer."""

    shift: float  # mean of q - z
    dead: float  # share of groups whose codes are all equal, but not to the zero
    ends: float  # share of codes that are the smallest or largest
    uniform: float  # largest share of a sixteenth of the codes' range over the smallest; near 1: noise
    interleaved: str  # what would fit better in the other order of nibbles: codes, zeros, or nothing
    scales_turned: bool  # whether scales would fit better with their memory read in the other direction


def measure(stored: Stored, fetch: Fetch) -> Measures:
    """Return the statistics of a layer.

    Raises:
        LlmqError: its tensors do not fit each other.
    """
    weight = _sample(stored, fetch)
    bits, (n, k) = stored.spec.bits, weight.codes.shape
    size = min(weight.group_size, k)
    groups = k // size
    codes = weight.codes[:, : groups * size].reshape(n, groups, size).float()
    zeros, scales = weight.zeros[:, :groups], weight.scales[:, :groups]
    low, high = codes.aminmax(dim=2)
    equal = (low == high) & (low != zeros)
    top = 2**bits - 1
    ends = ((codes == 0) | (codes == top)).float().mean()
    spread, mean = codes.std(dim=2, unbiased=False).clamp_min(0.1).log(), codes.mean(dim=2)
    size_log = scales.abs().clamp_min(1e-30).nan_to_num(1.0).log()
    return Measures(
        shift=_shift(codes - zeros[:, :, None]),
        dead=float(equal.float().mean()),
        ends=float(ends),
        uniform=_unevenness(weight.codes, bits),
        interleaved=_interleaved(stored, spread, mean, size_log, zeros) if bits == 4 and n % 8 == 0 else "",
        scales_turned=groups > 1
        and _is_better(-_fit(spread, size_log), -_fit(spread, _turned(size_log, stored)), n * groups),
    )


def _sample(stored: Stored, fetch: Fetch) -> QuantizedWeight:
    """Return the first groups of inputs, or first outputs, of a layer; all of one that is small."""
    spec, n, k = stored.spec, stored.out_features, stored.in_features
    format = FORMATS[spec.format]
    index = any(name.endswith("g_idx") for name in stored.layout) and not _in_order(stored, fetch)
    cut = n * k > _SAMPLE and not index
    if "qweight" in stored.layout:
        loose = replace(spec, symmetric=False)  # zeros are there in any case, and may be wrong
        size = min(spec.group_columns(k), k)
        groups = min(-(-k // size), max(1, _SAMPLE // (n * size))) if cut else -(-k // size)
        words = groups * size * spec.bits // 32 if spec.format != "awq" else groups * size
        if not cut or groups * size * spec.bits % 32:
            return format.unpack({name: fetch(name) for name in stored.layout}, loose)
        tensors = {
            name: fetch(name, slice(0, words if name == "qweight" else groups))
            for name in stored.layout
            if name != "g_idx"
        }
        return format.unpack(tensors, loose)
    rows = min(n, max(32, _SAMPLE // k // 32 * 32)) if cut else n
    if "codes" in stored.layout:
        tensors = {name: fetch(name, slice(0, rows)) for name in ("codes", "scales", "zeros") if name in stored.layout}
        return format.unpack(tensors | {"shape": torch.tensor([rows, k])}, spec)
    tensors = {name: fetch(name) for name in stored.layout if name not in ("weight_packed", "weight_scale")}
    tensors |= {name: fetch(name, slice(0, rows)) for name in ("weight_packed", "weight_scale")}
    tensors["weight_shape"] = torch.tensor([rows, k])
    if "weight_zero_point" in tensors and rows < n:
        words = FORMATS[spec.format].layout(spec, rows, k)["weight_zero_point"][0][0]
        tensors["weight_zero_point"] = tensors["weight_zero_point"][:words]
    return format.unpack(tensors, spec)


def _in_order(stored: Stored, fetch: Fetch) -> bool:
    name = next(name for name in stored.layout if name.endswith("g_idx"))
    return FORMATS[stored.spec.format].columns({name: fetch(name)}, stored.spec) is None


def _shift(centred: Tensor) -> float:
    """Return the mean of ``q - z`` [N, G, S] without the furthest of each group.

    Symmetric grids reach one code further down than up, and writers that use it put the largest weight there, always.
    """
    furthest = centred.abs().argmax(dim=2, keepdim=True)
    total = centred.sum() - centred.gather(2, furthest).sum()
    return float(total / max(1, centred.numel() - furthest.numel()))


def _unevenness(codes: Tensor, bits: int) -> float:
    """Return the ratio of the most to the least frequent of (up to) sixteen parts of the range of the codes."""
    parts = codes.long() >> max(0, bits - 4)
    counts = torch.bincount(parts.flatten(), minlength=2 ** min(bits, 4))
    return float(counts.max() / counts.min().clamp_min(1))


def _centred(x: Tensor) -> Tensor:
    """Return `x` [N, G] without what rows and columns have in common."""
    x = x - x.mean()
    if x.shape[1] > 1:
        x = x - x.mean(dim=1, keepdim=True)
    return x - x.mean(dim=0, keepdim=True)


def _fit(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two [N, G]."""
    a, b = _centred(a), _centred(b)
    norm = float(a.norm() * b.norm())
    return float((a * b).sum()) / norm if norm > 0 else 0.0


def _is_better(own: float, other: float, count: int) -> bool:
    """Whether an `other` arrangement, whose correlation should be large, is to be believed instead of the `own`."""
    return other > max(_CLEAR, _DEVIATIONS / count**0.5) and other > own + _BETTER


def _interleaved(stored: Stored, spread: Tensor, mean: Tensor, size_log: Tensor, zeros: Tensor) -> str:
    """Return what has the nibbles of its words, which hold eight outputs, in the order of the other format."""
    awq, count = stored.spec.format == "awq", spread.numel()
    if awq:
        if _is_better(-_fit(spread, size_log), -_fit(_reordered(spread, awq), size_log), count):
            return "codes"
        if _is_better(_fit(mean, zeros), _fit(_reordered(mean, awq), zeros), count):
            return "codes"
    if not stored.spec.symmetric and _is_better(_fit(mean, zeros), _fit(mean, _reordered(zeros, awq)), count):
        return "zeros"
    return ""


def _reordered(x: Tensor, awq: bool) -> Tensor:
    """Return the rows of `x` [N, G] as a reader has them who takes words for the other format's."""
    order = _ORDER if awq else _ORDER.argsort()
    return x.reshape(-1, 8, x.shape[1])[:, order].reshape(x.shape)


def _turned(x: Tensor, stored: Stored) -> Tensor:
    """Return `x` [N, G] as it is if its memory was written in the other direction."""
    n, groups = x.shape
    return x.T.reshape(n, groups) if "qweight" in stored.layout else x.reshape(groups, n).T
