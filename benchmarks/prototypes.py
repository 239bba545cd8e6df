"""Prototype loss in chunks beside its plain form: time, peak memory, and how far they differ.

    python benchmarks/prototypes.py [--prototypes 65536] [--images 16 64] [--local-views 8]

Measured is the part behind the bottleneck vectors, forward and backward: weight normalisation, logits of
student and teacher, centring, cross-entropy over all pairs of views, gradients of vectors and prototypes. The
plain form holds all logits, as published code does. Times are CPU time of this process, or of the GPU where
there is one; both forms take turns, ratios are those of medians.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from interleaved import peak_memory
from torch import Tensor

from hf_ssl.modeling.shared.centering import PrototypeCenter, centered_targets
from hf_ssl.modeling.shared.prototypes import PrototypeWeights, mean_of_other_views, view_cross_entropies

STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04

Loss = Callable[[Tensor, Tensor, Tensor, Tensor, PrototypeCenter], Tensor]


def chunked(
    student: Tensor, teacher: Tensor, weight: Tensor, other: Tensor, center: PrototypeCenter
) -> Tensor:
    """Ours."""
    teacher_weights = PrototypeWeights(other)
    targets = centered_targets(teacher.flatten(0, 1), teacher_weights, center, TEACHER_TEMPERATURE)
    weights = PrototypeWeights(weight)
    return mean_of_other_views(view_cross_entropies(student, weights, targets, STUDENT_TEMPERATURE))


def plain(student: Tensor, teacher: Tensor, weight: Tensor, other: Tensor, center: PrototypeCenter) -> Tensor:
    """All logits at once, pair after pair."""
    logits = student @ F.normalize(weight, dim=1).T / STUDENT_TEMPERATURE
    with torch.no_grad():
        teacher_logits = teacher @ F.normalize(other, dim=1).T
        targets = ((teacher_logits - center.value) / TEACHER_TEMPERATURE).softmax(-1)
    total, num_pairs = logits.new_zeros(()), 0
    for own, target in enumerate(targets):
        for place, view in enumerate(logits):
            if place != own:
                total = total - (target * view.log_softmax(-1)).sum(-1).mean()
                num_pairs += 1
    return total / num_pairs


def seconds(run: Callable[[], object]) -> float:
    """CPU seconds, or seconds of the GPU."""
    if not torch.cuda.is_available():
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(num_prototypes: int, num_images: int, num_local_views: int, width: int, rounds: int) -> str:
    """One line of the table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    student = F.normalize(torch.randn(2 + num_local_views, num_images, width, device=device), dim=-1)
    teacher = F.normalize(torch.randn(2, num_images, width, device=device), dim=-1)
    weight, other = (torch.randn(num_prototypes, width, device=device) for _ in range(2))
    center = PrototypeCenter(num_prototypes).to(device)
    gradients: dict[str, list[Tensor]] = {}

    def runner(name: str, loss: Loss) -> Callable[[], None]:
        def run() -> None:
            rows, own = student.clone().requires_grad_(), weight.detach().requires_grad_()
            value = loss(rows, teacher, own, other, center)
            value.backward()  # type: ignore[no-untyped-call]
            assert rows.grad is not None and own.grad is not None
            gradients[name] = [value.detach(), rows.grad, own.grad]

        return run

    runs = {"chunked": runner("chunked", chunked), "plain": runner("plain", plain)}
    memory, times = {}, {name: [] for name in runs}
    for name, run in runs.items():
        run()
        held, gradients[name] = gradients[name], []
        memory[name] = peak_memory(run)
        gradients[name] = held
    difference = max(
        float((mine - other).abs().max() / other.abs().max())
        for mine, other in zip(gradients["chunked"], gradients["plain"], strict=True)
    )
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    medians = {name: statistics.median(values) for name, values in times.items()}
    rows = (2 + num_local_views) * num_images
    return (
        f"| {num_images} ({rows} + {2 * num_images}) | {medians['plain']:.3f} | {medians['chunked']:.3f} "
        f"| {medians['chunked'] / medians['plain']:.2f} | {memory['plain']:.0f} | {memory['chunked']:.0f} "
        f"| {memory['chunked'] / memory['plain']:.2f} | {difference:.0e} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--images", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--local-views", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "one CPU thread"
    print(f"{options.prototypes} prototypes, {options.local_views} local views, fp32, {where}\n")
    print(
        "| images (student + teacher rows) | plain s | chunked s | ratio | plain MiB | chunked MiB | ratio "
        "| largest relative difference |\n|---|---|---|---|---|---|---|---|"
    )
    for num_images in options.images:
        print(
            compare(options.prototypes, num_images, options.local_views, options.width, options.rounds),
            flush=True,
        )


if __name__ == "__main__":
    main()
