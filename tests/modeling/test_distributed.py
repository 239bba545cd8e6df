"""Two processes must give what one process gives on the merged batch, in loss, gradient and statistics."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ssl.modeling.shared.distributed import (
    SplitBatchNorm,
    SynchronizedBatchNorm,
    all_gather,
    all_gather_with_gradient,
    broadcast,
    convert_batchnorm,
    rank,
    shuffle_rows,
    unshuffle_rows,
    world_size,
)
from hf_ssl.modeling.shared.heads import MLPHead
from hf_ssl.modeling.shared.losses import nt_xent_loss
from tests.closeness import near
from tests.distributed import run_processes


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


NORM_INPUT = {"1d": normal(6, 3), "2d": normal(6, 3, 4, 5) * 3 + 100}


def norm_case(make: type[nn.Module]) -> nn.Module:
    norm = make(3).double()
    with torch.no_grad():
        norm.weight.copy_(normal(3, seed=5))
        norm.bias.copy_(normal(3, seed=6))
    return norm


def norm_loss(output: Tensor, rows: slice, shape: str) -> Tensor:
    weights = normal(*NORM_INPUT[shape].shape, seed=7)[rows]  # another weight for every output value
    return (output.square() * weights + output * weights.sin()).sum()


def merged_norm(shape: str, steps: int = 2) -> dict[str, Tensor]:
    norm = norm_case(nn.BatchNorm1d if shape == "1d" else nn.BatchNorm2d)
    x = NORM_INPUT[shape].clone().requires_grad_()
    for _ in range(steps):
        output = norm(x)
    norm_loss(output, slice(None), shape).backward()
    return norm_result(norm, x, output)


def norm_result(norm: nn.Module, x: Tensor, output: Tensor) -> dict[str, Tensor]:
    result = {"output": output, "input_gradient": x.grad, "weight_gradient": norm.weight.grad}
    return {
        k: v.detach() for k, v in (result | {"bias_gradient": norm.bias.grad} | norm.state_dict()).items()
    }


def synchronized_norm(shape: str, steps: int = 2, first_rows: int = 3) -> dict[str, Tensor]:
    norm = convert_batchnorm(norm_case(nn.BatchNorm1d if shape == "1d" else nn.BatchNorm2d))
    rows = slice(0, first_rows) if rank() == 0 else slice(first_rows, None)
    x = NORM_INPUT[shape][rows].clone().requires_grad_()
    for _ in range(steps):
        output = norm(x)
    norm_loss(output, rows, shape).backward()
    return norm_result(norm, x, output)


def train_step(case: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    """Loss, gradients and statistics of a head on two views; data-parallel where there is a group."""
    torch.manual_seed(0)
    head = MLPHead(8, 7, 6, 2, hidden_norm=True, last_norm="scale", bias=False).double()
    head = convert_batchnorm(head)
    model = nn.parallel.DistributedDataParallel(head) if world_size() > 1 else head
    views = torch.cat([case["dist_x_a"][rows], case["dist_x_b"][rows]])
    loss = nt_xent_loss(*model(views).chunk(2), 0.3)
    loss.backward()
    gradients = {f"gradient of {name}": parameter.grad for name, parameter in head.named_parameters()}
    return gradients | dict(head.named_buffers()) | {"loss": loss.detach()}


def on_every_rank(case: dict[str, Tensor]) -> dict[str, object]:
    """Everything that needs two processes, in one start of them; returns what the tests look at."""
    result: dict[str, object] = {"place": (rank(), world_size())}
    rows = slice(3 * rank(), 3 * rank() + 3)

    weight = case["dist_W"].clone().requires_grad_()
    views = (case["dist_x_a"][rows] @ weight, case["dist_x_b"][rows] @ weight)
    loss = nt_xent_loss(*views, case["temperature"].item())
    loss.backward()
    result |= {"loss": loss.detach(), "gradient": weight.grad}

    own = torch.tensor([[1.0 + rank(), 2.0]], requires_grad=True)
    plain = all_gather(own)
    result["gathered"], result["gathered_has_graph"] = plain, plain.requires_grad
    (
        all_gather_with_gradient(own) * torch.tensor([[1.0, 10.0], [100.0, 1000.0]]) * (1 + rank())
    ).sum().backward()
    result["gathered_gradient"] = own.grad

    torch.manual_seed(rank())  # every process would draw another permutation
    permutation = broadcast(torch.randperm(8))
    result["permutation"] = permutation
    own_rows = torch.arange(8)[4 * rank() : 4 * rank() + 4, None] * torch.ones(1, 2)
    shuffled = shuffle_rows(own_rows, permutation)
    result["shuffled"], result["unshuffled"] = shuffled, unshuffle_rows(shuffled, permutation)

    result["train_step"] = train_step(case, rows)
    norms = {f"norm{shape}": synchronized_norm(shape) for shape in ("1d", "2d")}
    norms["uneven"] = synchronized_norm("1d", first_rows=2)
    norms["none here"] = synchronized_norm("1d", first_rows=0)
    return result | norms | shuffle_norm(case)


def shuffle_norm(case: dict[str, Tensor]) -> dict[str, Tensor]:
    norm = nn.BatchNorm1d(3, affine=False).double()
    own = case["shuffle_x"][4 * rank() : 4 * rank() + 4]
    index = case["shuffle_idx"]
    weight_layout = broadcast(torch.full((2, 3, 4, 4), float(rank())).to(memory_format=torch.channels_last))
    return {
        "plain_norm": norm(own),
        "shuffled_norm": unshuffle_rows(norm(shuffle_rows(own, index)), index),
        "broadcast_layout": weight_layout,
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, object]]:
    from pathlib import Path

    from safetensors.torch import load_file

    folder = Path(__file__).resolve().parent.parent / "golden"
    moco = load_file(folder / "moco.safetensors")
    shuffle = {name: moco[name] for name in ("shuffle_x", "shuffle_idx")}
    return run_processes(on_every_rank, load_file(folder / "simclr.safetensors") | shuffle)


def test_each_process_knows_its_place(ranks):
    assert [result["place"] for result in ranks] == [(0, 2), (1, 2)]


def test_gathered_rows_are_in_rank_order_and_carry_no_gradient(ranks):
    for result in ranks:
        assert result["gathered"].tolist() == [[1.0, 2.0], [2.0, 2.0]] and not result["gathered_has_graph"]


def test_gradient_of_gathered_rows_is_the_sum_over_processes(ranks):
    # d/d(own row): weights of that row times (1 + 2), the factors of the two processes' losses
    assert ranks[0]["gathered_gradient"].tolist() == [[3.0, 30.0]]
    assert ranks[1]["gathered_gradient"].tolist() == [[300.0, 3000.0]]


def test_two_view_loss_of_two_processes_matches_the_authors_values(ranks, golden):
    case = golden("simclr")
    losses = torch.stack([result["loss"] for result in ranks])
    near(losses, case["dist_local_losses"])
    near(losses.mean(), case["dist_merged_loss"])


def test_mean_gradient_of_two_processes_equals_the_merged_batch(ranks, golden):
    case = golden("simclr")
    gradient = torch.stack([result["gradient"] for result in ranks]).mean(dim=0)
    near(gradient, case["dist_merged_grad_W"])
    weight = case["dist_W"].clone().requires_grad_()
    nt_xent_loss(case["dist_x_a"] @ weight, case["dist_x_b"] @ weight, case["temperature"].item()).backward()
    near(gradient, weight.grad)


def test_gradient_is_not_that_of_a_gather_without_gradient(ranks, golden):
    gradient = torch.stack([result["gradient"] for result in ranks]).mean(dim=0)
    assert (gradient - golden("simclr")["dist_wrong_grad_W_detached_gather"]).abs().max() > 1e-3


@pytest.mark.parametrize("case", ["uneven", "none here"])
def test_synchronized_norm_counts_the_rows_that_every_process_has(ranks, case):
    """Hidden patches are not as many on all processes, and may be none on one."""
    merged, parts = merged_norm("1d"), [result[case] for result in ranks]
    near(torch.cat([part["output"] for part in parts]), merged["output"])
    near(torch.cat([part["input_gradient"] for part in parts]), merged["input_gradient"])
    for part in parts:
        near(part["running_var"], merged["running_var"])


@pytest.mark.parametrize("shape", ["1d", "2d"])
def test_synchronized_norm_equals_one_process_on_the_merged_batch(ranks, shape):
    merged, parts = merged_norm(shape), [result[f"norm{shape}"] for result in ranks]
    for name in ("output", "input_gradient"):
        near(torch.cat([part[name] for part in parts]), merged[name])
    for name in ("weight_gradient", "bias_gradient"):  # losses are sums here, so gradients add up
        near(parts[0][name] + parts[1][name], merged[name])
    for part in parts:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            near(part[name], merged[name])


def test_data_parallel_step_with_synchronized_norms_equals_the_merged_batch(ranks, golden):
    merged, parts = train_step(golden("simclr"), slice(None)), [result["train_step"] for result in ranks]
    near((parts[0].pop("loss") + parts[1].pop("loss")) / 2, merged.pop("loss"))
    for part in parts:
        assert part.keys() == merged.keys()
        for name, expected in merged.items():
            near(part[name], expected)


def test_broadcast_gives_every_process_the_permutation_of_the_first(ranks):
    torch.manual_seed(0)
    expected = torch.randperm(8)
    assert all(torch.equal(result["permutation"], expected) for result in ranks)


def test_broadcast_keeps_the_memory_layout(ranks):
    for result in ranks:
        assert result["broadcast_layout"].eq(0).all()
        assert result["broadcast_layout"].is_contiguous(memory_format=torch.channels_last)


def test_shuffled_rows_are_dealt_by_the_permutation_and_come_back(ranks):
    shuffled = torch.cat([result["shuffled"] for result in ranks])[:, 0]
    assert torch.equal(shuffled.long(), ranks[0]["permutation"])
    assert torch.cat([result["unshuffled"] for result in ranks])[:, 0].tolist() == list(range(8))


def test_shuffled_norm_matches_the_authors_values(ranks, golden):
    case = golden("moco")
    near(torch.cat([result["plain_norm"] for result in ranks]), case["plainbn_two_ranks_out"])
    near(torch.cat([result["shuffled_norm"] for result in ranks]), case["shufflebn_two_ranks_out"])
    assert torch.equal(case["shuffle_idx"].argsort(), case["unshuffle_idx"])


# One process


def test_without_a_group_everything_is_the_identity():
    x = torch.randn(4, 2, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert all_gather_with_gradient(x) is x and torch.equal(all_gather(x), x) and broadcast(x) is x
    assert not all_gather(x).requires_grad


def test_a_permutation_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="permutation has 3 entries.*4 rows x 1 processes = 4"):
        shuffle_rows(torch.zeros(4, 2), torch.arange(3))


def test_split_norm_matches_the_authors_values(golden):
    case = golden("moco")
    splits = int(case["splitbn_splits"])
    norm = convert_batchnorm(nn.BatchNorm1d(3, affine=False).double(), "split", splits)
    near(norm(case["shuffle_x"]), case["splitbn_out"])


def test_split_norm_has_statistics_per_group_and_their_mean_as_running_statistics():
    x = normal(6, 3, 2, 2)
    norm = convert_batchnorm(norm_case(nn.BatchNorm2d), "split", 2)
    output = norm(x)
    groups = [norm_case(nn.BatchNorm2d), norm_case(nn.BatchNorm2d)]
    for index, group in enumerate(groups):
        near(output[index::2].detach(), group(x[index::2]).detach())
    near(norm.running_mean, (groups[0].running_mean + groups[1].running_mean) / 2)
    near(norm.running_var, (groups[0].running_var + groups[1].running_var) / 2)
    assert norm.num_batches_tracked == 1


def test_plain_norm_in_one_process_does_not_notice_a_permutation_but_split_norm_does():
    x, order = normal(8, 3), torch.tensor([3, 0, 6, 2, 7, 1, 5, 4])
    plain = nn.BatchNorm1d(3).double()
    near(plain(x[order])[order.argsort()].detach(), plain(x).detach())
    split = convert_batchnorm(copy.deepcopy(plain), "split", 4)
    assert (split(x[order])[order.argsort()] - split(x)).abs().max() > 0.1


def test_split_norm_refuses_a_batch_it_cannot_split():
    with pytest.raises(ValueError, match="batch of 6 rows is not a multiple of 4"):
        convert_batchnorm(nn.BatchNorm1d(3), "split", 4)(torch.randn(6, 3))


@pytest.mark.parametrize(
    ("kind", "expected"), [("synchronized", SynchronizedBatchNorm), ("split", SplitBatchNorm)]
)
def test_conversion_keeps_names_tensors_settings_and_evaluation_output(kind, expected):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2), nn.ReLU()).eval()
    network[1].running_mean.normal_()
    x, before = torch.randn(2, 3, 5, 5), dict(network.named_parameters())
    output = network(x)
    assert convert_batchnorm(network, kind, 2) is network
    assert type(network[1]) is expected and isinstance(network[1], nn.BatchNorm2d)
    assert (network[1].eps, network[1].momentum, network[1].training) == (1e-3, 0.2, False)
    assert all(parameter is before[name] for name, parameter in network.named_parameters())
    assert torch.equal(network(x), output)


def test_synchronized_norm_has_all_that_the_layer_it_is_on_gpus_asks_for():
    plain = norm_case(nn.BatchNorm2d)
    norm = convert_batchnorm(copy.deepcopy(plain))
    near(nn.SyncBatchNorm.forward(norm, NORM_INPUT["2d"]).detach(), plain(NORM_INPUT["2d"]).detach())
    near(norm.running_var, plain.running_var)


@pytest.mark.parametrize("kind", ["synchronized", "split"])
def test_conversion_keeps_a_norm_without_shift(kind):
    norm = nn.BatchNorm1d(4)
    norm.bias = None
    norm = convert_batchnorm(norm, kind, 2)
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    assert norm(torch.randn(4, 4)).shape == (4, 4)


@pytest.mark.parametrize("kind", ["synchronized", "split"])
def test_a_norm_that_carries_its_activation_keeps_it(kind):
    from timm.layers import BatchNormAct2d

    norm = BatchNormAct2d(3)
    x = torch.randn(4, 3, 2, 2)
    expected = norm.eval()(x)
    assert torch.equal(convert_batchnorm(norm, kind, 2)(x), expected) and expected.min() == 0


@pytest.mark.parametrize("splits", [1, 2])
def test_a_running_mean_without_momentum_is_the_mean_of_all_batches(splits):
    norm, batches = nn.BatchNorm1d(3, momentum=None), torch.randn(3, 4, 3)
    converted = convert_batchnorm(norm, "split", splits)
    for batch in batches:
        converted(batch)
    near(converted.running_mean, batches.mean(dim=(0, 1)), 1e-6)


def test_half_precision_input_of_a_split_norm_keeps_its_type():
    norm = convert_batchnorm(nn.BatchNorm2d(3), "split", 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(F.relu(torch.randn(4, 3, 2, 2).bfloat16())).dtype == torch.bfloat16


def test_unknown_norm_kind_and_impossible_splits_are_refused():
    with pytest.raises(ValueError, match="unknown BatchNorm kind 'syncronized'; did you mean 'synchronized'"):
        convert_batchnorm(nn.Identity(), "syncronized")
    with pytest.raises(ValueError, match="num_splits must be at least 1, got 0"):
        convert_batchnorm(nn.Identity(), "split", 0)


def test_a_norm_without_running_statistics_is_refused():
    with pytest.raises(ValueError, match="without running statistics"):
        convert_batchnorm(nn.BatchNorm1d(3, track_running_stats=False))
