"""`hf-ssl`: the commands, and what a user sees when something is wrong: one line, exit code 2."""

import logging
import os
import sys

import typer

from hf_ssl.cli import doctor, embed, evaluate, export, methods, push, segment, show, train

app = typer.Typer(
    help="Pre-train, check, export and use self-supervised vision encoders.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
KEYS_ALLOWED = {"allow_extra_args": True, "ignore_unknown_options": True}

app.command("methods")(methods.methods)
app.command("train", context_settings=KEYS_ALLOWED)(train.train)
app.command("doctor")(doctor.doctor)
app.command("evaluate")(evaluate.evaluate)
app.command("segment")(segment.segment)
app.command("embed")(embed.embed)
app.command("export")(export.export)
app.command("push")(push.push)
app.command("show")(show.show)


def main() -> None:
    """Entry point: ends with exit code 0, 2 for what cannot be done, 130 after Ctrl-C.

    `--debug` anywhere shows the traceback of an error.
    """
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    _configure_logging()
    try:
        app(args=arguments, standalone_mode=True)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        typer.echo(f"hf-ssl: {_one_line(error)}", err=True)
        sys.exit(130 if type(error).__name__ == "Interrupted" else 2)


def _one_line(error: Exception) -> str:
    """The message of an error as one line; errors that we did not foresee also say their type."""
    text = " ".join(str(error).split()) or type(error).__name__
    foreseen = isinstance(error, (ValueError, OSError)) or type(error).__module__.startswith("hf_ssl")
    return text if foreseen else f"{type(error).__name__}: {text} (--debug shows where)"


def _configure_logging() -> None:
    """Our own messages plainly; other libraries only when something is wrong."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("hf_ssl")
    ours.handlers = [handler]
    # Under torchrun every process runs this command; one of them tells what happens.
    ours.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    ours.propagate = False


if __name__ == "__main__":
    main()
