"""``llmq compare`` on a tiny model: rows are what `quantize` and `eval` say, and the front is the front."""

import json
import re
from pathlib import Path

import pytest
from command_line import assert_fails, llmq
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_llama, make_text

from llmq.cli.compare import combinations, front
from llmq.errors import SpecError
from llmq.recipe import Recipe

SHARED = ("--num-samples", 8, "--seq-len", 32, "--seed", 1, "--refine-rounds", 0)
JUDGED = ("--windows", 4, "--eval-seq-len", 40)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `model`, `text.txt` to calibrate on and `a.txt` to judge by."""
    folder = tmp_path_factory.mktemp("made")
    make_llama(folder / "model", num_hidden_layers=1)
    for seed, name in enumerate(("text", "a")):
        make_text(folder / f"{name}.txt", 500, seed=seed)
    return folder


def test_every_row_is_what_quantize_and_eval_say(made: Path, tmp_path: Path) -> None:
    pictures = ("--plot", tmp_path / "a.png", "--plot", tmp_path / "a.svg")
    options = ("--grids", "uniform,nf4", "--bits", "3,4", "--solvers", "gptq,rtn", "--group-sizes", 32, "--json")
    given = ("--text", made / "a.txt", "--calibration", made / "text.txt", *SHARED, *JUDGED)
    result = llmq("compare", made / "model", *given, *options, "--keep", tmp_path / "kept", *pictures)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    rows = {(row["grid"], row["bits"], row["solver"]): row for row in found["combinations"]}
    assert list(rows) == [(g, b, s) for g, b in (("uniform", 3), ("uniform", 4), ("nf4", 4)) for s in ("gptq", "rtn")]
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("a.png", "a.svg"))
    statistics = tmp_path / "statistics"
    collected = ("--calibration", made / "text.txt", *SHARED[:-2])
    assert llmq("collect", made / "model", "--output", statistics, *collected).exit_code == 0
    for (grid, bits, solver), row in rows.items():
        folder = tmp_path / f"{grid}-{bits}-{solver}"
        same = ("--grid", grid, "--bits", bits, "--method", solver, "--format", "llmq", "--group-size", 32, *SHARED)
        data = () if solver == "rtn" else ("--statistics", statistics)
        shift = ("--shift", 0)
        assert llmq("quantize", made / "model", "--output", folder, *same, *data, *shift).exit_code == 0
        kept = tmp_path / "kept" / f"{grid}-{bits}-g32-{solver}"
        assert (kept / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
        judged = ("--against", made / "model", "--text", made / "a.txt", "--windows", 4, "--seq-len", 40, "--spread")
        said = json.loads(llmq("eval", folder, *judged, "--json").stdout)
        assert (row["kl"], row["kl_interval"], row["ppl"]) == (said["kl"], said["kl_interval"], said["packed"]["ppl"])
        inside = json.loads(llmq("inspect", folder, "--json").stdout)
        assert row["bits_per_weight"] == inside["packed"]["bits_per_weight"]
        assert row["error"] is None
    points = [(row["bits_per_weight"], row["kl"]) for row in rows.values()]
    assert [row["on_front"] for row in rows.values()] == front(points)


def test_the_table_says_what_failed_and_goes_on(made: Path) -> None:
    given = ("--text", made / "a.txt", "--calibration", made / "text.txt", *SHARED, *JUDGED)
    result = llmq("compare", made / "model", *given, "--grids", "uniform,nf4", "--solvers", "obq", "--group-sizes", 32)
    assert result.exit_code == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    header, uniform, nf4 = lines[next(i for i, line in enumerate(lines) if line.startswith("grid")) :]
    assert header == "grid solver bits group bits/weight loss held out KL perplexity ratio seconds failed"
    number, kl = r"\d\.\d\de-\d\d", r"\d\.\d{5} \(-?\d\.\d{5} to \d\.\d{5}\)"
    assert re.fullmatch(rf"\* uniform obq 4 32 \d\.\d+ {number} {number} {kl} \d+\.\d+ \d\.\d+ \d+\.\d", uniform)
    assert nf4.startswith("nf4 obq 4 32 - - - - - - - method obq")
    assert re.search(r"a\.txt .*4 windows of 40 tokens", " ".join(lines))


def test_what_cannot_be_compared_is_said_before_work(made: Path, tmp_path: Path) -> None:
    def refused(*options: object, words: tuple[str, ...]) -> None:
        result = llmq("compare", made / "model", "--text", made / "a.txt", *options)
        assert_fails(result.exit_code, result.stdout, result.stderr, *words, expected=2)

    refused("--grids", "spiral", words=("unknown grid 'spiral'", "uniform"))
    refused("--grids", "uniform,uniform", words=("--grids", "each once"))
    refused("--grids", "uniform", "--bits", "x", words=("--bits", "whole numbers"))
    refused("--grids", "nf4", "--bits", "3", words=("the nf4 grid has none of these bits; it has 4",))
    refused("--grids", "mxfp4", "--group-sizes", "64", words=("the mxfp4 grid", "32"))
    refused("--grids", "uniform", "--solvers", "luck", words=("unknown solver 'luck'",))
    refused("--grids", "uniform", "--plot", tmp_path / "a.doc", words=("--plot", ".png"))
    refused("--grids", "uniform", "--plot", tmp_path / "no" / "a.png", words=("there is no folder",))


def test_a_grid_has_its_own_group_size_unless_one_is_given() -> None:
    recipe = Recipe(refine_rounds=1)
    sizes = {row.grid: row.group_size for row in combinations(recipe, ["uniform", "mxfp4"], [4], ["gptq"], None)}
    assert sizes == {"uniform": 128, "mxfp4": 32}
    (row,) = combinations(recipe, ["uniform"], [4], ["gptq"], [-1])
    assert (row.fields["group_size"], row.fields["refine_rounds"], row.folder) == (-1, 1, "uniform-4-row-gptq")
    with pytest.raises(SpecError, match="none of these group sizes"):
        combinations(recipe, ["mxfp4"], [4], ["gptq"], [64])


@given(st.lists(st.one_of(st.none(), st.tuples(st.integers(0, 5), st.integers(0, 5))), max_size=8))
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float] | None]) -> None:
    found = front(points)
    known = [point for point in points if point is not None]
    for point, on in zip(points, found, strict=True):
        better = point is not None and [o for o in known if o != point and o[0] <= point[0] and o[1] <= point[1]]
        assert on == (point is not None and not better)


def test_a_layer_is_drawn_with_the_levels_of_grids(made: Path, tmp_path: Path) -> None:
    layer, picture = "model.layers.0.mlp.up_proj", tmp_path / "levels.svg"
    options = ("--plot", layer, "--plot-file", picture)
    assert llmq("inspect", made / "model", *options, "--grids", "uniform,nf4").exit_code == 0
    first = picture.read_bytes()
    assert b"nf4" in first or first.count(b"<path") > 40  # names are drawn as outlines
    packed = tmp_path / "packed"
    assert llmq("quantize", made / "model", "--output", packed, "--method", "rtn", "--grid", "nf4").exit_code == 0
    for more in ((), ("--against", made / "model")):
        assert llmq("inspect", packed, *options, *more).exit_code == 0
        assert picture.read_bytes() != first
    shown = llmq("inspect", packed).stdout
    assert "nf4 grid, groups of 128, 7 layers" in " ".join(shown.split())
    assert "nf4 levels -1 -0.6962" in " ".join(shown.split())
    for folder, words in ((made / "model", ("no matrix is called other.weight",)), (packed, ("no packed layer",))):
        result = llmq("inspect", folder, "--plot", "other", "--plot-file", picture)
        assert_fails(result.exit_code, result.stdout, result.stderr, *words)
    result = llmq("inspect", made / "model", *options, "--grids", "ternary")
    assert_fails(result.exit_code, result.stdout, result.stderr, "no levels to draw at 4 bits", expected=2)
