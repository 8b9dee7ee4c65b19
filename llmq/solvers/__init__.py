"""Solvers: a weight, its Hessian and a grid to a `Solution`.

A solver is one function ``(w [N, K], h [K, K], grid, group_size, **options) -> Solution`` in a file of its own; its
options are keyword-only with the paper's defaults. Rows of w are independent in every solver, so the driver may
stack layers that share an input. A row in `SOLVERS` makes it a `--method` and puts it under the laws of the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llmq.solvers.admm import admm
from llmq.solvers.bitsplit import bitsplit
from llmq.solvers.descent import descent
from llmq.solvers.gptaq import gptaq
from llmq.solvers.gptq import gptq
from llmq.solvers.obq import obq
from llmq.solvers.rtn import rtn
from llmq.solvers.slb import slb
from llmq.solvers.takes import any_grid, equal_steps, scaled, symmetric_steps
from llmq.solvers.weighted_rtn import weighted_rtn
from llmq.types import Grid, Solution

_SEARCH = ("scale_search", "search_norm")
_SWEEP = ("damp_percent", "order", *_SEARCH)


class Solver(NamedTuple):
    """One row of `SOLVERS`."""

    run: Callable[..., Solution]
    calibrated: bool  # whether it needs a Hessian, hence calibration data
    options: tuple[str, ...]  # the recipe fields that it takes as keyword arguments
    paired: bool = False  # whether it also takes `cross` = 2 (X_fp - X) Xᵀ / T and `alpha`, hence a second stream
    refuses: Callable[[Grid], str | None] = any_grid  # why it does not take a grid, of single weights


SOLVERS: dict[str, Solver] = {
    "gptq": Solver(gptq, calibrated=True, options=_SWEEP),
    "gptaq": Solver(gptaq, calibrated=True, options=_SWEEP, paired=True),
    "obq": Solver(obq, calibrated=True, options=("damp_percent", *_SEARCH), refuses=equal_steps),
    "descent": Solver(descent, calibrated=True, options=("damp_percent", *_SEARCH)),
    "slb": Solver(slb, calibrated=True, options=("damp_percent", *_SEARCH)),
    "bitsplit": Solver(bitsplit, calibrated=True, options=("damp_percent", *_SEARCH), refuses=symmetric_steps),
    "admm": Solver(admm, calibrated=True, options=_SEARCH, refuses=scaled),
    "weighted_rtn": Solver(weighted_rtn, calibrated=True, options=_SEARCH),
    "rtn": Solver(rtn, calibrated=False, options=()),
}
