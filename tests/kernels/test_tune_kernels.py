"""What scripts/tune_kernels.py makes of times, with times made up."""

import json
import math
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICE, random_x
from script_loading import load_script

from llmq_kernels import tables
from llmq_kernels.tables import Few, Tile

tune_kernels = load_script("tune_kernels")
SHAPES = ["64x64", "128x64"]


def made_up(row: Few | Tile | None, m: int, shape: str) -> float:
    """Sums cost M, at best with 32 rows and 2 warps; tiles 2.5 per tile of tokens; dense 30 and a hundredth of M."""
    size = 1.0 if shape == "64x64" else 2.0
    if row is None:
        return size * (30 + m / 100)
    if isinstance(row, Few):
        return size * (m + abs(row.block_n - 32) + abs(row.num_warps - 2))
    if row.num_stages == 5:
        return math.inf
    return size * 2.5 * -(-m // row.block_m) * (1 + row.block_m / 1000 + (row.block_n == 64) + row.post_scale)


def test_the_fastest_rows_make_the_table() -> None:
    table = tune_kernels.tune(made_up, SHAPES)
    assert table["few"] == [
        {"max_m": 1, "block_n": 32, "num_warps": 2},
        {"max_m": 2, "block_n": 32, "num_warps": 2},
    ]
    assert [row["max_m"] for row in table["tiles"]] == [16, 32, 64, 128, 512]
    assert [row["block_m"] for row in table["tiles"]] == [16, 32, 64, 128, 128]
    assert all(row["block_n"] == 128 and row["num_stages"] < 5 and not row["post_scale"] for row in table["tiles"])
    # 128 tokens a tile: 2.8 each at 2048 is 45, and 50 dense; at 4096 it is 90 against 71.
    assert table["many_from"] == 4096


def test_without_tiles_dense_follows_the_sums() -> None:
    table = tune_kernels.tune(lambda row, m, shape: math.inf if isinstance(row, Tile) else 1.0, SHAPES)
    assert table["tiles"] == []
    assert [row["max_m"] for row in table["few"]] == [1, 2, 4]
    assert table["many_from"] == 5


def test_dense_begins_where_it_is_faster_or_where_nothing_was_timed() -> None:
    table = tune_kernels.tune(lambda row, m, shape: 2.0 if row is None else 1.0, SHAPES)
    assert table["many_from"] == 4097
    assert table["few"] == []  # a tie goes to the tile
    faster = tune_kernels.tune(lambda row, m, shape: 1.0 if row is None else 2.0, SHAPES)
    assert faster["many_from"] == 64


def test_a_tuned_table_is_read_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = tune_kernels.tune(made_up, SHAPES)
    (tmp_path / "default.json").write_text(tune_kernels.text({"timed": "x", "w4a16": found}))
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    table = tables.read.__wrapped__("default", "w4a16")
    assert [row.max_m for row in table.few] == [1, 2]
    assert table.tiles[0] == Tile(16, 16, 128, 4, 3, post_scale=False)
    assert table.many_from == 4096


@pytest.mark.parametrize("name", ["ada", "ampere", "blackwell", "default", "hopper", "turing"])
def test_committed_tables_look_as_they_are_written(name: str) -> None:
    committed = (tables.FOLDER / f"{name}.json").read_text()
    assert tune_kernels.text(json.loads(committed)) == committed


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs to be without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune_kernels.main([])
    assert "there is no GPU to time kernels on" in capsys.readouterr().err


def test_candidates_are_tiles_that_tokens_fill_and_registers_hold() -> None:
    rows = list(tune_kernels.tile_rows(32))
    assert len(set(rows)) == len(rows) == 2 * 12 * 2  # two block_m, with partial sums scaled and without
    assert {row.block_m for row in rows} == {16, 32}
    assert {row.max_m for row in rows} == {32}
    wide = [row for row in tune_kernels.tile_rows(512) if row.post_scale]
    assert {row.block_m for row in wide} == {16, 32}
    sums = list(tune_kernels.few_rows(2))
    assert len(set(sums)) == len(sums) == 12
    assert {row.max_m for row in sums} == {2}


@pytest.mark.parametrize("name", ["w2a16", "w4a16", "w8a16", "vectors"])
def test_every_row_of_a_table_multiplies_with_the_same_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = tune_kernels.KERNELS[name]
    tensors = kernel.pack(33, 256, torch.device(DEVICE))
    monkeypatch.setattr(tune_kernels, "COLD", 3 * tensors[0].nbytes)
    assert [found[0].equal(tensors[0]) for found in tune_kernels.copies(tensors)] == [True] * 4
    x = random_x(2, 256, torch.bfloat16)
    rows = (None, Few(4, 32, 2), Tile(16, 16, 64, 4, 3, True))
    dense, sums, tiles = (kernel.multiply(x, tensors, 33, row).float() for row in rows)
    assert dense.shape == (2, 33)
    for found in (sums, tiles):  # the interpreter cuts bfloat16 off, at an epsilon, where a GPU rounds
        assert (found - dense).norm() <= 2 * torch.finfo(torch.bfloat16).eps * dense.norm()
