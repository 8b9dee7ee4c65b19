import pytest

from llmq.engines import Result, Verdict, verdicts
from llmq.types import QuantSpec

LLAMA = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
OPTIMUM, VLLM, GPTQMODEL = "transformers with optimum and gptqmodel", "vLLM 0.33", "GPTQModel 7.7"
CT, LLAMA_CPP = "transformers with compressed-tensors", "llama.cpp"
AUTOROUND = "transformers with AutoRound 0.16"


def result(
    bits: int = 4, format: str = "gptq", *, group: int = 128, sym: bool = True, dense: tuple[str, ...] = (),
    **shapes: object,
) -> Result:  # fmt: skip
    packed = {f"model.layers.{i}.{name}": shape for i in (0, 1) for name, shape in LLAMA.items()}
    packed |= {f"model.layers.0.{name.replace('__', '.')}": shape for name, shape in shapes.items()}  # type: ignore[misc]
    left = {name: shape for name, shape in packed.items() if name not in dense}
    spec = QuantSpec(bits, group, sym, format if sym or format != "gptq" else "gptq_v2")
    return Result(spec, left, frozenset(dense), head_width=128)


def said(of: Result) -> dict[str, Verdict]:
    return {verdict.engine: verdict for verdict in verdicts(of)}


def test_four_bits_symmetric_is_taken_by_all_that_read_the_format_on_any_ranks() -> None:
    found = said(result())
    assert {name for name, verdict in found.items() if not verdict.accepted} == {CT, AUTOROUND}
    assert dict(found[VLLM].ranks) == {1: None, 2: None, 4: None, 8: None}
    assert "tensor-parallel 1, 2, 4, 8" in found[VLLM].line()


@pytest.mark.parametrize(
    ("of", "refusing", "word"),
    [
        (result(2), {VLLM}, "2 bits"),
        (result(3), {VLLM, LLAMA_CPP}, "3 bits"),
        (result(8), set(), ""),
        (result(sym=False), {VLLM}, "zero points"),
        (result(format="awq"), {LLAMA_CPP}, "format awq"),
        (result(format="awq", sym=False), {LLAMA_CPP}, "format awq"),
        (result(3, "compressed-tensors"), {OPTIMUM, GPTQMODEL, LLAMA_CPP}, "format compressed-tensors"),
        (result(4, "compressed-tensors", sym=False), {OPTIMUM, GPTQMODEL, LLAMA_CPP}, "format compressed-tensors"),
        (
            result(4, "compressed-tensors", sym=False, mlp__experts__3__up_proj=(1024, 1024)),
            {OPTIMUM, GPTQMODEL, LLAMA_CPP, CT},
            "",
        ),
        (result(dense=("model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj")), {VLLM}, "v_proj"),
        (result(dense=("model.layers.0.mlp.down_proj",)), {OPTIMUM}, "model.layers.0.mlp.down_proj"),
        (result(mlp__experts__3__up_proj=(1024, 1024)), {OPTIMUM}, "mlp.experts.3.up_proj"),
        (result(self_attn__odd=(40, 64)), {GPTQMODEL}, "self_attn.odd is 40 x 64"),
        (result(8, "auto-round"), {OPTIMUM, GPTQMODEL, LLAMA_CPP}, "format auto-round"),
        (result(8, "auto-round", sym=False), {OPTIMUM, GPTQMODEL, LLAMA_CPP, AUTOROUND, VLLM}, "auto-round"),
        (result(2, "auto-round-v2", sym=False), {OPTIMUM, GPTQMODEL, LLAMA_CPP, VLLM}, "format auto-round-v2"),
    ],
)  # fmt: skip
def test_every_clash_is_named(of: Result, refusing: set[str], word: str) -> None:
    found = said(of)
    other = {name for name, own in ((CT, "compressed"), (AUTOROUND, "auto")) if not of.spec.format.startswith(own)}
    assert {name for name, verdict in found.items() if not verdict.accepted} == refusing | other
    for name in refusing:
        assert word in found[name].line()


@pytest.mark.parametrize(
    ("shapes", "group", "fits", "word"),
    [
        ({"mlp__down_proj": (4096, 2048)}, 128, (1, 2, 4, 8), ""),
        (
            {"mlp__down_proj": (4096, 2048 + 128)},
            128,
            (1,),
            "2176 inputs, 1088 per rank, no multiple of group_size 128",
        ),
        ({"mlp__down_proj": (4096, 512)}, 128, (1, 2, 4), "512 inputs, 64 per rank"),
        ({"mlp__down_proj": (4096, 512)}, 64, (1, 2, 4, 8), ""),
        ({"mlp__down_proj": (4096, 2048 + 128)}, -1, (1, 2, 4, 8), ""),  # one group per row goes with all ranks
        ({"mlp__down_proj": (4096, 32)}, -1, (1, 2, 4), "32 inputs, 4 per rank, no multiple of 8"),
        ({"mlp__up_proj": (96, 4096)}, 128, (1, 2, 4), "96 outputs, 12 per rank, no multiple of 8"),
        ({"self_attn__k_proj": (32, 4096)}, 128, (1, 2, 4, 8), ""),  # less than a head per rank: copied
        ({"self_attn__q_proj": (96, 4096)}, 128, (1, 2, 4), "q_proj"),
        ({"self_attn__kv_a_proj_with_mqa": (520, 4096)}, 128, (1, 2, 4, 8), ""),  # on every rank
    ],
)
def test_ranks_get_whole_groups_and_words(
    shapes: dict[str, object], group: int, fits: tuple[int, ...], word: str
) -> None:
    verdict = said(result(group=group, **shapes))[VLLM]
    assert tuple(count for count, clash in verdict.ranks.items() if clash is None) == fits
    assert word in verdict.line()


def test_a_refused_layout_says_nothing_of_ranks() -> None:
    verdict = said(result(2))[VLLM]
    assert not verdict.ranks
    assert verdict.line() == "vLLM 0.33: no: 2 bits, of gptq it takes 4, 8"
