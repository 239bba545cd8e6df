"""`hf-ssl methods`: what can be trained, and with which keys."""

from typing import Annotated

import typer


def methods(
    name: Annotated[str | None, typer.Argument(help="Show the keys of this method's recipes.")] = None,
) -> None:
    """List the methods, or all keys of one."""
    from hf_ssl.modeling import METHODS
    from hf_ssl.training.recipes import check_method, known_keys, load_recipe, recipe_names

    if name is None:
        name_width, family_width = (
            max(len(getattr(method, column)) for method in METHODS.values()) for column in ("name", "family")
        )
        for method in METHODS.values():
            typer.echo(
                f"{method.name:{name_width}}  {method.family:{family_width}}  arXiv {method.paper}  "
                f"{method.summary}"
            )
        typer.echo("\nrecipes: " + ", ".join(recipe_names()))
        return
    check_method(name)
    for section, keys in known_keys(name).items():
        typer.echo(f"{section}: {', '.join(sorted(keys))}\n")
    typer.echo(f"the tiny recipe, which runs by default:\n\n{load_recipe(f'{name}_tiny').to_yaml()}")
