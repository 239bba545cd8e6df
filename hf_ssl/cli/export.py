"""`hf-ssl export`: write an encoder as a native model."""

from typing import Annotated

import typer


def export(
    run: Annotated[str, typer.Argument(help="A run or a checkpoint.")],
    folder: Annotated[str, typer.Argument(help="Folder for the native encoder.")],
    overwrite: Annotated[bool, typer.Option(help="Replace what the folder holds.")] = False,
) -> None:
    """Write the encoder as a transformers or timm model that loads without hf_ssl."""
    from hf_ssl.cli.quiet import quiet_libraries
    from hf_ssl.hub import export_encoder

    quiet_libraries()
    report = export_encoder(run, folder, overwrite=overwrite)
    typer.echo(f"{report.native_class} in {report.folder}, difference {report.max_abs_difference:.1e}")
    for note in report.notes:
        typer.echo(f"note: {note}")
    typer.echo("\n" + "\n".join(report.how_to_load))
