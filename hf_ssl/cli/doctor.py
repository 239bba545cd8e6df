"""`hf-ssl doctor`: what is wrong with a run."""

from typing import Annotated

import typer


def doctor(run: Annotated[str, typer.Argument(help="Folder of a run, finished or not.")]) -> None:
    """Say what the log of a run shows to be wrong; exit code 1 if something is."""
    from hf_ssl.cli.quiet import quiet_libraries
    from hf_ssl.training.doctor import PATIENCE, diagnose

    quiet_libraries()
    diagnosis = diagnose(run)
    for alarm in diagnosis.alarms:
        typer.echo(str(alarm))
    if diagnosis.alarms:
        raise typer.Exit(1)
    if diagnosis.judged:
        typer.echo(f"no alarm  looked for: {', '.join(diagnosis.judged)}")
    else:
        typer.echo(
            f"unknown   the log is shorter than {PATIENCE} steps, or this method has nothing to look for yet"
        )
