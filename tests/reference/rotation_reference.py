"""Hadamard matrices and a rotated Llama in float64, element by element, from the definitions."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sylvester(power: int) -> Tensor:
    """Return the Hadamard matrix of size 2^power: the sign is the parity of the bits that i and j share."""
    size = 2**power
    return torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)]).double()


def paley_one(q: int) -> Tensor:
    """Return Paley's first matrix, size q + 1, for a prime q = 3 mod 4, with Legendre symbols by Euler's criterion."""

    def legendre(a: int) -> float:
        power = pow(a % q, (q - 1) // 2, q)
        return -1.0 if power == q - 1 else float(power)

    h = torch.eye(q + 1, dtype=torch.float64)
    for i in range(q + 1):
        for j in range(q + 1):
            if i == 0 or j == 0:
                h[i, j] += (j > 0) * 1.0 - (i > 0) * 1.0
            else:
                h[i, j] += legendre(i - j)
    return h


def rotated_llama(model: nn.Module, q: Tensor, heads: list[Tensor], head_dim: int) -> dict[str, Tensor]:
    """Return the state of a Llama without biases, its residual stream rotated by `q`, block i's values by `heads[i]`.

    Vectors are rows here: hidden states x become x q, values v of one head become v r.
    """
    state = {key: value.double() for key, value in model.state_dict().items()}
    new = dict(state)
    new["model.embed_tokens.weight"] = state["model.embed_tokens.weight"] @ q
    new["lm_head.weight"] = state["lm_head.weight"] @ torch.diag(state["model.norm.weight"]) @ q
    new["model.norm.weight"] = torch.ones_like(state["model.norm.weight"])
    for i, r in enumerate(heads):
        block = f"model.layers.{i}."
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            gain = torch.diag(state[f"{block}{norm}.weight"])
            new[f"{block}{norm}.weight"] = torch.ones(len(q), dtype=torch.float64)
            for reader in readers:
                new[f"{block}{reader}.weight"] = state[f"{block}{reader}.weight"] @ gain @ q
        for writer in ("self_attn.o_proj", "mlp.down_proj"):
            new[f"{block}{writer}.weight"] = q.T @ state[f"{block}{writer}.weight"]
        values, outputs = new[f"{block}self_attn.v_proj.weight"], new[f"{block}self_attn.o_proj.weight"]
        for at in range(0, len(values), head_dim):
            values[at : at + head_dim] = r.T @ values[at : at + head_dim].clone()
        for at in range(0, outputs.shape[1], head_dim):
            outputs[:, at : at + head_dim] = outputs[:, at : at + head_dim].clone() @ r
    return new
