"""Run a piece of Python in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

WITHOUT_PACKAGE = """
import sys
sys.modules["hf_ssl"] = None  # whatever imports it fails, also where it is installed
"""


def run_python(
    code: str,
    *arguments: str,
    with_package: bool = True,
    cwd: Path | None = None,
    timeout: float = 120,
    check: bool = True,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Output of `code` in a new interpreter.

    Args:
        code: a program.
        *arguments: its `sys.argv[1:]`.
        with_package: whether it can import hf_ssl.
        cwd: folder it runs in.
        timeout: seconds.
        check: an exit code that is not 0 fails the test, with what the program said.
        **environment: variables besides those of this process.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    variables.pop("PYTHONPATH", None)
    if with_package:
        variables["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-c", code if with_package else WITHOUT_PACKAGE + code, *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout, check=False
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done
