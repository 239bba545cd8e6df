"""The same command under torchrun: one folder, one voice."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.cli.conftest import TINY_OPTIONS

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, *options: str) -> "subprocess.Popen[str]":
    given = dict(zip(TINY_OPTIONS[::2], TINY_OPTIONS[1::2], strict=True))
    given |= dict(zip(options[::2], options[1::2], strict=True))
    command = ["train", "mae", *(word for pair in given.items() for word in pair)]
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         "-m", "hf_ssl.cli.main", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_leave_one_run(tmp_path: Path):
    process = start(tmp_path, "--per_device_train_batch_size", "2")
    output = process.communicate(timeout=80)[0]
    assert process.returncode == 0, output
    assert "(2 per device x 2 x 2 accumulated)" in output
    assert output.count("step 4/4  loss") == 1 and output.count("points against the best of") == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mae_tiny"]
    assert (tmp_path / "runs" / "mae_tiny" / "encoder" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "mae_tiny" / "checkpoint-4" / "rng_state_1.pth").is_file()


@pytest.mark.slow
def test_ctrl_c_stops_two_processes_after_the_same_step(tmp_path: Path):
    options = ("--max_steps", "2000", "--save_steps", "2000", "--eval_steps", "2000", "--logging_steps", "1")
    process = start(tmp_path, "--per_device_train_batch_size", "4", *options)
    deadline = threading.Timer(80, os.killpg, (process.pid, signal.SIGKILL))
    deadline.start()
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step 3/"):
            os.kill(process.pid, signal.SIGINT)  # torchrun hands it on
    process.wait()
    deadline.cancel()
    output = "".join(lines)
    found = re.search(r"stopped at step (\d+) of 2000 with a checkpoint", output)
    assert found, output
    checkpoint = tmp_path / "runs" / "mae_tiny" / f"checkpoint-{found[1]}"
    assert (checkpoint / "rng_state_1.pth").is_file() and (checkpoint / "trainer_state.json").is_file()


@pytest.mark.slow
def test_two_processes_embed_into_the_file_of_one(tmp_path: Path):
    from transformers import ViTImageProcessor

    from tests.evaluation.tiny import tiny_vit

    tiny_vit(image_size=8).save_pretrained(tmp_path / "encoder")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "encoder")
    options = ["embed", "encoder", "--dataset", "sample", "--split", "test", "--config_name", "queries"]
    options += ["--batch_size", "4", "--limit", "300"]  # parts of 128 images
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for prefix, name in (([], "one.parquet"), (torchrun, "two.parquet")):
        command = [sys.executable, *prefix, "-m", "hf_ssl.cli.main", *options, "--output", name]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("features") == 1
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    assert not (tmp_path / "two.parquet.parts").exists()
