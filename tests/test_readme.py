"""The README's Python runs as it is written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_of_the_readme_runs(number: int, tmp_path: Path) -> None:
    code = BLOCKS[number].replace("max_steps=200", "max_steps=5")  # what is shown, in less time
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_command_of_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files = {path.stem for path in (ROOT / "hf_ssl" / "cli").glob("*.py")}
    named = set(re.findall(r"^hf-ssl ([a-z]+)", text, re.MULTILINE))
    assert named and named <= files
