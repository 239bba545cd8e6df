"""Which precision is fast on this machine."""

import time
from functools import cache

import torch

BF16_WORTH_IT = 1.3  # gain of a bare product below which casts and eager attention eat it up


@cache
def has_fast_bf16(device_type: str | None = None) -> bool:
    """Whether bf16 is faster than fp32: on a GPU that has it, or on a CPU on which it was measured.

    Args:
        device_type: "cuda" or "cpu"; None: a GPU where there is one.

    CPU flags do not tell: a virtual machine can show `avx512_bf16` and run bf16 at half the speed of fp32.
    """
    if torch.cuda.is_available() and device_type != "cpu":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    seconds = _seconds_of_products([torch.float32, torch.bfloat16])
    return seconds[torch.bfloat16] < seconds[torch.float32] / BF16_WORTH_IT


def _seconds_of_products(dtypes: list[torch.dtype], rounds: int = 12) -> dict[torch.dtype, float]:
    """Best time of a small matrix product in each type, about 50 ms in all.

    Taken in turns and on one thread: threads that wait for a busy neighbour would be counted as work.
    """
    matrices = {dtype: torch.randn(384, 384).to(dtype) for dtype in dtypes}
    best = dict.fromkeys(dtypes, float("inf"))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            for dtype, matrix in matrices.items():
                start = time.process_time()
                matrix @ matrix
                best[dtype] = min(best[dtype], time.process_time() - start)
    finally:
        torch.set_num_threads(num_threads)
    return best
