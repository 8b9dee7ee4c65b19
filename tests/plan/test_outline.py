from pathlib import Path

import pytest
import torch
from family_cases import FAMILIES
from plan_cases import job_of
from tiny_models import make_llama, make_model
from transformers import Qwen3MoeConfig

from llmq.calibration import Calibration
from llmq.loading import Loader
from llmq.planning.outline import outline
from llmq.preflight import Job
from llmq.stream import Stream

BATCH, LENGTH = 2, 16
CPU = torch.device("cpu")

QWEN3_MOE = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def observed(job: Job) -> list[list[tuple[str, ...]]]:
    """Return the stages of each block as a run on real numbers sees them."""
    loader = Loader(job, CPU)
    loader.outer()
    ids = torch.randint(100, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    stream = Stream.start(job.model, job.structure, Calibration(ids, None, "ids", ""), CPU)
    found = []
    for index, prefix in enumerate(job.structure.prefixes):
        block, linears = loader.block(index), job.structure.linears[index]
        stages = stream.stages(block, index, linears) if linears else []
        found.append([tuple(x.name.removeprefix(prefix) for x in stage.linears) for stage in stages])
        stream.advance(block, index)
    return found


@pytest.mark.parametrize(
    "name", ["llama", "falcon", "gpt2", "cohere", "gemma3", "phi3", "opt", "qwen3_next", "t5", "bart"]
)
def test_stages_are_those_of_a_run_on_real_numbers(name: str, tmp_path: Path) -> None:
    job = job_of(FAMILIES[name].make(tmp_path))
    planned = outline(job, BATCH, LENGTH)
    by_block = {number: [s.names for s in kind.stages] for kind in planned.blocks for number in kind.numbers}
    assert [by_block[i] for i in range(len(by_block))] == observed(job)


def test_experts_are_one_stage_each_for_what_enters_and_what_leaves(tmp_path: Path) -> None:
    job = job_of(make_model(tmp_path, Qwen3MoeConfig(**QWEN3_MOE)))
    (kind,) = outline(job, BATCH, LENGTH).blocks
    first, last = kind.stages[-2:]
    assert first.names == ("mlp.experts.0.gate_proj", "mlp.experts.0.up_proj")
    assert last.names == ("mlp.experts.0.down_proj",)
    assert (first.copies, last.copies) == (8, 8)
    assert (first.share, last.share) == (0.25, 0.25)
    assert (first.inputs, first.rows, last.inputs, last.rows) == (64, 64, 32, 64)
    # two experts of three matrices of 32 x 64 for each of 32 tokens, besides what is dense
    (products,) = [sum(flops for (dtype, _), flops in kind.forward.products.items() if dtype == "float32")]
    dense = 2 * 32 * (64 * 64 * 2 + 2 * 32 * 64 + 8 * 64) + 4 * BATCH * 4 * LENGTH**2 * 16
    assert products == dense + 2 * 32 * 2 * 3 * 32 * 64


def test_a_pass_is_counted_in_full_and_up_to_each_stage(tmp_path: Path) -> None:
    job = job_of(make_llama(tmp_path))
    (kind,) = outline(job, BATCH, LENGTH).blocks
    assert kind.numbers == (0, 1)

    def flops(work: object) -> float:
        return sum(work.products.values())  # type: ignore[attr-defined]

    tokens, d, kv, i = BATCH * LENGTH, 64, 32, 128
    attention = 4 * BATCH * 4 * LENGTH**2 * 16
    qkv, out, up, down = (2 * tokens * d * n for n in (d + 2 * kv, d, 2 * i, i))
    assert flops(kind.forward) == qkv + attention + out + up + down
    assert [flops(s.before) for s in kind.stages] == [
        0,
        qkv + attention,
        qkv + attention + out,
        qkv + attention + out + up,
    ]


def test_nothing_is_read_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(make_llama(tmp_path))
    monkeypatch.setattr(type(job.source), "read", lambda *_: pytest.fail("a plan reads no tensor"))
    before = {name: id(p) for name, p in job.model.named_parameters()}
    attention = torch.nn.functional.scaled_dot_product_attention
    outline(job, BATCH, LENGTH)
    assert {name: id(p) for name, p in job.model.named_parameters()} == before
    assert all(p.is_meta for p in job.model.parameters())
    assert not any(b.is_meta for b in job.model.buffers())
    assert torch.nn.functional.scaled_dot_product_attention is attention


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    job = job_of(make_llama(tmp_path))
    planned = outline(job, BATCH, LENGTH)
    (kind,) = planned.blocks
    linears = 64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 128
    assert kind.linear_bytes == 4 * linears
    assert kind.weight_bytes == 4 * (linears + 2 * 64)
    assert kind.largest_bytes == 4 * 64 * 128
    assert planned.outside_bytes == 4 * (2 * 128 * 64 + 64)
    assert (planned.width, planned.tokens, planned.head) == (64, BATCH * LENGTH, (128, 64))
