"""``llmq chat``: a conversation with a checkpoint in the terminal, by transformers' own generation."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from rich.console import Console

from llmq.cli.generate import padding, sampling
from llmq.cli.models import DEVICE_HELP, DTYPE_HELP, load_model, load_tokenizer, parse_device, parse_dtype
from llmq.errors import CheckpointError

_COMMANDS = "/clear begins a new conversation, /exit or the end of input ends this one"


def chat_command(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint folder or hub id, packed or dense.")],
    system: Annotated[str | None, typer.Option(help="System prompt.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="0 always takes the most likely token. Default: as the checkpoint's generation_config says.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help=f"{DTYPE_HELP} Default: the checkpoint's own.", show_default=False)
    ] = None,
) -> None:
    """Talk to a checkpoint, packed or dense; answers appear word by word on stdout.

    /clear begins a new conversation, /exit or the end of input ends this one.
    """
    import torch
    from transformers import TextStreamer

    from llmq.checkpoint import CheckpointReader, resolve

    where = parse_device(device)
    precision = None if dtype is None else parse_dtype(dtype, where)
    folder = CheckpointReader(resolve(directory)).path
    tokenizer: Any = load_tokenizer(folder)
    if tokenizer.chat_template is None:
        raise CheckpointError(
            f"{folder}: its tokenizer has no chat template, so it is no model for conversations; use llmq generate"
        )
    model: Any = load_model(folder, precision, where)
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    settings = {"max_new_tokens": max_new_tokens, **({} if temperature is None else sampling(temperature))}
    console = Console(stderr=True, highlight=False)
    console.print(f"{folder.name}: {_COMMANDS}")
    start = [] if system is None else [{"role": "system", "content": system}]
    turns = list(start)
    while (text := _read(console)) is not None:
        if text == "/clear":
            turns = list(start)
        elif text:
            turns.append({"role": "user", "content": text})
            inputs = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            ).to(where)
            output = model.generate(**inputs, streamer=streamer, pad_token_id=padding(tokenizer), **settings)
            answer = output[0, inputs["input_ids"].shape[1] :]
            turns.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})


def _read(console: Console) -> str | None:
    """Return what the user typed, or None at the end; the prompt appears where a person types."""
    try:
        text = (console.input("[bold]> [/bold]") if sys.stdin.isatty() else input()).strip()
    except EOFError:
        return None
    return None if text == "/exit" else text
