"""Folders on codebooks of vectors: sound ones raise no alarm, and planted defects are found by name."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from patients import Ward
from planting import DOWN, Q, one, tensors
from torch import Tensor

from llmq.doctor import ERROR, NOTE, WARNING, Patient, diagnose, vectors

SOUND = [("llama", "vq2", 4), ("llama", "vq2", 1), ("llama", "vq4", 2), ("gpt2", "vq4", 1), ("qwen3_moe", "vq8", 1)]


@pytest.fixture(scope="session")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Ward:
    return Ward(tmp_path_factory.mktemp("vectors"))


def alarms(folder: Path) -> dict[str, str]:
    return {finding.name: finding.severity for finding in diagnose(folder) if finding.severity != NOTE}


@pytest.mark.parametrize("made", SOUND, ids=str)
def test_a_sound_folder_of_vectors_raises_no_alarm(ward: Ward, made: tuple[str, str, int]) -> None:
    folder = ward(*made)
    assert alarms(folder) == {}
    patient = Patient(folder)
    assert all(layer.stored is not None for layer in patient.layers.values())
    assert {patient.measures(module) for module in patient.layers} == {None}  # those are of single weights


def last(value: float) -> Callable[[Tensor], Tensor]:
    """Return what writes `value` into one place of a tensor."""

    def change(t: Tensor) -> Tensor:
        t = t.clone()
        t[-1, -1] = value
        return t

    return change


def other_size(n: int, k: int) -> Callable[[Tensor], Tensor]:
    return lambda shape: shape + torch.tensor([n, k])


def every(value: int) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.full_like(t, value)


CASES = [
    ("scales-not-finite", ERROR, "scales", last(torch.nan)),
    ("scales-not-finite", ERROR, "scales", last(torch.inf)),
    ("scales-zero", WARNING, "scales", last(0.0)),
    ("entries-out-of-range", ERROR, "codebook", last(-128)),
    ("codebook-zero", WARNING, "codebook", every(0)),
    ("codes-of-one-entry", WARNING, "codes", every(0)),
    ("codes-of-one-entry", WARNING, "codes", every(0x77)),
    ("layer-of-other-size", ERROR, "shape", other_size(0, -1)),  # as many codes, the last one for less columns
    ("layer-damaged", ERROR, "shape", other_size(1, 0)),
    ("layer-damaged", ERROR, "shape", other_size(0, 4)),
    ("layer-damaged", ERROR, "shape", every(-1)),
    ("layer-damaged", ERROR, "codebook", lambda t: t[1:]),
]


@pytest.mark.parametrize(("name", "severity", "local", "change"), CASES)
def test_a_planted_defect_of_vectors_is_found(
    name: str, severity: str, local: str, change: Callable[[Tensor], Tensor], ward: Ward, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(ward("llama", "vq4", 1), tmp_path / "copy"))
    one(f"{Q}.{local}", change)(folder)
    assert alarms(folder) == {name: severity}
    (found,) = (finding for finding in diagnose(folder) if finding.name == name)
    assert found.where == (Q,)


def test_findings_count_and_name_every_layer(ward: Ward, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ward("llama", "vq4", 2), tmp_path / "copy"))

    def damage(content: dict[str, Tensor]) -> None:
        for module in (Q, DOWN):
            content[f"{module}.codebook"][:3, 1] = -128
            content[f"{module}.codebook"][2, 2] = -128

    tensors(damage)(folder)
    (found,) = (finding for finding in diagnose(folder) if finding.severity == ERROR)
    assert found.where == (Q, DOWN)
    assert found.seen == "3 of 256 entries have numbers below -127"


def test_codes_are_read_until_two_differ(ward: Ward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 16 codes of 8 bits, two rows at a time: the last code is as good as the second."""
    monkeypatch.setattr(vectors, "_PIECE", 32)
    folder = Path(shutil.copytree(ward("llama", "vq4", 2), tmp_path / "copy"))
    same = torch.full((64, 16), 5, dtype=torch.uint8)
    changes = (last(6), {}), (lambda t: torch.cat([t[:2], t[2:] + 1]), {}), (every(5), {"codes-of-one-entry": WARNING})
    for change, expected in changes:
        one(f"{Q}.codes", lambda _, change=change: change(same))(folder)  # type: ignore[misc]
        assert alarms(folder) == expected


def test_bits_beyond_the_last_code_do_not_count(ward: Ward) -> None:
    """A row of one code of 4 bits has four bits that mean nothing."""
    patient = Patient(ward("llama", "vq4", 1))
    layer = patient.layers[Q]
    assert layer.stored is not None
    tiny = layer.stored.__class__(layer.spec, 3, 4, layer.stored.layout)
    header = {**layer.header, "codes": ((3, 1), torch.uint8)}
    stored = {f"{Q}.codes": torch.tensor([[0x1F], [0x2F], [0x3F]], dtype=torch.uint8)}
    patient.read = lambda key, rows=None: stored[key] if rows is None else stored[key][rows]  # type: ignore[method-assign]
    patient.layers[Q] = layer.__class__(Q, layer.spec, header, tiny, "")
    assert vectors._the_only_code(patient, patient.layers[Q]) == 15
    patient.layers[Q] = layer.__class__(Q, layer.spec, header, tiny.__class__(layer.spec, 1, 4, tiny.layout), "")
    assert vectors._the_only_code(patient, patient.layers[Q]) is None, "of one code nothing can be said"
