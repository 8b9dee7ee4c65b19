"""Transforms: rewrites of a model's weights that keep its function and make them easier to quantize.

`wiring` finds what can be rewritten in a block. `scaling` and `rotation` change where magnitude sits, exactly, at no
cost at run time; `magr` changes a weight a little, for the sake of its largest entries. All work with one block loaded.
"""

from llmq.transforms.folds import Fold, apply_scales_
from llmq.transforms.magr import magr
from llmq.transforms.rotation import residual_rotation, rotate_block_, rotate_outer_
from llmq.transforms.scaling import awq_scales, clipped_rtn, smooth_scales
from llmq.transforms.wiring import Wiring, find_wiring, refuse_shared

__all__ = [
    "Fold",
    "Wiring",
    "apply_scales_",
    "awq_scales",
    "clipped_rtn",
    "find_wiring",
    "magr",
    "refuse_shared",
    "residual_rotation",
    "rotate_block_",
    "rotate_outer_",
    "smooth_scales",
]
