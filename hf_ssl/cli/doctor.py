"""`hf-ssl doctor`: what is wrong with a run."""

from typing import Annotated

import typer


def doctor(run: Annotated[str, typer.Argument(help="Folder of a run, finished or not.")]) -> None:
    """Say what the log of a run shows to be wrong; exit code 1 if something is."""
    from hf_ssl.cli.quiet import quiet_libraries
    from hf_ssl.training.doctor import RULES, diagnose

    quiet_libraries()
    alarms = diagnose(run)
    for alarm in alarms:
        typer.echo(str(alarm))
    if alarms:
        raise typer.Exit(1)
    typer.echo(f"healthy   none of {', '.join(RULES)}")
