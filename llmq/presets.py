"""Presets: recipes by name, as what they set differently from the defaults.

`docs/accuracy.md` says what each costs and gains.
"""

from __future__ import annotations

from llmq.errors import SpecError

PRESETS: dict[str, dict[str, object]] = {
    # textbook GPTQ: the control of every experiment
    "plain": {
        "order": "natural",
        "damp_percent": 0.01,
        "scale_search": "none",
        "refine_rounds": 0,
        "shift": 0.0,
        "random_windows": 0.0,
        "held_out": 0.0,
    },
    # no factorization
    "fast": {"method": "weighted_rtn", "refine_rounds": 0, "shift": 0.0, "random_windows": 0.0, "held_out": 0.0},
    # everything in closed form
    "default": {},
    # gradients too
    "best": {
        "refine_rounds": 4,
        "guidance_groups": 1,
        "scaling": "smooth",
        "tune_steps": 200,
        "tune_epochs": 6,
        "dtype": "float32",
    },
}


def preset_fields(name: str) -> dict[str, object]:
    """Return what preset `name` sets.

    Raises:
        SpecError: there is none of that name.
    """
    if name not in PRESETS:
        raise SpecError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
