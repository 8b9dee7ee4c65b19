"""``llmq serve``: transformers' own server on a packed folder, an OpenAI-compatible endpoint of one machine."""

from __future__ import annotations

from typing import Annotated

import typer

from llmq.cli.models import load_tokenizer
from llmq.errors import SpecError


def serve_command(
    context: typer.Context,
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint folder or hub id, packed or dense.")],
) -> None:
    """Serve a checkpoint, packed or dense, through transformers' own OpenAI-compatible server.

    All options of `transformers serve` go behind DIR: --host, --port, --device, --dtype, --compile and the others. The
    server is ready when `curl localhost:8000/health` answers.
    """
    _check(directory)
    _transformers("serve", directory, *context.args)  # as it was typed: requests have to name it so


def _check(model: str) -> None:
    """Check `model` before the server starts.

    Raises:
        CheckpointError: it is no checkpoint, or has no tokenizer.
        SpecError: the server's packages are not installed, or it would misread the folder's name.
    """
    from transformers.utils.import_utils import is_serve_available

    from llmq.checkpoint import CheckpointReader, resolve

    if not is_serve_available():
        raise SpecError("transformers' server needs fastapi, uvicorn and openai: pip install 'llmq[serve]'")
    path = CheckpointReader(resolve(model)).path
    if "@" in model:
        raise SpecError(f"{model}: transformers' server takes what follows @ for a revision; rename the folder")
    load_tokenizer(path)


def _transformers(*arguments: str) -> None:
    """Carry out a command of transformers' own command line in this process, where packed folders load.

    Raises:
        SpecError: transformers cannot do what `arguments` ask for.
    """
    from transformers.cli.transformers import app

    import llmq.hf  # noqa: F401  makes them load

    try:
        app(list(arguments), prog_name="transformers")
    except (ImportError, ValueError) as error:
        raise SpecError(f"transformers {arguments[0]}: {error}") from error
