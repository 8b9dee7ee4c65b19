"""A pair of models that adapters are made for."""

RANK = 16
SQUARE = {"num_key_value_heads": 4}  # no layer of fewer than 64 outputs
