"""Importing llmq is cheap, and no part pulls in what it has no use for. Each check has a fresh interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import llmq
from llmq.formats import FORMATS
from llmq.grids.uniform import UniformGrid
from llmq.solvers.rtn import rtn
from llmq.types import QuantSpec

ROOT = Path(llmq.__file__).parents[1]


def modules_after(code: str) -> set[str]:
    """Return the top-level and llmq modules that a fresh interpreter has loaded after running `code`."""
    path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))
    run = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys, json\nprint('\\n' + json.dumps(list(sys.modules)))"],
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_importing_llmq_imports_nothing_large() -> None:
    loaded = modules_after("import llmq; llmq.__version__; llmq.SpecError")
    assert "llmq.errors" in loaded
    assert not loaded & {"torch", "transformers", "triton", "numpy", "pydantic", "yaml", "llmq_kernels"}


def test_importing_the_driver_imports_no_kernels() -> None:
    loaded = modules_after("import llmq.driver")
    assert "torch" in loaded
    assert not loaded & {"triton", "llmq_kernels", "llmq.hf", "llmq.nn", "llmq.ops"}


def test_quantizing_on_a_cpu_imports_no_kernels() -> None:
    loaded = modules_after(
        "import torch\n"
        "from llmq.block_sweep import runs_on\n"
        "from llmq.grids.uniform import UniformGrid\n"
        "from llmq.solvers import SOLVERS\n"
        "w, grid = torch.arange(24.0).view(3, 8).sin(), UniformGrid(4, symmetric=True)\n"
        "assert not runs_on(w.device, grid)\n"
        "solution = SOLVERS['gptq'].run(w, torch.eye(8), grid, 4)\n"
        "assert solution.weight.codes.shape == w.shape"
    )
    assert "llmq.block_sweep" in loaded
    assert not loaded & {"triton", "llmq_kernels"}


@pytest.fixture(scope="module")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a packed Llama of one block, made without the driver."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    spec = QuantSpec(4, 32, True, "gptq")
    tensors, specs = {}, {}
    for name, tensor in LlamaForCausalLM(config).state_dict().items():
        if name.endswith("_proj.weight"):
            specs[name.removesuffix(".weight")] = spec
            packed = FORMATS["gptq"].pack(rtn(tensor, None, UniformGrid(4, True), 32).weight, spec)
            tensors |= {name.removesuffix("weight") + local: stored for local, stored in packed.items()}
        else:
            tensors[name] = tensor.clone()
    folder = tmp_path_factory.mktemp("packed")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    description = config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": FORMATS["gptq"].config(specs, []),
    }
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


def test_loading_a_packed_model_imports_no_solver(packed_folder: Path) -> None:
    loaded = modules_after(
        f"import llmq; model = llmq.load({str(packed_folder)!r})\n"
        "assert type(model.model.layers[0].mlp.up_proj).__name__ == 'QuantLinear'"
    )
    assert "llmq.hf" in loaded
    assert not {name for name in loaded if name.startswith("llmq.solvers")}
    assert not loaded & {"llmq.hessian", "llmq.driver", "llmq.stream"}


@pytest.mark.parametrize("name", llmq.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(llmq, name) is not None


def test_every_lazy_name_is_public() -> None:
    assert set(llmq._LAZY) <= set(llmq.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = llmq.quantise
