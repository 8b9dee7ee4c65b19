"""End-loss weights of experts' tokens: gradients where the router sends them, nothing elsewhere."""

from pathlib import Path

import torch
from moe_cases import make_moe, started, windows
from torch import Tensor, nn

from llmq.guidance import token_weights
from llmq.moe import Bank, banks_of


def every_expert_on_every_token(self: Bank, x: Tensor, picked: Tensor, weights: Tensor) -> Tensor:
    """Return what a bank returns, computed without routing: experts that are not picked count zero times."""
    out = torch.zeros_like(x)
    for expert in range(self.size):
        share = (weights * (picked == expert)).sum(dim=1, keepdim=True)
        out = out + share * self.projections(expert)[1](self.inner(expert, x))
    return out


def test_weights_are_squared_gradients_of_a_run_without_routing(tmp_path: Path) -> None:
    folder, calibration = make_moe(tmp_path / "m", "gpt_oss", never=3), windows(4, 16)
    _, loader = started(folder, calibration)
    model, linears = loader.job.model, [x for x in loader.job.linears if ".experts." in x.name]
    for index in range(2):
        loader.block(index)
    found = token_weights(model, linears, calibration, groups=2, batch_tokens=32)

    outputs: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        output.retain_grad()
        outputs[name] = output

    handles = [
        linear.module.register_forward_hook(lambda _, __, output, name=linear.name: keep(name, output))
        for linear in linears
    ]
    for bank in banks_of(model).values():
        bank.forward = every_expert_on_every_token.__get__(bank)
    ids = calibration.input_ids
    logits = model(input_ids=ids, use_cache=False).logits
    nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 128), ids[:, 1:].reshape(-1), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for linear in linears:
        if ".experts.3." in linear.name:
            assert torch.equal(found[linear.name], torch.ones(2, 4, 16)), "nothing is known: all tokens count alike"
            continue
        gradient = outputs[linear.name].grad
        assert gradient is not None
        half = gradient.shape[1] // 2
        expected = torch.stack([part.square().mean(dim=1) for part in gradient.split(half, dim=1)]).view(2, 4, 16)
        expected /= expected.mean(dim=(1, 2), keepdim=True)
        # float32 gradients of sums in another order
        torch.testing.assert_close(found[linear.name], expected, rtol=1e-3, atol=1e-4)
        assert (found[linear.name] == 0).any(), "tokens that went elsewhere weigh nothing"
