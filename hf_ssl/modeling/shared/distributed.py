"""What crosses processes: gathering with and without gradient, row shuffling, BatchNorm over all processes.

Without an initialised process group every function acts as one process would. The gradient of a gathered
tensor is the sum over the processes' losses; with the mean that data-parallel training takes afterwards it is
the gradient of the loss on the merged batch (rows concatenated in rank order).
Shape suffixes in this file: B = rows in this process, N = rows in all processes, C = channels.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from hf_ssl.modeling.shared.names import unknown_name_message

_is_alone = False


@contextlib.contextmanager
def as_one_process() -> Iterator[None]:
    """Let this process compute what the others do not take part in; they would be waited for otherwise."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


def world_size() -> int:
    """Number of processes that train together; 1 without a process group, or within `as_one_process`."""
    if _is_alone:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process among them; 0 without a process group, or within `as_one_process`."""
    if _is_alone:
        return 0
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        dist.barrier()


@torch.no_grad()
def all_gather(x: Tensor) -> Tensor:
    """Rows of all processes in rank order, without gradient.

    Args:
        x: tensor of at least one dimension, of the same shape in every process.

    Returns:
        Tensor whose first dimension is `world_size()` times as long, equal in every process.
    """
    if world_size() == 1:
        return x.detach()
    x = x.detach().contiguous()
    gathered = x.new_empty((world_size() * len(x), *x.shape[1:]))
    dist.all_gather_into_tensor(gathered, x)
    return gathered


@torch.no_grad()
def sum_over_processes(x: Tensor) -> Tensor:
    """Elementwise sum of a tensor of the same shape in all processes, without gradient."""
    return _reduced(x, dist.ReduceOp.SUM)


@torch.no_grad()
def max_over_processes(x: Tensor) -> Tensor:
    """Elementwise maximum of a tensor of the same shape in all processes, without gradient."""
    return _reduced(x, dist.ReduceOp.MAX)


def _reduced(x: Tensor, operation: Any) -> Tensor:
    if world_size() == 1:
        return x.detach()
    result = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op=operation)
    return result


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[rank()]


def all_gather_with_gradient(x: Tensor) -> Tensor:
    """Rows of all processes in rank order; the gradient of own rows is summed over the processes' losses.

    Args:
        x: tensor of at least one dimension, of the same shape in every process.

    Returns:
        Tensor whose first dimension is `world_size()` times as long. Every process must use it in its
        backward, or all wait for ever.
    """
    return x if world_size() == 1 else _GatherWithGradient.apply(x)


class _PassToNext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _shifted(x, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _shifted(gradient, -1)


def _shifted(x: Tensor, distance: int) -> Tensor:
    """What the process `distance` before this one in the ring holds; both directions are posted at once."""
    count, own = world_size(), rank()
    x, received = x.detach().contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    operations = [
        dist.P2POp(dist.isend, x, (own + distance) % count),
        dist.P2POp(dist.irecv, received, (own - distance) % count),
    ]
    for request in dist.batch_isend_irecv(operations):  # one request on NCCL, one each on gloo
        request.wait()
    return received


def pass_to_next(x: Tensor) -> Tensor:
    """The tensor of the previous process in the ring; its gradient goes back to where it came from.

    Args:
        x: of the same shape in every process.

    Every process must use the result in its backward, or its neighbours wait for ever.
    """
    return x if world_size() == 1 else _PassToNext.apply(x)


class _SumWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


@torch.no_grad()
def broadcast(x: Tensor) -> Tensor:
    """Overwrite `x` with the values it has in process 0 and return it."""
    if world_size() > 1:
        values = x.detach().contiguous()
        dist.broadcast(values, src=0)
        x.detach().copy_(values)
    return x


def shuffle_rows(x: Tensor, permutation: Tensor) -> Tensor:
    """Deal the rows of all processes out anew, so that BatchNorm statistics do not belong to one's own rows.

    Args:
        x: own rows, first dimension B.
        permutation: permutation of all N = B x processes rows, the same in every process (`broadcast` it).

    Returns:
        This process's B rows of the permuted global batch, without gradient.

    Raises:
        ValueError: `permutation` does not have one entry per row of all processes.
    """
    return all_gather(x)[_own_part(permutation, len(x))]


def unshuffle_rows(x: Tensor, permutation: Tensor) -> Tensor:
    """Undo `shuffle_rows` with the same `permutation`: every process gets its own rows back."""
    return all_gather(x)[_own_part(permutation.argsort(), len(x))]


def _own_part(index_N: Tensor, num_rows: int) -> Tensor:
    if len(index_N) != num_rows * world_size():
        raise ValueError(
            f"permutation has {len(index_N)} entries, needs one per row of all processes: "
            f"{num_rows} rows x {world_size()} processes = {num_rows * world_size()}"
        )
    return index_N.chunk(world_size())[rank()]


class _AnyShapeBatchNorm(nn.BatchNorm2d):
    """Takes (B, C) as well; a `BatchNorm2d`, because weight initialisation recognises norms by that type."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm needs (B, C) or (B, C, ...), got {input.dim()} dimensions")

    def _count_batch(self) -> float:
        """Count one batch; its share in the running statistics (without momentum: that of a plain mean)."""
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _apply_children(self, x: Tensor) -> Tensor:
        # Some networks have norms that carry their dropout and activation, in this order.
        for child in self.children():
            x = child(x)
        return x


