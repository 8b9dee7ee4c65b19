"""The tables of tile sizes, as they are committed."""

import json

import pytest
import torch

from llmq_kernels import few, layout, tables
from llmq_kernels.tables import Few, Table, Tile

KERNELS = ["vectors", "w2a16", "w4a16", "w8a16"]
NAMES = sorted(path.stem for path in tables.FOLDER.glob("*.json"))


def test_every_family_has_a_table() -> None:
    assert set(NAMES) == {*tables.FAMILIES.values(), "default"}
    assert NAMES == ["ada", "ampere", "blackwell", "default", "hopper", "turing"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
def test_every_table_fits_the_kernels(name: str, kernel: str) -> None:
    assert json.loads((tables.FOLDER / f"{name}.json").read_text()).keys() == {"timed", *KERNELS}
    table = tables.read(name, kernel)
    assert all(layout.TILE_N % row.block_n == 0 for row in (*table.few, *table.tiles))
    for rows in (table.few, table.tiles):
        assert [row.max_m for row in rows] == sorted({row.max_m for row in rows})
    assert all(row.max_m <= few.MAX_M for row in table.few)
    # One kernel or another for every M (the last tile takes any), none where Triton has no tensor cores for tiles.
    assert table.tiles or table.few[-1].max_m >= table.many_from - 1
    assert bool(table.tiles) == (name != "turing")
    for m in (1, 4, 5, 16, 17, 64, 65, 512):
        row = table.pick(m, torch.float16)
        assert row is None or row.max_m >= m or row == table.tiles[-1]
    assert table.pick(10**6, torch.float16) is None


def test_rows_are_picked_by_tokens() -> None:
    few, small, large = Few(2, 32, 2), Tile(16, 16, 64, 4, 5, True), Tile(64, 64, 128, 4, 3, False)
    other = Tile(128, 128, 128, 8, 3, False)
    table = Table((few,), (small, large, other), 100)
    picked = [table.pick(m, torch.bfloat16) for m in (1, 2, 3, 16, 17, 64, 65, 99, 100)]
    assert picked == [few, few, small, small, large, large, other, other, None]
    # float32 spills at the largest tiles.
    assert table.pick(99, torch.float32) is large
    assert Table((), (small,), 100).pick(1, torch.float16) is small


def test_gpus_have_families() -> None:
    assert tables.family((8, 0)) == "ampere"
    assert tables.family((8, 6)) == tables.family((12, 0)) == "ada"
    assert tables.family((9, 0)) == "hopper"
    assert tables.family((10, 0)) == "blackwell"
    assert tables.family((99, 0)) == tables.family(None) == "default"
    table = tables.for_device("w8a16", torch.device("cpu"))
    assert table == tables.read("default", "w8a16")
