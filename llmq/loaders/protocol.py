"""What the scripts of all loaders share: arguments, files, and the line of JSON that tells what happened.

Its keys: `loader`; `versions` by package; `loaded`, and if not `refused`, the loader's own words; `dtype` that it
computes in; `notes`, what it said that matters; `new`, the tokens that it went on with after the first row;
`peak_memory_bytes` of the process.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import distributions, version
from typing import Any

import numpy as np


@dataclass
class Answer:
    """What a loader computed."""

    logits: Any  # float32 [B, P, V]
    new: list[int]
    notes: list[str] = field(default_factory=list)
    dtype: str = "float32"  # that it computes in


def serve(loader: str, packages: tuple[str, ...], run: Callable[[str, Any, int], Answer]) -> None:
    """Carry out the command line; `run` gets the model, ids [B, L] and the number of new tokens."""
    model, source, target = sys.argv[1:4]
    result: dict[str, Any] = {"loader": loader, "versions": _versions(packages), "loaded": False}
    with np.load(source) as given:
        ids, new = given["ids"], int(given["new"])
    try:
        answer = run(model, ids, new)
    except Exception as error:  # whatever a loader raises is its answer
        result["refused"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    else:
        np.savez(target, logits=np.asarray(answer.logits, dtype=np.float32))
        result |= {
            "loaded": True,
            "dtype": answer.dtype,
            "notes": answer.notes,
            "new": [int(token) for token in answer.new],
        }
    unit = 1 if sys.platform == "darwin" else 1024  # Linux reports KiB
    result["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(f"\n{json.dumps(result)}", flush=True)


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of those of `packages` that are there."""
    there = {package: version(package) for package in packages if any(distributions(name=package))}
    return {"python": sys.version.split()[0], **there}
