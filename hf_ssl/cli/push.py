"""`hf-ssl push`: publish a run on the Hub."""

from typing import Annotated

import typer


def push(
    run: Annotated[str, typer.Argument(help="A finished run, or one of its checkpoints.")],
    name: Annotated[str, typer.Argument(help="owner/name on the Hub; created if there is none.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Of a new repository; else as the account has it."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch; main.")] = None,
    license: Annotated[str | None, typer.Option(help="Of the model, for its card, e.g. apache-2.0.")] = None,
    dry_run: Annotated[
        str | None, typer.Option("--dry_run", help="Only write what would be pushed into this folder.")
    ] = None,
) -> None:
    """Publish the encoder, ready for transformers and timm, with all that training needs beside it."""
    from hf_ssl.cli.quiet import quiet_libraries
    from hf_ssl.hub import prepare_repository, publish

    quiet_libraries()
    if dry_run is not None:
        report = prepare_repository(run, dry_run, name, license=license)
        typer.echo(f"{report.native_class} in {dry_run}; nothing was pushed")
        return
    commit = publish(run, name, private=private, revision=revision, license=license)
    typer.echo(f"published {commit.commit_url}")
