"""A ring of the keys of earlier batches: the negatives of a contrastive loss.

Shape suffixes: K = queue length, N = keys of one step from all processes, D = embedding width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


class NegativeQueue(nn.Module):
    """First in, first out; starts with random unit vectors. Both buffers are training state and are saved.

    Args:
        length: number of keys, a multiple of the keys of a step.
        width: width of a key.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("keys", torch.empty(length, width, dtype=torch.float32))
        self.register_buffer("position", torch.empty(1, dtype=torch.int64))
        self.initialize_parameters()

    def initialize_parameters(self) -> None:
        """Fill with random unit vectors and start at row 0; leave what a checkpoint brought alone."""
        init.copy_(self.keys, F.normalize(torch.randn_like(self.keys), dim=1))
        init.zeros_(self.position)

    @torch.no_grad()
    def enqueue(self, keys_ND: Tensor) -> None:
        """Overwrite the oldest keys, once per optimizer step and after the loss has read the queue.

        Args:
            keys_ND: unit-norm keys of all processes in global row order, equal in every process.

        Raises:
            ValueError: the queue length is not a multiple of N.
        """
        length, num_keys = len(self.keys), len(keys_ND)
        if length % num_keys:
            raise ValueError(
                f"queue length {length} is not a multiple of the {num_keys} keys of a step; "
                f"use {max(1, length // num_keys) * num_keys}"
            )
        # Index arithmetic on the device: reading the position here would wait for the GPU in every step.
        rows_N = (self.position + torch.arange(num_keys, device=self.position.device)) % length
        self.keys.index_copy_(0, rows_N, keys_ND.detach().to(self.keys.dtype))
        self.position.copy_((self.position + num_keys) % length)
