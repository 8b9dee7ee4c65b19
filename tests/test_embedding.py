"""Packed token embeddings and heads tied to them: what is loaded, and what it computes."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from embedding_cases import IDS, NAME, Make, loaded, logits, maker
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import WORDS, make_llama
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, T5Config

from llmq.driver import quantize
from llmq.embedding import QuantEmbedding, TiedHead, pack_embedding_, quant_rows
from llmq.errors import CheckpointError, SpecError
from llmq.families import skeleton
from llmq.formats import Stored, llmq_layout
from llmq.grids.uniform import UniformGrid
from llmq.packed import PackedCheckpoint
from llmq.preflight import prepare
from llmq.recipe import Recipe
from llmq.types import QuantizedWeight, QuantSpec
from llmq.verify.reference import reference_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory)


@pytest.mark.parametrize(
    ("kind", "bits", "sym"),
    [
        *(("tied", bits, False) for bits in (2, 3, 4, 5, 6, 8)),
        *(("untied", 4, True), ("gemma3", 8, True), ("gemma3", 4, False), ("gpt2", 4, True)),
    ],
)
def test_the_loaded_model_is_that_of_the_dequantized_rows(made: Make, kind: str, bits: int, sym: bool) -> None:
    folder = made(kind, bits, sym=sym)
    packed = PackedCheckpoint(folder)
    model: Any = loaded(folder)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert isinstance(head, nn.Linear if kind == "untied" else TiedHead)
    expected = logits(reference_model(packed))
    # float32 sums of at most 128 products each, in another order, through two blocks
    assert (logits(model) - expected).abs().max() <= 1e-4 * expected.abs().max()
    text = model.generate(IDS[:1, :4], max_new_tokens=5, do_sample=False)
    assert torch.equal(text, reference_model(packed).generate(IDS[:1, :4], max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_in_bfloat16_it_is_as_near_as_dense_rows_are(made: Make, bits: int) -> None:
    folder = made("tied", bits)
    packed = PackedCheckpoint(folder)
    exact, rounded = logits(reference_model(packed)), logits(reference_model(packed, torch.bfloat16))
    found = logits(loaded(folder, torch.bfloat16))
    # the very same weights where scales have eight bits; products and sums round in other places
    assert (found - exact).norm() <= 2 * (rounded - exact).norm()


@pytest.mark.usefixtures("no_native")
def test_kernels_of_the_head_are_those_of_linear_layers(made: Make) -> None:
    kernels = {}
    for bits, sym in ((8, True), (4, False), (3, False)):
        model: Any = loaded(made("tied", bits, sym=sym), torch.bfloat16)
        kernels[bits] = model.lm_head.kernel
    assert kernels == {8: "cpu_int8pack", 4: "cpu_int4pack", 3: "reference"}


@pytest.mark.usefixtures("no_native")
@pytest.mark.parametrize(
    ("bits", "sym", "dtype", "kernel", "shared"),
    [
        (8, True, torch.bfloat16, "cpu_int8pack", True),
        (3, False, torch.bfloat16, "reference", True),
        (8, True, torch.float32, "reference", True),
        (4, False, torch.bfloat16, "cpu_int4pack", False),
    ],
)
def test_the_rows_are_in_memory_once_where_the_kernel_keeps_them_apart(
    made: Make, bits: int, sym: bool, dtype: torch.dtype, kernel: str, shared: bool
) -> None:
    model: Any = loaded(made("tied", bits, sym=sym), dtype)
    embedding, head = model.get_input_embeddings(), model.lm_head
    assert head.kernel == kernel
    stored = sum(PackedCheckpoint(made("tied", bits, sym=sym)).info(f"{NAME}.{n}").nbytes for n in ("codes", "scales"))
    held = sum(tensor.nbytes for tensor in embedding.buffers() if tensor is not None)
    assert held == 0 if shared else held >= stored
    before = embedding(IDS)
    dense = PackedCheckpoint(made("tied", bits, sym=sym)).dequantized(NAME)
    assert torch.equal(before, dense[IDS].to(dtype))
    for name, tensor in model.state_dict().items():  # as they were, whoever holds them
        if name.startswith(NAME):
            assert torch.equal(tensor, PackedCheckpoint(made("tied", bits, sym=sym)).read(name))
    model.load_state_dict(model.state_dict())
    assert torch.equal(embedding(IDS), before)
    assert torch.equal(head(before[0]), head(before[0]))
    head.prepare_(torch.float16)  # for other activations: made again of the rows
    assert torch.equal(embedding(IDS), before)
    head._apply(lambda tensor: tensor)
    assert torch.equal(embedding(IDS), before)


@pytest.mark.usefixtures("no_native")
def test_rows_that_a_kernel_had_to_round_are_kept(made: Make, tmp_path: Path) -> None:
    def finer(content: dict[str, Tensor]) -> None:
        content[f"{NAME}.scales"] = content[f"{NAME}.scales"] * (1 + 2**-10)

    folder = edited(made("tied", 8, sym=True), tmp_path / "finer", finer)
    model: Any = loaded(folder, torch.bfloat16)
    assert model.lm_head.kernel == "cpu_int8pack"
    for name in ("codes", "scales"):
        assert torch.equal(model.state_dict()[f"{NAME}.{name}"], PackedCheckpoint(folder).read(f"{NAME}.{name}"))


def rows_of(bits: int, symmetric: bool, n: int, k: int, group_size: int, seed: int) -> tuple[list[Tensor], Tensor]:
    """Return the stored tensors of a random weight, and what they stand for."""
    draw = torch.Generator().manual_seed(seed)
    spec = QuantSpec(bits, group_size, symmetric, "llmq")
    shape = (n, spec.groups(k))
    zeros = torch.randint(0, 2**bits + 1, shape, generator=draw).float()
    if symmetric:
        zeros = torch.full(shape, 2.0 ** (bits - 1))
    codes = torch.randint(0, 2**bits, (n, k), generator=draw, dtype=torch.uint8)
    scales = torch.rand(shape, generator=draw).half().float()
    tensors = llmq_layout.pack(QuantizedWeight(codes, scales, zeros, UniformGrid(bits, symmetric), group_size), spec)
    expected = torch.empty(n, k)
    for row in range(n):  # the definition, number by number
        for column in range(k):
            group = column // group_size
            expected[row, column] = (float(codes[row, column]) - float(zeros[row, group])) * float(scales[row, group])
    return [tensors[name] for name in ("codes", "scales", "zeros") if name in tensors], expected


@settings(max_examples=40)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    symmetric=st.booleans(),
    n=st.integers(1, 6),
    k=st.integers(1, 40),
    group_size=st.integers(1, 48),
    seed=st.integers(0, 99),
)
def test_looked_up_rows_are_what_their_codes_stand_for(
    bits: int, symmetric: bool, n: int, k: int, group_size: int, seed: int
) -> None:
    stored, expected = rows_of(bits, symmetric, n, k, group_size, seed)
    tokens = torch.randint(0, n, (2, 3), generator=torch.Generator().manual_seed(seed))
    layer = (bits, group_size, symmetric, k)
    assert torch.equal(quant_rows(tokens, stored, "", torch.float32, *layer), expected[tokens])
    half = quant_rows(tokens, stored, "", torch.bfloat16, *layer)
    assert torch.equal(half, expected[tokens].bfloat16())
    assert quant_rows(tokens[:0], stored, "", torch.float32, *layer).shape == (0, 3, k)


def test_the_operator_is_whole() -> None:
    stored, _ = rows_of(4, False, 6, 40, 16, 0)
    torch.library.opcheck(quant_rows, (IDS % 6, stored, "", torch.float32, 4, 16, False, 40))


@pytest.mark.parametrize("token", [-1, WORDS])
def test_tokens_that_do_not_exist_are_an_error(made: Make, token: int) -> None:
    model: Any = loaded(made())
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        model.get_input_embeddings()(torch.tensor([[1, token]]))


def test_what_is_saved_is_what_was_loaded(made: Make, tmp_path: Path) -> None:
    for kind in ("tied", "gemma3", "untied"):
        source = made(kind, 8, sym=True)
        model: Any = loaded(source)
        model.save_pretrained(tmp_path / kind)
        first, second = PackedCheckpoint(source), PackedCheckpoint(tmp_path / kind)
        assert set(first) == set(second)
        assert first.quantization["schemes"] == second.quantization["schemes"]
        assert all(torch.equal(first.read(key), second.read(key)) for key in first)
        assert torch.equal(logits(loaded(tmp_path / kind)), logits(model))


@pytest.mark.usefixtures("no_native")
def test_moving_casting_and_copying_leave_codes_and_scales_alone(made: Make) -> None:
    model: Any = loaded(made("gemma3", 4))
    before, stored = logits(model), PackedCheckpoint(made("gemma3", 4))
    nn.Module.to(model, torch.bfloat16)
    assert model.get_input_embeddings()(IDS).dtype == torch.bfloat16
    assert model.lm_head(torch.ones(1, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    for name in ("codes", "scales", "zeros", "shape"):
        assert torch.equal(model.state_dict()[f"{NAME}.{name}"], stored.read(f"{NAME}.{name}"))
    again = loaded(made("gemma3", 4))
    twin: Any = copy.deepcopy(again)
    assert torch.equal(logits(twin), before)
    assert twin.lm_head._source[0] is twin.get_input_embeddings()
    twin.tie_weights()  # as other tools call it
    assert torch.equal(logits(twin), before)
    assert "embed_tokens): QuantGemma3TextScaledWordEmbedding(128, 64, bits=4, group_size=32, sym=False" in str(twin)
    assert "TiedHead(in_features=64, out_features=128, tied, kernel=reference" in str(twin)


def test_casting_an_embedding_of_its_own_leaves_scales_alone(made: Make) -> None:
    model: Any = loaded(made("untied", 4))
    nn.Module.to(model, torch.bfloat16)
    stored = PackedCheckpoint(made("untied", 4))
    for name in ("codes", "scales", "zeros", "shape"):
        found = model.state_dict()[f"{NAME}.{name}"]
        assert found.dtype == stored.info(f"{NAME}.{name}").dtype
        assert torch.equal(found, stored.read(f"{NAME}.{name}"))
    assert model.get_input_embeddings()(IDS).dtype == torch.bfloat16


def test_a_compiled_model_looks_up_and_multiplies(made: Make) -> None:
    model: Any = loaded(made())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def edited(source: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(source, folder)
    content = load_file(folder / "model.safetensors")
    change(content)
    save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop(f"{NAME}.scales"), "scales is missing"),
        (lambda c: c.pop(f"{NAME}.codes"), f"no {NAME}.codes"),
        (lambda c: c.update({f"{NAME}.zeros": c[f"{NAME}.zeros"] + 20}), "zeros are"),
        (lambda c: c.update({f"{NAME}.shape": torch.tensor([WORDS, 63])}), "and 63 inputs"),
        (lambda c: c.update({f"{NAME}.permutation": torch.arange(64).int()}), "columns out of order"),
    ],
    ids=["scales", "codes", "zeros", "shape", "order"],
)
def test_damage_is_named(made: Make, tmp_path: Path, change: Any, message: str) -> None:
    folder = edited(made("tied", 4), tmp_path / "damaged", change)
    with pytest.raises(CheckpointError, match=message):
        loaded(folder)


def test_packed_embeddings_of_other_formats_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    quantize(make_llama(tmp_path / "dense"), folder, Recipe(method="rtn", group_size=32, format="compressed-tensors"))

    def pack(content: dict[str, Tensor]) -> None:
        content.pop(f"{NAME}.weight")
        for local, tensor in list(content.items()):
            if local.startswith("model.layers.0.mlp.gate_proj."):  # of the same size
                content[f"{NAME}.{local.rpartition('.')[2]}"] = tensor.clone()

    folder = edited(folder, tmp_path / "other", pack)
    config = json.loads((folder / "config.json").read_bytes())
    config["quantization_config"]["ignore"] = []
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{NAME}: a packed embedding, which llmq reads in its own format only"):
        loaded(folder)


def test_only_heads_may_share_the_rows(tmp_path: Path) -> None:
    config = T5Config(vocab_size=WORDS, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(SpecError, match=r"embeddings: \w+\.embed_tokens\.weight shares the matrix of shared"):
        prepare(tmp_path / "dense", Recipe(method="rtn", format="llmq", embeddings=4, group_size=32))
    spec = QuantSpec(4, 32, True, "llmq")
    stored = Stored(spec, WORDS, 64, llmq_layout.layout(spec, WORDS, 64))
    with pytest.raises(CheckpointError, match="embed_tokens: a packed embedding is tied to this Embedding"):
        pack_embedding_(skeleton(config, torch.float32), "shared", stored, torch.float32, empty=True)
