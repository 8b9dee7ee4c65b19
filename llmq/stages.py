"""Stages: what a recipe can have or lack, each as the fields that say so.

`llmq ablate` takes them away and adds them one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llmq.errors import SpecError

BASE = "recipe"  # the variant that nothing was done to


class Stage(NamedTuple):
    """The same fields twice: a usual value, and the one without any effect."""

    on: dict[str, object]
    off: dict[str, object]


class Variant(NamedTuple):
    """A recipe's fields, one stage switched."""

    name: str  # as in a table: "- refine", "+ rotation"
    folder: str  # as a file name: "without-refine", "with-rotation"
    fields: dict[str, object]


STAGES: dict[str, Stage] = {
    "order": Stage({"order": "act"}, {"order": "natural"}),
    "scale_search": Stage({"scale_search": "hessian"}, {"scale_search": "none"}),
    "refine": Stage({"refine_rounds": 2}, {"refine_rounds": 0}),
    "random_windows": Stage({"random_windows": 0.125}, {"random_windows": 0.0}),
    "held_out": Stage({"held_out": 0.1}, {"held_out": 0.0}),
    "rotation": Stage({"rotation": "hadamard"}, {"rotation": "none"}),
    "scaling": Stage({"scaling": "smooth"}, {"scaling": "none"}),
    "magr": Stage({"magr": 0.01}, {"magr": 0.0}),
    "shift": Stage({"shift": 0.5}, {"shift": 0.0}),
    "guidance": Stage({"guidance_groups": 1}, {"guidance_groups": 0}),
    "tune_blocks": Stage({"tune_steps": 200}, {"tune_steps": 0}),
    "tune_model": Stage({"tune_epochs": 6}, {"tune_epochs": 0}),
}


def check_stages(names: Sequence[str]) -> None:
    """Check that all `names` are stages, each named once.

    Raises:
        SpecError: there are none of some names, or one comes twice.
    """
    unknown = [name for name in names if name not in STAGES]
    if unknown or not names:
        found = f"unknown stages {', '.join(map(repr, unknown))}" if unknown else "no stages"
        raise SpecError(f"{found}; there are {', '.join(STAGES)}")
    twice = [name for name in STAGES if names.count(name) > 1]
    if twice:
        raise SpecError(f"stage {twice[0]!r} is named twice; name each once")


def is_on(fields: Mapping[str, object], name: str) -> bool:
    """Return whether a recipe of these `fields` (all of them) has stage `name`, at whatever strength."""
    return any(fields[field] != value for field, value in STAGES[name].off.items())


def variants(fields: Mapping[str, object], names: Sequence[str]) -> list[Variant]:
    """Return a recipe of these `fields` (all of them) as it is, then without each stage it has or with one it lacks.

    Raises:
        SpecError: as `check_stages`.
    """
    check_stages(names)
    found = [Variant(BASE, BASE, dict(fields))]
    for name in names:
        if is_on(fields, name):
            found.append(Variant(f"- {name}", f"without-{name}", {**fields, **STAGES[name].off}))
        else:
            found.append(Variant(f"+ {name}", f"with-{name}", {**fields, **STAGES[name].on}))
    return found
