"""The command line in this process, which saves the import of a subprocess, and one run for all commands."""

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_ssl.cli.main import main

TINY_OPTIONS = (
    "--image_size 16 --patch_size 4 --hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 "
    "--decoder_hidden_size 16 --decoder_num_hidden_layers 1 --decoder_num_attention_heads 2 "
    "--global_batch_size 8 --max_steps 4 --warmup_steps 0 --save_steps 2 --eval_steps 2 --logging_steps 2 "
    "--bf16 false --probe_limit 60 --probe_linear false"
).split()


@dataclass
class Outcome:
    """What a command left on the screen."""

    code: int
    out: str
    err: str


def call(*arguments: str) -> Outcome:
    """Run one command as a shell would."""
    out, err = io.StringIO(), io.StringIO()
    logger = logging.getLogger("hf_ssl")
    before = (logger.handlers, logger.propagate, logger.level)
    code, argv = 0, sys.argv
    sys.argv = ["hf-ssl", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = argv
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])
    return Outcome(code, out.getvalue(), err.getvalue())


@pytest.fixture
def cli() -> Callable[..., Outcome]:
    """The command line as a function."""
    return call


@dataclass
class TinyRun:
    """A run of four steps of MAE on the built-in sample."""

    folder: Path
    outcome: Outcome


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyRun]:
    """One run for all tests that only read it."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    outcome = call("train", "mae", "--output_dir", str(folder), *TINY_OPTIONS)
    assert outcome.code == 0, outcome.err
    yield TinyRun(folder, outcome)
