"""Run one function in several processes that form a gloo group, and collect what they return.

Used as `run_processes(function, *arguments)`; the function must be at the top level of its file.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def run_processes(function: Callable[..., Any], *arguments: Any, num_processes: int = 2) -> list[Any]:
    """Results of `function(*arguments)` in rank order; both may be whatever `torch.save` takes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(arguments, Path(folder) / "arguments.pt")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, __file__, function.__code__.co_filename, function.__name__, folder]
        processes = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},  # as torchrun does
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for rank in range(num_processes)
        ]
        try:
            outputs = [process.communicate(timeout=900)[0].decode() for process in processes]
        finally:
            for process in processes:
                process.kill()
        for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
            if process.returncode:
                raise RuntimeError(f"rank {rank} of {function.__name__} failed:\n{output}")
        return [
            torch.load(Path(folder) / f"result{rank}.pt", weights_only=False) for rank in range(num_processes)
        ]


def _run_in_this_process(file: str, function_name: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo")
    spec = importlib.util.spec_from_file_location("distributed_test", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["distributed_test"] = module
    spec.loader.exec_module(module)
    arguments = torch.load(Path(folder) / "arguments.pt", weights_only=False)
    result = getattr(module, function_name)(*arguments)
    torch.save(result, Path(folder) / f"result{torch.distributed.get_rank()}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then end a process badly that takes them down


if __name__ == "__main__":
    _run_in_this_process(*sys.argv[1:])
