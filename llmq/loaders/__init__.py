"""One script per loader of packed folders, run by the Python of whatever environment has that loader.

    python use_vllm.py FOLDER in.npz out.npz

`in.npz` holds `ids`, int64 [B, L], and `new`, how many tokens to go on with after the first row. `out.npz` gets
`logits`, float32 [B, P, V], of the first P positions. One line of JSON says what happened, see `protocol`. The scripts
need numpy and their loader, and nothing of llmq.
"""

from __future__ import annotations

from pathlib import Path

SCRIPTS = {
    "llmq": "use_llmq.py",
    "transformers": "use_transformers.py",
    "gptqmodel": "use_gptqmodel.py",  # with the kernel that it chooses
    "gptqmodel-torch": "use_gptqmodel.py torch",  # with its plain one
    "vllm": "use_vllm.py",
    "llamacpp": "use_llamacpp.py",
    "auto-round": "use_autoround.py",
    "onnxruntime": "use_onnxruntime.py",
}


def command(loader: str, model: Path, source: Path, target: Path) -> list[str]:
    """Return the script of `loader`, a name in `SCRIPTS`, and its arguments: what a Python is to run."""
    name, *options = SCRIPTS[loader].split()
    return [str(Path(__file__).parent / name), str(model), str(source), str(target), *options]
