"""`hf-ssl show`: pictures of a run."""

from typing import Annotated

import typer


def show(
    run: Annotated[str, typer.Argument(help="Folder of a run.")],
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", help="Where pictures go; RUN/figures.")
    ] = None,
) -> None:
    """Draw views, reconstructions, patch features, nearest neighbours and curves."""
    from hf_ssl.cli.quiet import quiet_libraries
    from hf_ssl.training.figures import draw_run

    quiet_libraries()
    for path in draw_run(run, output_dir):
        typer.echo(str(path))
