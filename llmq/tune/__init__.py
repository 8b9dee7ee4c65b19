"""Gradient descent on what solvers found: the codes and scales of a block, then the scales and norms of the model.

Both start from a quantized weight and end with one on the same grid, so the result is packed like any other. What is
kept is the best state seen on held-out tokens, the start included.
"""
