"""Solvers: a weight, its Hessian and a grid to a `Solution`.

A solver is one function ``(w [N, K], h [K, K], grid, group_size, **options) -> Solution`` in a file of its own; its
options are keyword-only with the paper's defaults. Rows of w are independent in every solver, so the driver may
stack layers that share an input. A row in `SOLVERS` makes it a `--method` and puts it under the laws of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llmq.solvers.gptq import gptq
from llmq.solvers.rtn import rtn
from llmq.types import Solution


class Solver(NamedTuple):
    """One row of `SOLVERS`."""

    run: Callable[..., Solution]
    calibrated: bool  # whether it needs a Hessian, hence calibration data
    options: tuple[str, ...]  # the recipe fields that it takes as keyword arguments


SOLVERS: dict[str, Solver] = {
    "gptq": Solver(gptq, calibrated=True, options=("damp_percent", "act_order", "scale_search")),
    "rtn": Solver(rtn, calibrated=False, options=()),
}
