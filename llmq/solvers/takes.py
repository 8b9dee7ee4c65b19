"""Which grids a solver takes, said before work: functions that return why not, or None."""

from __future__ import annotations

from llmq.errors import SolverError
from llmq.types import Grid


def any_grid(grid: Grid) -> None:
    """Refuse nothing."""
    return


def equal_steps(grid: Grid) -> str | None:
    """Refuse what is not equally spaced."""
    if grid.learns or grid.tables is not None:
        return f"knows equally spaced levels, not the {grid.name} grid; use gptq or descent"
    return None


def symmetric_steps(grid: Grid) -> str | None:
    """Refuse what is not equally spaced around 0."""
    if why := equal_steps(grid):
        return why
    return None if grid.symmetric else "makes codes of signed digits, which have no zero to store; use --sym"


def scaled(grid: Grid) -> str | None:
    """Refuse levels without a scale."""
    return f"moves scales, which the {grid.name} grid has not; use gptq or descent" if grid.learns else None


def check(method: str, why: str | None) -> None:
    """Raise `why` of the solver `method`, if there is one.

    Raises:
        SolverError: there is.
    """
    if why:
        raise SolverError(f"method {method} {why}")
