"""``llmq generate``: a few words from a checkpoint, to see that it works."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llmq.cli.models import DEVICE_HELP, DTYPE_HELP, load_model, load_tokenizer, parse_device, parse_dtype
from llmq.cli.tables import show_json
from llmq.errors import SpecError


def generate_command(  # noqa: PLR0913  one parameter per option
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Checkpoint folder, packed or dense.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add at most.")] = 40,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the most likely token; above 0 tokens are drawn.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw; without effect at temperature 0.")] = 0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help=f"{DTYPE_HELP} Default: the checkpoint's own.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON with prompt, text and tokens.")] = False,
) -> None:
    """Continue a text with a checkpoint, packed or dense, and print it."""
    import torch

    from llmq.checkpoint import CheckpointReader, resolve

    where = parse_device(device)
    precision = None if dtype is None else parse_dtype(dtype, where)
    folder = CheckpointReader(resolve(directory)).path
    tokenizer = load_tokenizer(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise SpecError("the prompt has no tokens; give at least one word")
    model: Any = load_model(folder, precision, where)
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=inputs["input_ids"].to(where),
        attention_mask=inputs["attention_mask"].to(where),
        max_new_tokens=max_new_tokens,
        pad_token_id=padding(tokenizer),
        **sampling(temperature),
    )[0]
    text = tokenizer.decode(output, skip_special_tokens=True)
    if as_json:
        added = len(output) - inputs["input_ids"].shape[1]
        show_json({"prompt": prompt, "text": text, "new_tokens": added})
    else:
        typer.echo(text)


def sampling(temperature: float) -> dict[str, Any]:
    """Return the settings of generation that draw tokens at `temperature`; at 0 the most likely one is taken."""
    if temperature:
        return {"do_sample": True, "temperature": temperature}
    # a checkpoint's generation_config may set these, which transformers warns about in a greedy search
    return {"do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k"))}


def padding(tokenizer: Any) -> int | None:
    """Return the token that fills up rows which ended."""
    found: int | None = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return found
