"""The script that plants outliers: the same function, other weights, larger activations."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from script_loading import load_script
from transformers import AutoModelForCausalLM, PreTrainedModel

EXAMPLE = Path(__file__).parents[2] / "examples/wiki-llama-1m"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("make_outlier_model")


@pytest.fixture(scope="module")
def made(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("outliers") / "model"
    assert script.main([str(EXAMPLE), str(output)]) == 0
    return output


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def peak(model: PreTrainedModel, ids: torch.Tensor, name: str) -> float:
    """Return how far the largest input channel of a layer stands out: its mean |x| over the median one."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    model(ids)
    handle.remove()
    sizes = seen[0].abs().mean(0)
    return float(sizes.max() / sizes.median())


def test_the_function_stays_and_the_activations_do_not(made: Path) -> None:
    before, after = load(EXAMPLE), load(made)
    ids = torch.randint(before.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(7))
    old, new = before(ids).logits, after(ids).logits
    assert float((new - old).norm() / old.norm()) < 1e-5
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        ratios = [
            peak(after, ids, f"model.layers.{i}.{name}") / peak(before, ids, f"model.layers.{i}.{name}")
            for i in range(before.config.num_hidden_layers)
        ]
        assert max(ratios) > 2, name
    assert {tensor.dtype for tensor in load_file(made / "model.safetensors").values()} == {torch.float32}


def test_few_channels_are_planted_with_factors_in_range(script: ModuleType) -> None:
    model, original = load(EXAMPLE), load(EXAMPLE)
    largest = script.plant_(model, 3)
    assert len(largest) == 4 * model.config.num_hidden_layers
    assert all(script.SMALLEST <= factor <= script.LARGEST for factor in largest.values())
    ratio = model.model.layers[1].input_layernorm.weight / original.model.layers[1].input_layernorm.weight
    planted = ratio[(ratio - 1).abs() > 1e-6]
    assert len(planted) == -(-3 * len(ratio) // 100)
    assert (planted >= script.SMALLEST).all()
    assert float(planted.max()) == pytest.approx(
        next(v for k, v in largest.items() if k.startswith("model.layers.1.input_layernorm"))
    )


def test_the_seed_decides(script: ModuleType, made: Path, tmp_path: Path) -> None:
    assert script.main([str(EXAMPLE), str(tmp_path / "same")]) == 0
    assert script.main([str(EXAMPLE), str(tmp_path / "other"), "--seed", "1"]) == 0
    files = [load_file(folder / "model.safetensors") for folder in (made, tmp_path / "same", tmp_path / "other")]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert not all(torch.equal(files[0][key], files[2][key]) for key in files[0])


def test_nothing_is_overwritten(script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main([str(EXAMPLE), str(tmp_path)]) == 1
    assert "exists; remove it or choose another folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
