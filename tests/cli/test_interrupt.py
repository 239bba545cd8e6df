"""Ctrl-C, as a terminal sends it: to the command and its workers alike."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.conftest import TINY_OPTIONS, call

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_interrupted_run_continues_to_the_same_weights(tmp_path: Path):
    """With workers, accumulation and drop path, which draws from the global random state."""
    options = dict(zip(TINY_OPTIONS[::2], TINY_OPTIONS[1::2], strict=True)) | {
        "--dataloader_num_workers": "2",
        "--max_steps": "100",
        "--save_steps": "100",
        "--eval_steps": "100",
        "--logging_steps": "1",
        "--per_device_train_batch_size": "4",
        "--drop_path_rate": "0.2",
    }
    command = ["train", "mae", *(word for pair in options.items() for word in pair)]
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_ssl.cli.main", *command, "--output_dir", str(tmp_path / "run")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,  # so that the signal goes to all of its processes and not to the tests
    )
    deadline = threading.Timer(100, process.kill)
    deadline.start()
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line.rstrip())
        if line.startswith("step 3/"):
            os.killpg(process.pid, signal.SIGINT)
    code = process.wait()
    deadline.cancel()
    assert code == 130, "\n".join(lines)
    assert "stopping after this step; press Ctrl-C again to stop at once" in lines
    assert "Traceback" not in "\n".join(lines)
    found = re.fullmatch(
        r"hf-ssl: stopped at step (\d+) of 100 with a checkpoint; continue with: hf-ssl (.*)", lines[-1]
    )
    assert found and 3 <= int(found[1]) < 100, lines[-1]
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == [f"checkpoint-{found[1]}"]
    resumed = call(*shlex.split(found[2]))
    assert resumed.code == 0, resumed.err
    whole = call(*command, "--output_dir", str(tmp_path / "whole"))
    assert whole.code == 0, whole.err
    weights, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole"))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)
