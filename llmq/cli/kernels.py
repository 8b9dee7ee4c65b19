"""``llmq kernels``: which kernel runs each layer of a packed folder, why not a better one, and what is one product."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from llmq.cli.models import DEVICE_HELP, DTYPE_HELP, parse_device, parse_dtype
from llmq.cli.tables import show, show_json

if TYPE_CHECKING:
    from llmq.choices import Choice, Together


def kernels_command(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Packed checkpoint folder.")],
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "bfloat16",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which kernel runs each kind of layer here, what it does with M tokens, and why better ones do not run it.

    Layers that see the same input, such as q, k and v, are listed apart: for few tokens they are one product.
    """
    from llmq.checkpoint import resolve
    from llmq.choices import choices, together

    where = parse_device(device)
    precision = parse_dtype(dtype, where)
    assert precision is not None, "it was named"
    folder = resolve(directory)
    found, shared = choices(folder, where, precision), together(folder, where, precision)
    if as_json:
        plain = {"choices": [_plain(choice) for choice in found], "fused": [asdict(group) for group in shared]}
        show_json({"device": device, "dtype": dtype, **plain})
    else:
        show(_table(found))
        if any(choice.refused for choice in found):
            show("", _refusals(found))
        if shared:
            show("", _fused(shared))


def _plain(choice: Choice) -> dict[str, object]:
    return {**asdict(choice), "layer": choice.layer._asdict()}


def _table(found: list[Choice]) -> Table:
    table = Table("layers", "N x K", "bits", "group", "sym", "kernel", "tokens: what it does", box=None, pad_edge=False)
    for choice in found:
        layer = choice.layer
        table.add_row(
            str(choice.layers),
            f"{layer.out_features} x {layer.in_features}",
            str(layer.bits),
            str(layer.group_size),
            "yes" if layer.symmetric else "no",
            choice.kernel if choice.experts is None else f"{choice.kernel}, experts {choice.experts}",
            "\n".join(f"{counts}: {path}" for path, counts in _ranges(choice.paths).items()) or "always the same",
        )
    return table


def _fused(shared: list[Together]) -> Table:
    table = Table("see the same input", "modules", "outputs", "one product for all", box=None, pad_edge=False)
    for group in shared:
        how = f"up to {group.tokens} token{'s' if group.tokens > 1 else ''}"
        table.add_row(", ".join(group.names), str(group.groups), str(group.outputs), group.refused or how)
    return table


def _ranges(paths: dict[int, str]) -> dict[str, str]:
    """Return the numbers of tokens by what is done with them."""
    found: dict[str, list[int]] = {}
    for count, path in paths.items():
        found.setdefault(path, []).append(count)
    return {path: ", ".join(map(str, counts)) for path, counts in found.items()}


def _refusals(found: list[Choice]) -> Table:
    table = Table("kernel", "does not run", "because", box=None, pad_edge=False)
    rows: dict[tuple[str, str], list[str]] = {}
    for choice in found:
        for kernel, reason in choice.refused.items():
            shape = f"{choice.layer.out_features} x {choice.layer.in_features}"
            rows.setdefault((kernel, reason), []).append(shape)
    for (kernel, reason), shapes in rows.items():
        table.add_row(kernel, ", ".join(dict.fromkeys(shapes)), reason)
    return table
