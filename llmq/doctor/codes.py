"""Checks of codes against zeros and scales: what `llmq.doctor.measures` measures, and from when on it is an alarm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from llmq.doctor.findings import ERROR, WARNING, Finding, of_all
from llmq.doctor.measures import Measures
from llmq.doctor.patient import Layer, Patient
from llmq.formats import auto_round

_T = TypeVar("_T")

_SHIFTED = (0.6, 1.4)  # in codes: one, give or take what the weights' own mean does
_OF_LAYERS = 0.75  # share that must be shifted alike: the tool that wrote them did it to all
_DEAD = 0.01
_NOISE = 1.35  # most over least frequent sixteenth of the range; 1.6 and more for weights in groups of 16 and up


def shifted_zeros(patient: Patient) -> Iterator[Finding]:
    """Report zeros that are off by one."""
    coarse = [(layer, seen) for layer, seen in _measured(patient) if layer.spec.bits <= 4]
    for sign in (-1, 1):
        off = [(layer, seen) for layer, seen in coarse if _SHIFTED[0] < sign * seen.shift < _SHIFTED[1]]
        if coarse and len(off) >= _OF_LAYERS * len(coarse) and not _explained(patient):
            advice = "the zeros were stored for another convention; "
            if patient.quantization["quant_method"] == "gptq":
                other = "gptq" if sign > 0 else "gptq_v2"
                advice += f"try checkpoint_format {other} and compare the perplexity"
            elif off[0][0].spec.format in auto_round.PACKING_OF:
                other = auto_round.PACKING_OF["gptq" if sign > 0 else "gptq_v2"]
                advice += f"try packing_format {other} and compare the perplexity"
            else:
                advice += f"{'add 1 to' if sign > 0 else 'take 1 from'} each and compare the perplexity"
            yield Finding(
                "zeros-shifted", ERROR, tuple(layer.module for layer, _ in off),
                f"codes lie {off[0][1].shift:+.2f} from their zeros on average, in {len(off)} of {len(coarse)} layers",
                advice,
            )  # fmt: skip


def nibble_order(patient: Patient) -> Iterator[Finding]:
    """Report nibbles in the order of another format."""
    order = "0, 1, 2, …" if patient.quantization["quant_method"] == "awq" else "AWQ's, 0, 2, 4, 6, 1, …"
    yield from _found(
        "nibble-order", ERROR, [(layer, seen.interleaved) for layer, seen in _measured(patient) if seen.interleaved],
        lambda first: f"{first} fit the others only if the outputs in a word are in the order {order}",
        "the writer packed them for another format; convert again from the original",
    )  # fmt: skip


def dead_groups(patient: Patient) -> Iterator[Finding]:
    """Report groups whose codes are all alike."""
    yield from _found(
        "groups-dead", WARNING, [(layer, seen.dead) for layer, seen in _measured(patient) if seen.dead > _DEAD],
        lambda first: f"in {100 * first:.0f} % of its groups all codes are the same",
        "scales were too large for the weights; quantize these layers again",
    )  # fmt: skip


def saturated_groups(patient: Patient) -> Iterator[Finding]:
    """Report layers with too many codes at the ends of their range."""
    ends = [(layer, seen.ends) for layer, seen in _measured(patient) if seen.ends > _ends_allowed(layer)]
    yield from _found(
        "codes-saturated", WARNING, ends,
        lambda first: f"{100 * first:.0f} % of its codes are the smallest or the largest",
        "scales were too small for the weights; quantize these layers again",
    )  # fmt: skip


def noise(patient: Patient) -> Iterator[Finding]:
    """Report layers whose codes are spread evenly, as no trained weight's are."""
    wide = [(layer, seen.uniform) for layer, seen in _measured(patient) if layer.spec.bits > 2]
    yield from _found(
        "codes-random", WARNING, [(layer, factor) for layer, factor in wide if factor < _NOISE],
        lambda factor: f"every code is equally frequent (within a factor of {factor:.2f})",
        "the layer holds memory that nobody wrote, or another layout; compare it with the original",
    )  # fmt: skip


def _found(
    name: str, severity: str, layers: Sequence[tuple[Layer, _T]], says: Callable[[_T], str], advice: str
) -> Iterator[Finding]:
    """Report `layers`, if there are any, in the words of the first one's number."""
    return of_all(name, severity, [(layer.module, says(seen)) for layer, seen in layers], advice)


def _ends_allowed(layer: Layer) -> float:
    """Return the share of codes at the ends that a sound layer may have: each group has one or two, 2 bits many."""
    assert layer.stored is not None
    size = layer.spec.group_columns(layer.stored.in_features)
    return min(0.99, {2: 0.97, 3: 0.5}.get(layer.spec.bits, 0.25) + 2 / size)


def _explained(patient: Patient) -> bool:
    """Whether the zeros are those of the other version for sure, which `mislabelled` says."""
    from llmq.doctor.labels import mislabelled

    return any(True for _ in mislabelled(patient))


def _measured(patient: Patient) -> Iterator[tuple[Layer, Measures]]:
    for module, layer in patient.layers.items():
        seen = patient.measures(module)
        if seen is not None:
            yield layer, seen
