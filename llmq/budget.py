"""How much a run holds in memory at once."""

from __future__ import annotations

from dataclasses import dataclass

TOKENS_PER_BATCH = 8192  # large enough for efficient products, small next to a block's weights

ROWS_AT_A_TIME = 2048  # enough for efficient products, few enough for several processes to share a layer


@dataclass(frozen=True)
class Budget:
    """What a run may trade for memory."""

    replays: bool = True  # whether what parts of a block return is kept in memory for its later passes
    cached: bool = True  # whether hidden states stay in memory, and not only in files
    batch_tokens: int = TOKENS_PER_BATCH  # tokens that pass a block together
    solver_rows: int | None = ROWS_AT_A_TIME  # rows of a problem that are solved at a time; None: all
