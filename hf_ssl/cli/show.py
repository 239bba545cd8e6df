"""`hf-ssl show`: pictures of a run."""

from typing import Annotated

import typer


def show(
    run: Annotated[str, typer.Argument(help="Folder of a run.")],
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", help="Where pictures go; RUN/figures.")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="A folder of other images than those of the run.")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side in pixels for patch features and attention.")] = None,
) -> None:
    """Draw views, reconstructions, patch features, attention, nearest neighbours and curves."""
    from hf_ssl.cli.quiet import quiet_libraries
    from hf_ssl.training.figures import draw_run

    quiet_libraries()
    for path in draw_run(run, output_dir, images, size):
        typer.echo(str(path))
