"""The recipe as command-line options: one per field of `Recipe`, with its type, default and help from there."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Collection
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from llmq.presets import PRESETS, preset_fields
from llmq.recipe import Recipe, make_recipe, read_recipe

_SWITCHES = {"sym": "--sym/--asym"}  # booleans are --name/--no-name otherwise
_FILE_ONLY = ("max_fallback",)  # set in a recipe file, too rare for a flag


def takes_recipe(command: Callable[..., None], only: Collection[str] = ()) -> Callable[..., None]:
    """Give `command` an option for every recipe field, ``--preset`` and ``--recipe``; it gets the result as `recipe`.

    Values on the command line win over those in the file, which win over those of the preset. With `only`, there are
    options for those fields alone.
    """
    fields = {name: field for name, field in Recipe.model_fields.items() if name not in _FILE_ONLY}
    fields = {name: field for name, field in fields.items() if not only or name in only}

    @wraps(command)
    def run(preset: str = "default", recipe_file: Path | None = None, **arguments: Any) -> None:
        given = {name: arguments.pop(name) for name in fields}
        set_before = preset_fields(preset) | (read_recipe(recipe_file) if recipe_file else {})
        command(recipe=make_recipe(set_before | {k: v for k, v in given.items() if v is not None}), **arguments)

    own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "recipe"]
    file_option = Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE.yaml", help="Read settings from a recipe.", show_default=False),
    ]
    preset_option = Annotated[str, typer.Option(help=f"Settings to start from: {', '.join(PRESETS)}.")]
    options = [_parameter(name, field) for name, field in fields.items()]
    added = [
        inspect.Parameter("preset", inspect.Parameter.KEYWORD_ONLY, default="default", annotation=preset_option),
        inspect.Parameter("recipe_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=file_option),
    ]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    run.__signature__ = inspect.Signature([*own, *added, *options])  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in [*own, *added, *options]}
    del run.__wrapped__  # inspect would look through it
    return run


def listed(names: str) -> list[str]:
    """Return the names in "a,b, c"."""
    return [name.strip() for name in names.split(",") if name.strip()]


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """Return the keyword parameter for one recipe field; None means that it was not given."""
    shown = "none" if field.default in (None, ()) else field.default
    flag = "--" + name.replace("_", "-")
    if field.annotation is bool:
        flag = _SWITCHES.get(name, f"{flag}/--no-{flag[2:]}")
        shown = flag.split("/")[0 if field.default else 1]
    help_text = field.description or ""
    if "default" not in help_text:
        help_text = f"{help_text} [default: {shown}]"
    option = typer.Option(flag, help=help_text[0].upper() + help_text[1:], show_default=False)
    annotation: Any = Annotated[Union[_plain(field.annotation), None], option]  # noqa: UP007  built at run time
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _plain(annotation: Any) -> Any:
    """Return the type that the command line reads for a field's annotation."""
    origin = get_origin(annotation)
    if origin is Literal:
        return str  # the recipe checks the value, with one message wherever it comes from
    if origin in (Union, types.UnionType):
        return next(arg for arg in get_args(annotation) if arg is not type(None))
    if origin is tuple:
        return list[str]
    return annotation