class SynchronizedBatchNorm(_AnyShapeBatchNorm):
    """BatchNorm over the rows of all processes, for (B, C) and (B, C, ...) inputs on any device.

    On CUDA it computes as torch's `SyncBatchNorm`. That refuses CPU tensors, and data-parallel wrapping
    refuses modules of its type on the CPU; there the statistics are summed here. Values, gradients and
    running statistics equal those of one process on the merged batch.
    """

    # What torch's forward looks for on its own type, beside what every BatchNorm has.
    process_group = None
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x: Tensor) -> Tensor:
        if world_size() == 1 or not self.training:
            x = nn.BatchNorm2d.forward(self, x)
        elif x.is_cuda:
            x = nn.SyncBatchNorm.forward(self, x)  # type: ignore[arg-type]
        else:
            x = self._normalize_over_processes(x)
        return self._apply_children(x)

    def _normalize_over_processes(self, x: Tensor) -> Tensor:
        # Statistics in at least float32, as torch's own kernels keep them.
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        other_dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        # Processes may have different numbers of rows, as of hidden patches.
        own = torch.tensor([x.numel() // x.shape[1]], dtype=torch.float64, device=x.device)
        count = float(sum_over_processes(own))
        mean_C = _SumWithGradient.apply(values.sum(other_dims)) / count
        centered = values - mean_C.view(shape)
        variance_C = _SumWithGradient.apply(centered.square().sum(other_dims)) / count
        self._track(mean_C.detach(), variance_C.detach() * (count / max(count - 1, 1)))
        normalized = centered * (variance_C + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            normalized = normalized * self.weight.view(shape)
        if self.bias is not None:
            normalized = normalized + self.bias.view(shape)
        result: Tensor = normalized.to(x.dtype)
        return result

    def _track(self, mean_C: Tensor, unbiased_variance_C: Tensor) -> None:
        share = self._count_batch()
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased_variance_C.to(self.running_var.dtype), share)


class SplitBatchNorm(_AnyShapeBatchNorm):
    """BatchNorm that treats one batch as if it lay on several devices: row n belongs to group n mod splits.

    Every group has its own statistics in training; running statistics are the mean over the groups.

    Raises:
        ValueError: (in training) the number of rows is not a multiple of `num_splits`.
    """

    num_splits: int = 1

    def forward(self, x: Tensor) -> Tensor:
        x = self._normalize_groups(x) if self.training and self.num_splits > 1 else super().forward(x)
        return self._apply_children(x)

    def _normalize_groups(self, x: Tensor) -> Tensor:
        splits = self.num_splits
        if len(x) % splits:
            raise ValueError(f"batch of {len(x)} rows is not a multiple of {splits} BatchNorm splits")
        means, variances = self.running_mean.repeat(splits), self.running_var.repeat(splits)
        normalized = F.batch_norm(
            x.reshape(len(x) // splits, splits * x.shape[1], *x.shape[2:]),
            means,
            variances,
            None if self.weight is None else self.weight.repeat(splits),
            None if self.bias is None else self.bias.repeat(splits),
            training=True,
            momentum=self._count_batch(),
            eps=self.eps,
        )
        self.running_mean.copy_(means.view(splits, -1).mean(0))
        self.running_var.copy_(variances.view(splits, -1).mean(0))
        return normalized.reshape(x.shape)


def convert_batchnorm(module: nn.Module, kind: str = "synchronized", num_splits: int = 1) -> nn.Module:
    """Replace every BatchNorm inside a module, keeping parameters, buffers, names and settings.

    Args:
        module: network to change in place.
        kind: "synchronized" (statistics over all processes) or "split" (over groups of this one's rows).
        num_splits: number of groups of "split"; must divide the number of rows of every training batch.

    Returns:
        `module`, or its replacement if it is itself a BatchNorm.

    Raises:
        ValueError: unknown `kind`, `num_splits` below 1, or a BatchNorm without running statistics.
    """
    if kind not in ("synchronized", "split"):
        raise ValueError(unknown_name_message("BatchNorm kind", kind, ["synchronized", "split"]))
    if num_splits < 1:
        raise ValueError(f"num_splits must be at least 1, got {num_splits}")
    if isinstance(module, _BatchNorm):
        return _converted(module, kind, num_splits)
    for name, child in module.named_children():
        setattr(module, name, convert_batchnorm(child, kind, num_splits))
    return module


def _converted(norm: _BatchNorm, kind: str, num_splits: int) -> _BatchNorm:
    if norm.running_mean is None:
        raise ValueError(
            "BatchNorm without running statistics cannot be converted; track_running_stats is off"
        )
    make: type[_BatchNorm] = SynchronizedBatchNorm if kind == "synchronized" else SplitBatchNorm
    new = make(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    if isinstance(new, SplitBatchNorm):
        new.num_splits = num_splits
    # The same tensors, not copies: optimizers and tied modules that hold them stay right.
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    for name, child in norm.named_children():
        new.add_module(name, child)
    if getattr(norm, "_is_hf_initialized", False):
        # transformers must not start anew what its architecture has started (e.g. a zero scale).
        new._is_hf_initialized = True  # type: ignore[assignment]
    return new.train(norm.training)
