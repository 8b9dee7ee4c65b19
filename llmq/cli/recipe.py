"""``llmq recipe``: the settings in force, as a file that ``--recipe`` reads."""

from __future__ import annotations

import typer

from llmq.cli.options import takes_recipe
from llmq.recipe import Recipe


@takes_recipe
def recipe_command(recipe: Recipe) -> None:
    """Print the recipe that these options make, every field written out."""
    typer.echo(recipe.to_yaml(), nl=False)
