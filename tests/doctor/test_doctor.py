"""Damage planted into sound packed folders is found by name, and sound folders raise no alarm."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from command_line import assert_fails, llmq
from patients import Ward
from planting import (
    AWQ,
    DOWN,
    Q,
    add_to_zeros,
    again,
    constant_rows,
    dense,
    each,
    ends,
    linear,
    no_index,
    one,
    other_head,
    others,
    random_words,
    remove,
    reorder,
    scheme,
    settings,
    shuffle_groups,
    stale,
    tensors,
    with_index,
    without,
)
from torch import Tensor

from llmq.doctor import ERROR, NOTE, Patient, diagnose, measures
from llmq.doctor.fixing import fix
from llmq.errors import CheckpointError, SpecError
from llmq.formats import bits as bitstream
from llmq.packed import PackedCheckpoint


@pytest.fixture(scope="session")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Ward:
    return Ward(tmp_path_factory.mktemp("ward"))


EXPERT = "model.layers.0.mlp.experts.2.up_proj"


class Case(NamedTuple):
    """Damage, and what it is called."""

    name: str
    plant: Callable[[Path], None]
    made: tuple[Any, ...] = ("llama", "gptq", 4, True)
    fixable: bool = False


ASYM, CT, AWQ4 = ("llama", "gptq_v2", 4, False), ("llama", "compressed-tensors", 4, True), ("llama", "awq", 4, True)
CT_ASYM, AWQ_ASYM = (*CT[:3], False), (*AWQ4[:3], False)
MOE = ("qwen3_moe", "gptq", 4, True)

DEFECTS = [
    Case("zeros-of-other-version", settings(checkpoint_format="gptq_v2", format="gptq_v2"), fixable=True),
    Case(
        "zeros-of-other-version", settings(checkpoint_format="gptq", format="gptq"), ("llama", "gptq_v2", 8, True), True
    ),
    Case("zeros-not-symmetric", settings(sym=True), ASYM, fixable=True),
    Case("zeros-not-symmetric", settings(zero_point=False), AWQ_ASYM, fixable=True),
    Case("zeros-shifted", settings(checkpoint_format="gptq", format="gptq"), ASYM),
    Case("zeros-shifted", settings(checkpoint_format="gptq", format="gptq"), ("llama", "gptq_v2", 2, False)),
    Case("zeros-shifted", each("qzeros", add_to_zeros(1)), AWQ_ASYM),
    Case("zeros-shifted", each("weight_zero_point", add_to_zeros(-1, awq=False)), CT_ASYM),
    Case("nibble-order", each("qweight", linear), AWQ4),
    Case("nibble-order", each("qweight", linear), AWQ_ASYM),
    Case("nibble-order", others(each("qweight", linear), each("qzeros", linear)), AWQ_ASYM),
    Case("nibble-order", each("qzeros", reorder(AWQ)), ASYM),
    Case("nibble-order", each("weight_zero_point", reorder(AWQ, along=0)), CT_ASYM),
    Case("scales-transposed", each(".scales", lambda s: s.T), fixable=True),
    Case("scales-transposed", each(".weight_scale", lambda s: s.T), CT, True),
    Case("scales-in-wrong-order", each(".scales", lambda s: s.T.reshape(s.shape))),
    Case("scales-in-wrong-order", each(".weight_scale", lambda s: s.T.reshape(s.shape)), CT_ASYM),
    Case("scales-not-finite", one(f"{Q}.scales", lambda s: s.index_fill(1, torch.tensor(3), torch.inf))),
    Case("scales-not-finite", one(f"{DOWN}.weight_scale", lambda s: s.index_fill(0, torch.tensor(3), torch.nan)), CT),
    Case("scales-zero", one(f"{Q}.scales", lambda s: s.index_fill(1, torch.tensor(3), 0.0))),
    Case("scales-negative", one(f"{Q}.scales", torch.neg), ASYM),
    Case("groups-dead", one(f"{Q}.qweight", constant_rows)),
    Case("codes-saturated", one(f"{DOWN}.qweight", ends)),
    Case("codes-random", one(f"{EXPERT}.qweight", random_words), MOE),
    Case("expert-missing", without(".experts.2."), MOE),
    Case("expert-dense", tensors(lambda c: dense(c, EXPERT, (32, 64))), MOE),
    Case("expert-outlying", one(f"{EXPERT}.scales", lambda s: s * 100), MOE),
    Case("head-missing", without("lm_head")),
    Case("head-differs", tensors(other_head), ("tied", "gptq", 4, True)),
    Case("bias-missing", without("q_proj.bias"), ("qwen2", "awq", 4, False)),
    Case("tensor-missing", without("layers.1.input_layernorm"), CT),
    Case("g-idx-against-desc-act", shuffle_groups, fixable=True),
    Case("g-idx-not-honoured", others(shuffle_groups, settings(desc_act=True))),
    Case("g-idx-missing", without("g_idx"), fixable=True),
    Case("g-idx-damaged", one(f"{Q}.g_idx", lambda g: g * 2)),
    Case("config-contradicts-itself", settings(format="gptq_v2")),
    Case("config-key-missing", settings(desc_act=None), fixable=True),
    Case("config-key-missing", settings(sym=None), fixable=True),
    Case("config-key-unknown", settings(colour="blue")),
    Case("status-not-compressed", settings(quantization_status=None), CT, True),
    Case("scheme-key-unknown", scheme(colour="blue"), CT, True),
    Case("legacy-config-stale", stale, fixable=True),
    Case("bits-wrong", settings(bits=8), fixable=True),
    Case("group-size-wrong", settings(group_size=64), AWQ4, True),
    Case("dense-but-packed", settings(dynamic={rf"-:.*{Q}": {}})),
    Case("dense-but-packed", settings(ignore=["lm_head", Q]), CT),
    Case("dense-but-packed", settings(modules_to_not_convert=["lm_head", "o_proj"]), AWQ4),
    Case("packed-but-dense", tensors(lambda c: dense(c, Q, (64, 64))), CT),
    Case("packed-but-dense", tensors(lambda c: dense(c, Q, (64, 64)))),
    Case("layer-damaged", one(f"{Q}.scales", lambda s: s.int())),
    Case("layer-damaged", without(f"{Q}.qzeros"), AWQ4),
    Case(
        "index-wrong",
        with_index(lambda _, m: m.update(zip(m, reversed(list(m.values())), strict=True))),
        fixable=True,
    ),
    Case("index-incomplete", with_index(lambda _, m: m.pop(f"{Q}.qweight")), fixable=True),
    Case("index-unsafe", with_index(lambda _, m: m.update({f"{Q}.qweight": "../" + m[f"{Q}.qweight"]})), fixable=True),
    Case("index-missing", no_index, fixable=True),
    Case("shard-missing", with_index(lambda folder, m: m.update({"extra": "model-00003-of-00003.safetensors"}))),
    Case("tensor-twice", again),
    Case("tokenizer-missing", remove("tokenizer.json", "tokenizer_config.json")),
    Case("generation-config-missing", remove("generation_config.json")),
]


@pytest.mark.parametrize("case", DEFECTS, ids=lambda case: f"{case.name}-{'-'.join(map(str, case.made[:3]))}")
def test_a_planted_defect_is_found_by_name(ward: Ward, tmp_path: Path, case: Case) -> None:
    model, format, bits, sym = case.made
    sound = ward(model, format, bits, sym=sym)
    folder = Path(shutil.copytree(sound, tmp_path / "copy"))
    case.plant(folder)
    found = diagnose(folder)
    here = [finding for finding in found if finding.name == case.name]
    assert here, [finding.line() for finding in found]
    before = ward.names(*case.made)
    assert {f.name for f in found if f.severity != NOTE} <= {case.name}, [finding.line() for finding in found]
    assert case.name not in before or case.name == "scales-negative"
    assert all((finding.repair is not None) == case.fixable for finding in here)
    if case.fixable:
        fix(folder, tmp_path / "fixed")
        assert {f.name for f in diagnose(tmp_path / "fixed")} <= before | {"g-idx-not-honoured"}
        if case.name != "g-idx-against-desc-act":  # its indices are what they are
            same_weights(sound, tmp_path / "fixed")


def same_weights(a: Path, b: Path) -> None:
    first, second = PackedCheckpoint(a), PackedCheckpoint(b)
    assert sorted(first.layers) == sorted(second.layers)
    for module in first.layers:
        assert torch.equal(first.dequantized(module), second.dequantized(module))


HEALTHY = [
    *(("llama", format, bits, True) for format, bits in (("gptq", 2), ("gptq", 3), ("gptq", 4), ("gptq", 8))),
    *(("llama", "gptq_v2", bits, False) for bits in (2, 3, 4, 8)),
    ("llama", "gptq_v2", 4, True),
    ("llama", "awq", 4, True),
    ("llama", "awq", 4, False),
    ("llama", "compressed-tensors", 4, True),
    ("llama", "compressed-tensors", 3, False),
    ("llama", "compressed-tensors-padded", 3, True),
    ("tied", "gptq", 4, True),
    ("qwen2", "awq", 4, False),
    ("gpt2", "gptq", 4, True),
    ("gpt2", "compressed-tensors", 4, False),
    ("qwen3_moe", "gptq", 4, True),
    ("qwen3_moe", "compressed-tensors", 4, True),
    ("mixtral", "gptq_v2", 4, False),
    ("mixtral", "awq", 4, True),
    *(("llama", "llmq", bits, sym) for bits, sym in ((3, True), (3, False), (8, False))),
    ("qwen3_moe", "llmq", 4, False),
]


@pytest.mark.parametrize("made", HEALTHY, ids=str)
def test_a_sound_folder_raises_no_alarm(ward: Ward, made: tuple[str, str, int, bool]) -> None:
    model, format, bits, sym = made
    assert [f.line() for f in diagnose(ward(model, format, bits, sym=sym)) if f.severity != NOTE] == []


def test_engines_that_do_not_take_it_are_notes(ward: Ward) -> None:
    names = {finding.where[0] for finding in diagnose(ward(*MOE[:3])) if finding.name == "engine-refuses"}
    assert "transformers with optimum and gptqmodel" in names
    assert any(finding.name == "tensor-parallel" for finding in diagnose(ward()))


def test_on_the_command_line(ward: Ward, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ward(), tmp_path / "copy"))
    assert llmq("doctor", folder).exit_code == 0
    settings(checkpoint_format="gptq_v2", format="gptq_v2")(folder)
    found = llmq("doctor", folder)
    assert found.exit_code == 1
    assert "error: zeros-of-other-version: " in found.stdout
    assert "(--fix does it)" in found.stdout
    fixed = llmq("doctor", folder, "--fix", tmp_path / "fixed", "--json")
    assert fixed.exit_code == 0
    content = json.loads(fixed.stdout)
    assert [finding["name"] for finding in content["repaired"]] == ["zeros-of-other-version"]
    assert all(finding["severity"] != ERROR for finding in content["findings"])
    again = llmq("doctor", folder, "--fix", tmp_path / "fixed")
    assert_fails(again.exit_code, again.stdout, again.stderr, "not empty", "--force")


def test_the_advice_for_shifted_zeros_has_the_right_sign(ward: Ward, tmp_path: Path) -> None:
    for made, plant, advice in (
        (ASYM, settings(checkpoint_format="gptq", format="gptq"), "try checkpoint_format gptq_v2"),
        (AWQ_ASYM, each("qzeros", add_to_zeros(1)), "take 1 from"),
        (AWQ_ASYM, each("qzeros", add_to_zeros(-1)), "add 1 to"),
    ):
        model, format, bits, sym = made
        folder = Path(shutil.copytree(ward(model, format, bits, sym=sym), tmp_path / "copy"))
        plant(folder)
        assert advice in diagnose(folder)[0].advice
        shutil.rmtree(folder)


def test_weights_with_a_mean_of_their_own_raise_no_alarm(ward: Ward, tmp_path: Path) -> None:
    def change(words: Tensor) -> Tensor:
        codes = bitstream.unpack(words, 4, words.shape[1] * 8)
        codes[:, ::3] = (codes[:, ::3] + 1).clamp(max=15)
        return bitstream.pack(codes, 4)

    folder = Path(shutil.copytree(ward(*ASYM[:3], sym=False), tmp_path / "copy"))
    each("qzeros", change)(folder)
    patient = Patient(folder)
    assert all(seen.shift < -0.1 for module in patient.layers if (seen := patient.measures(module)) is not None)
    assert [f.line() for f in diagnose(folder) if f.severity != NOTE] == []


def test_the_largest_weight_of_a_group_shifts_nothing() -> None:
    w = torch.randn(200, 20, 8, generator=torch.Generator().manual_seed(0))
    largest = w.gather(2, w.abs().argmax(dim=2, keepdim=True))
    centred = (w / (largest / -8)).round().clamp(-8, 7)  # as symmetric grids do that reach further down than up
    assert centred.mean() < -0.9
    assert abs(measures._shift(centred)) < 0.05  # 32000 codes of standard deviation 3: 0.02


def test_a_sample_of_a_layer_says_the_same(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (ASYM, CT, CT_ASYM, AWQ_ASYM, ("gpt2", "gptq", 4, True)):
        model, format, bits, sym = made
        folder = ward(model, format, bits, sym=sym)
        whole, part = Patient(folder), Patient(folder)
        for module in whole.layers:
            monkeypatch.undo()
            expected = whole.measures(module)
            monkeypatch.setattr(measures, "_SAMPLE", 2**11)
            found = part.measures(module)
            assert expected is not None
            assert found is not None
            assert found.shift == pytest.approx(expected.shift, abs=0.3)  # of 2000 codes of standard deviation 3: 0.07
            assert found.ends == pytest.approx(expected.ends, abs=0.05)
            assert not found.interleaved
            assert not found.scales_turned


def test_links_out_of_the_folder_are_not_copied(ward: Ward, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ward(), tmp_path / "models--a/snapshots/1"))
    blobs = tmp_path / "models--a/blobs"
    blobs.mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "secret.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "tokenizer.json").rename(blobs / "0123")
    (folder / "tokenizer.json").symlink_to(blobs / "0123")
    stale(folder)
    fix(folder, tmp_path / "fixed")
    assert not (tmp_path / "fixed/secret.txt").exists()
    assert (tmp_path / "fixed/tokenizer.json").is_file()


def test_nothing_to_repair_is_said(ward: Ward, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="nothing that can be repaired"):
        fix(ward(), tmp_path / "fixed")
    assert not (tmp_path / "fixed").exists()


def test_a_dense_folder_is_no_patient(ward: Ward) -> None:
    with pytest.raises(CheckpointError, match="nothing is packed"):
        diagnose(ward.dense("llama"))
