"""Gradient caching: one in-batch loss over more images than fit into memory with their graph.

Source: Gao et al. 2021 (arXiv 2101.06983), section 3. Three passes, exact up to rounding:
    1 embed every micro-batch without a graph, and remember the random state that it met
    2 the loss of all embeddings, of all processes; its gradients for the embeddings, and for the parameters
      that it uses itself (a head)
    3 embed every micro-batch again under its random state, with a graph, and send its gradients back
Differences from the paper: the head belongs to pass 2, so that its BatchNorm normalises by the whole batch,
and gradients are summed over processes by the gather inside the loss.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import get_device_states, set_device_states

from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining

Batch = dict[str, Any]
Context = Callable[[], contextlib.AbstractContextManager[Any]]


def cut(batch: Batch, size: int) -> list[Batch]:
    """The rows of a batch, `size` at a time."""
    pieces = zip(*(value.split(size) for value in batch.values()), strict=True)
    return [dict(zip(batch, values, strict=True)) for values in pieces]


def backward_through_cache(
    model: nn.Module,
    network: SSLForPreTraining,
    micro_batches: Sequence[Batch],
    autocast: Context = contextlib.nullcontext,
    no_sync: Context = contextlib.nullcontext,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> SSLOutput:
    """Add to `.grad` the gradients of the loss over all micro-batches together.

    Args:
        model: what forwards go through: the network, or its data-parallel or compiled wrapper.
        network: the method; one with `loss_couples_the_batch`.
        micro_batches: inputs of `forward`, as many in every process; each is read twice.
        autocast: entered anew for every forward.
        no_sync: entered for all backwards but the last, so that processes average once.
        scale: applied to the loss before its gradients are taken (loss scaling).

    Returns:
        What `forward` returns on the joined batch, without a graph.
    """
    states, pieces = _embed_without_graph(model, network, micro_batches, autocast)
    embeddings = {name: torch.cat([piece[name] for piece in pieces]).requires_grad_() for name in pieces[0]}
    with autocast():
        outputs = network.loss_from_embeddings(embeddings)
    assert outputs.loss is not None
    state_after = _RandomState(outputs.loss)
    used = [*embeddings.values(), *(parameter for _, parameter in network.trainable_parameters())]
    gradients = torch.autograd.grad(scale(outputs.loss), used, allow_unused=True)
    outputs.loss = outputs.loss.detach()
    sizes = [len(next(iter(piece.values()))) for piece in pieces]
    of_pieces = zip(*(gradient.split(sizes) for gradient in gradients[: len(embeddings)]), strict=True)
    for index, (state, of_piece) in enumerate(zip(states, of_pieces, strict=True)):
        is_last = index == len(states) - 1
        state.restore()
        with contextlib.nullcontext() if is_last else no_sync():
            with autocast():
                embedded = model(**micro_batches[index], embed_only=True).embeddings
            values, targets = list(embedded.values()), list(of_piece)
            if is_last:  # a data-parallel wrapper waits for all parameters in the backward that it averages
                values += used[len(embeddings) :]
                targets += gradients[len(embeddings) :]
            _send_back(values, targets)
    state_after.restore()
    return outputs


@torch.no_grad()
def _embed_without_graph(
    model: nn.Module, network: SSLForPreTraining, micro_batches: Sequence[Batch], autocast: Context
) -> tuple[list["_RandomState"], list[dict[str, Tensor]]]:
    """Random states and embeddings of all micro-batches; BatchNorm's running statistics stay."""
    states, pieces = [], []
    with _statistics_kept(network.embedder):
        for inputs in micro_batches:
            states.append(_RandomState(next(iter(inputs.values()))))
            with autocast():
                pieces.append(model(**inputs, embed_only=True).embeddings)
    return states, pieces


def _send_back(values: list[Tensor], gradients: list[Tensor | None]) -> None:
    pairs = [
        (value, gradient.to(value.dtype))
        for value, gradient in zip(values, gradients, strict=True)
        if gradient is not None
    ]
    torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Undo what BatchNorm tracks meanwhile: the third pass tracks the same micro-batches."""
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    values = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


class _RandomState:
    """Random states of the CPU and of the device of `example`."""

    def __init__(self, example: Tensor) -> None:
        self.cpu = torch.get_rng_state()
        self.device_type = example.device.type
        self.devices, self.states = get_device_states(example)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states, device_type=self.device_type)
