"""Packed token embeddings in files: what is written, converted and refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import llmq as command
from embedding_cases import NAME, Make, loaded, logits, maker
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, make_llama
from torch import nn

import llmq.checkpoint
import llmq.output
from llmq.adapter import compensate, open_pair
from llmq.calibration import Calibration
from llmq.convert import convert
from llmq.doctor import NOTE, diagnose
from llmq.driver import quantize
from llmq.embedding import QuantEmbedding, TiedHead
from llmq.errors import CheckpointError, SolverError, SpecError
from llmq.grids.uniform import UniformGrid
from llmq.packed import PackedCheckpoint
from llmq.recipe import Recipe
from llmq.types import QuantizedWeight, QuantSpec


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


def test_rows_are_nearest_and_scales_searched(made: Make) -> None:
    folder = made("tied", 4)
    weight = PackedCheckpoint(folder).weight(NAME)
    source = load_file(folder.parent / "dense/model.safetensors")[f"{NAME}.weight"].float()
    assert torch.equal(weight.grid.encode(source[:, :32], _at(weight, 0)), weight.codes[:, :32])
    plain = UniformGrid(4, symmetric=False).fit(source[:, :32])
    spanned = UniformGrid(4, symmetric=False).nearest(source[:, :32], plain)
    error = (weight.dequantize()[:, :32] - source[:, :32]).norm()
    assert error < 0.98 * (spanned - source[:, :32]).norm()
    report = json.loads((folder / "report.json").read_bytes())["embedding"]
    whole = float((weight.dequantize() - source).norm() / source.norm())
    assert report == {"name": NAME, "bits": 4, "group_size": 32, "weight_error": pytest.approx(whole, rel=1e-5)}


def _at(weight: QuantizedWeight, group: int) -> Any:
    from llmq.types import Affine

    return Affine(weight.scales[:, group : group + 1], weight.zeros[:, group : group + 1])


def test_the_file_is_as_large_as_the_plan_says(made: Make) -> None:
    dense, packed = made("tied", None), made("tied", 8)
    files = [sum(reader.info(key).nbytes for key in reader) for reader in map(PackedCheckpoint, (dense, packed))]
    for folder, size in zip((dense, packed), files, strict=True):
        assert json.loads((folder / "report.json").read_bytes())["bytes"]["output_tensors"] == size
    assert PackedCheckpoint(packed).specs[NAME] == QuantSpec(8, -1, True, "llmq")


@pytest.mark.parametrize("name", ["gptq", "gptq_v2", "awq", "compressed-tensors"])
def test_other_formats_say_what_to_do(tmp_path: Path, made: Make, name: str) -> None:
    dense = make_llama(tmp_path / "dense", tie_word_embeddings=True)
    recipe = Recipe(method="rtn", group_size=32, format=name, embeddings=4)
    with pytest.raises(SpecError, match="has no packed embeddings; use --format llmq"):
        quantize(dense, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        SpecError, match=rf"{NAME}: is a packed embedding, which .* has no place for; use --format llmq"
    ):
        convert(made("tied", 4, sym=name == "gptq"), tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_bits_that_do_not_exist_are_refused(tmp_path: Path, bits: int) -> None:
    dense = make_llama(tmp_path / "dense")
    with pytest.raises(SpecError, match=f"embeddings: the uniform grid has 2, 3, 4, 5, 6, 7, 8 bits, not {bits}"):
        quantize(dense, tmp_path / "out", Recipe(method="rtn", format="llmq", embeddings=bits))


def test_a_row_that_float16_cannot_scale_is_found_first(tmp_path: Path) -> None:
    dense = make_llama(tmp_path / "dense", tie_word_embeddings=True)
    content = load_file(dense / "model.safetensors")
    content[f"{NAME}.weight"][7, 3] = 1e9
    save_file(content, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SolverError, match=f"{NAME}: scale .* does not fit float16"):
        quantize(dense, tmp_path / "out", Recipe(method="rtn", format="llmq", group_size=32, embeddings=4))


def test_converting_keeps_the_rows(made: Make, tmp_path: Path) -> None:
    source = made("tied", 4)
    convert(source, tmp_path / "same", "llmq")
    assert (tmp_path / "same/model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    convert(source, tmp_path / "dense", "dense")
    weights = load_file(tmp_path / "dense/model.safetensors")
    assert torch.equal(weights[f"{NAME}.weight"], PackedCheckpoint(source).dequantized(NAME))
    expected = logits(loaded(source))
    # as above
    assert (logits(loaded(tmp_path / "dense")) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_calibrated_and_rotated_it_is_packed_as_well(tmp_path: Path) -> None:
    ids = torch.randint(1, WORDS, (8, 32), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(ids, None, "random", "none")
    dense = make_llama(tmp_path / "dense", tie_word_embeddings=True)
    for rotation in ("none", "hadamard"):
        folder = tmp_path / rotation
        recipe = Recipe(bits=8, group_size=32, format="llmq", embeddings=8, rotation=rotation, scale_search="none")
        quantize(dense, folder, recipe, calibration=calibration)
        model: Any = loaded(folder)
        assert isinstance(model.get_input_embeddings(), QuantEmbedding)
        assert isinstance(model.lm_head, TiedHead if rotation == "none" else nn.Linear)
        expected = logits(loaded(tmp_path / "dense"))
        # 8 bits everywhere: 0.6 % of each weight, which two blocks of a random model let grow
        assert (logits(model) - expected).norm() < 0.1 * expected.norm()


def test_the_doctor_and_the_commands_take_it(made: Make) -> None:
    for kind in ("tied", "untied"):
        assert [f.line() for f in diagnose(made(kind, 4)) if f.severity != NOTE] == []
    found = json.loads(command("inspect", made("tied", 8, sym=True), "--json").stdout)
    kinds = {(kind["bits"], kind["group_size"], kind["layers"]) for kind in found["packed"]["kinds"]}
    assert kinds == {(4, 32, 14), (8, -1, 1)}


def test_rows_are_written_piece_by_piece(made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made("tied", 3).parent / "dense"
    recipe = Recipe(method="rtn", bits=4, sym=False, group_size=32, format="llmq", embeddings=3)
    monkeypatch.setattr(llmq.checkpoint, "_PIECE", 64 * 4 * 50)  # rows
    quantize(source, tmp_path / "pieces", recipe)
    whole, pieces = (folder / "model.safetensors" for folder in (made("tied", 3), tmp_path / "pieces"))
    assert whole.read_bytes() == pieces.read_bytes()
    said = [
        json.loads((path.parent / "report.json").read_bytes())["embedding"]["weight_error"] for path in (whole, pieces)
    ]
    assert said[0] == pytest.approx(said[1], rel=1e-6)


def test_rewritten_rows_are_written_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = make_llama(tmp_path / "dense", tie_word_embeddings=True)
    ids = torch.randint(1, WORDS, (4, 16), generator=torch.Generator().manual_seed(0))
    recipe = Recipe(group_size=32, format="llmq", embeddings=3, rotation="hadamard", shift=0)
    for rows in (4096, 50):
        monkeypatch.setattr(llmq.output, "_ROWS", rows)
        quantize(dense, tmp_path / str(rows), recipe, calibration=Calibration(ids, None, "random", "none"))
    one, two = (PackedCheckpoint(tmp_path / name) for name in ("4096", "50"))
    assert all(torch.equal(one.read(key), two.read(key)) for key in one)


def test_a_run_that_is_stopped_while_it_writes_rows_goes_on(
    made: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made("tied", 4).parent / "dense"
    recipe = Recipe(method="rtn", bits=4, sym=False, group_size=32, format="llmq", embeddings=4)

    def stopped(*_: object) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llmq.output, "nearest", stopped)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path / "out", recipe)
    assert not (tmp_path / "out/config.json").exists()
    with pytest.raises(CheckpointError, match="embeddings"):
        quantize(source, tmp_path / "out", recipe.model_copy(update={"embeddings": 5}))
    quantize(source, tmp_path / "out", recipe)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (made("tied", 4) / "model.safetensors").read_bytes()


def test_an_adapter_learns_on_top_of_packed_rows(made: Make) -> None:
    pair = open_pair(made("tied", 4), made("tied", 4).parent / "dense")
    ids = torch.randint(1, WORDS, (4, 16), generator=torch.Generator().manual_seed(0))
    found = compensate(pair, Calibration(ids, None, "random", "none"), 2)
    assert len(found.layers) == 14
    assert not any("embed_tokens" in name for name in found.tensors)
    assert all(layer.loss_after < layer.loss_before for layer in found.layers)
