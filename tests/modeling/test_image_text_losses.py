"""Losses of images with texts: against the authors' values, in one process and in several."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hf_ssl.modeling.shared.distributed import pass_to_next
from hf_ssl.modeling.shared.image_text_losses import (
    agreement_of_pairs,
    pairwise_sigmoid_loss,
    symmetric_cross_entropy,
)
from tests.closeness import near
from tests.distributed import run_processes

LOSSES = {"clip": symmetric_cross_entropy, "siglip": pairwise_sigmoid_loss}


def loss_and_gradients(name: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of this process's part of the pairs; as `backward` leaves them, without a mean over processes."""
    rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    image, text = (values[key].chunk(count)[rank].clone().requires_grad_() for key in ("image", "text"))
    keys = ["logit_scale", *(["logit_bias"] if name == "siglip" else [])]
    scalars = [values[key].clone().requires_grad_() for key in keys]
    loss = LOSSES[name](image, text, *scalars)
    loss.backward()
    found = {"loss": loss.detach(), "grad_image": image.grad, "grad_text": text.grad}
    return found | {f"grad_{key}": scalar.grad for key, scalar in zip(keys, scalars, strict=True)}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_loss_and_gradients_are_the_authors(name, dtype, tolerance, golden):
    values = golden(name)
    found = loss_and_gradients(name, {key: value.to(dtype) for key, value in values.items()})
    for key, value in found.items():
        assert value.dtype == dtype
        near(value.double(), values[key].double(), tolerance)


@pytest.mark.parametrize(
    ("name", "num_processes", "prefix"),
    [
        ("clip", 2, "ranks2.local1_gradgather1"),
        ("siglip", 2, "ranks2"),
        pytest.param("siglip", 4, "ranks4", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_of_several_processes_are_the_authors(name, num_processes, prefix, golden):
    """Labels by rank, gradients of gathered texts: a wrong gradient here need not show in the loss."""
    values = golden(name)
    results = run_processes(loss_and_gradients, name, values, num_processes=num_processes)
    near(torch.stack([result["loss"] for result in results]), values[f"{prefix}.loss_per_rank"], 1e-9)
    for key in ("grad_image", "grad_text"):
        near(torch.cat([result[key] for result in results]), values[f"{prefix}.{key}"], 1e-9)
        # The mean that data-parallel training takes is the gradient of the whole loss.
        whole = torch.cat([result[key] for result in results]) / num_processes
        near(whole, values[key], 1e-9)
    for key in ("grad_logit_scale", *(["grad_logit_bias"] if name == "siglip" else [])):
        per_rank = torch.stack([result[key] for result in results])
        near(per_rank, values[f"{prefix}.{key}_per_rank"], 1e-9)


def ring_of_ranks() -> list[float]:
    """What this process holds after each shift, and the gradient that comes home."""
    own = torch.tensor([float(dist.get_rank())], requires_grad=True)
    seen, x, total = [], own, torch.zeros(1)
    for distance in range(1, dist.get_world_size()):
        x = pass_to_next(x)
        seen.append(x.item())
        total = total + 10**distance * x
    total.backward()
    return [*seen, own.grad.item()]


def test_what_is_received_is_passed_on_and_gradients_come_home():
    """A process that passed its own again would hold its neighbour's twice."""
    assert run_processes(ring_of_ranks, num_processes=3) == [[2, 1, 110], [0, 2, 110], [1, 0, 110]]


@pytest.mark.parametrize("name", LOSSES)
def test_embeddings_are_normalised_and_pairs_may_be_reordered(name, golden):
    values = golden(name)
    order = torch.tensor([3, 1, 0, 2, *range(4, len(values["image"]))])
    other = values | {"image": 7 * values["image"][order], "text": 0.1 * values["text"][order]}
    near(loss_and_gradients(name, other)["loss"], values["loss"], 1e-9)


def test_cross_entropy_of_equal_embeddings_is_ln_n():
    same = torch.ones(6, 4)
    near(symmetric_cross_entropy(same, same, torch.tensor([2.0])), torch.tensor(math.log(6)), 1e-6)


def test_sigmoid_loss_is_summed_over_texts_and_averaged_over_images():
    """Orthogonal pairs: each case costs what scale 10 and bias -10 leave of it."""
    image, text = torch.eye(8)[:4], torch.eye(8)[4:]
    loss = pairwise_sigmoid_loss(image, text, torch.tensor([math.log(10)]), torch.tensor([-10.0]))
    expected = math.log1p(math.exp(10)) + 3 * math.log1p(math.exp(-10))
    near(loss, torch.tensor(expected), 1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_raised_before_normalising(name):
    """The values that half precision can hold, normalised in float32: equal to the same values in float32."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(6, 8, generator=generator).bfloat16() for _ in range(2))
    scalars = [torch.tensor([3.0]), *([torch.tensor([-5.0])] if name == "siglip" else [])]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = LOSSES[name](image, text, *scalars)
    assert half.dtype == torch.float32
    near(half, LOSSES[name](image.float(), text.float(), *scalars), 1e-6)


def test_agreement_of_pairs_counts_both_directions():
    image = torch.eye(3)
    text = torch.tensor([[1.0, 0, 0], [0.9, 0.1, 0], [0, 0, 1.0]])
    found = agreement_of_pairs(image, text)
    assert found["image_to_text_accuracy"] == 1 and found["text_to_image_accuracy"] == pytest.approx(2 / 3)
    assert found["positive_cosine"] > found["negative_cosine"]
