"""What the tests of serving share."""

from torch import nn

from llmq.nn import QuantLinear


def layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLinear)}
