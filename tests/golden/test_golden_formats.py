"""llmq reads and writes the bytes that others' packages made of the same layer, by scripts/make_golden_formats.py."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from script_loading import load_script
from torch import Tensor

from llmq.formats import FORMATS
from llmq.formats.stored import header_of
from llmq.types import QuantSpec

made = load_script("make_golden_formats")
WRITERS = ("gptqmodel-7.7.0", "compressed-tensors-0.16.0", "compressed-tensors-0.19.0")


def cases() -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each layer by its writer and case."""
    found: dict[str, dict[str, Tensor]] = {}
    for writer in WRITERS:
        with safe_open(Path(__file__).with_name(f"{writer}.safetensors"), framework="pt") as file:
            assert file.metadata() == {"writer": writer}
            for key in file.keys():  # noqa: SIM118  the file itself is no mapping
                case, local = key.split("/")
                found.setdefault(f"{writer}: {case}", {})[local] = file.get_tensor(key)
    return found


CASES = cases()


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_read_as_they_were_meant_and_written_as_they_were(case: str) -> None:
    tensors = CASES[case]
    rest, _, order = case.partition(": ")[2].partition("-order")
    ordered = order == "" and not case.endswith("-order")
    name, bits, symmetry = rest.rsplit("-", 2)
    label = QuantSpec(int(bits), made.GROUP, symmetry == "sym", name)
    layout = FORMATS[name]
    stored = layout.recognize(label, header_of(tensors), tensors.__getitem__)
    assert (stored.out_features, stored.in_features) == (made.N, made.K)
    assert (stored.spec.bits, stored.spec.symmetric) == (label.bits, label.symmetric)

    weight, columns = layout.unpack(tensors, stored.spec), layout.columns(tensors, stored.spec)
    assert (columns is None) == ordered
    codes = weight.codes.long() if columns is None else weight.codes.long()[:, columns.argsort()]
    zeros = made.zeros(label.bits, label.symmetric, lowest=1 if name.startswith("gptq") else 0)
    assert torch.equal(codes, made.codes(label.bits))
    assert torch.equal(weight.scales, made.scales())
    assert torch.equal(weight.zeros, zeros)
    dense = weight.dequantize() if columns is None else weight.dequantize()[:, columns.argsort()]
    assert torch.equal(dense, made.dense(label.bits, zeros, made.groups(ordered)))

    packed = layout.pack(weight, stored.spec, columns)
    assert header_of(packed) == header_of(tensors)
    assert all(torch.equal(packed[local], tensor) for local, tensor in tensors.items())


def test_every_format_has_bytes_of_its_writer() -> None:
    names = {case.partition(": ")[2].removesuffix("-order").rsplit("-", 2)[0] for case in CASES}
    assert names == {"gptq", "gptq_v2", "awq", "compressed-tensors", "compressed-tensors-padded"}
    assert len(CASES) == 34 + 28 + 14
