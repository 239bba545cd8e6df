"""The ring of negatives against the authors' queue over three steps, and what must survive a restart."""

import pytest
import torch
import torch.nn.functional as F

from hf_ssl.modeling.shared.queue import NegativeQueue
from tests.closeness import near, precision


@precision
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_three_steps_with_wrap_match_the_authors_queue(golden, dtype, tolerance, version):
    case = golden("moco")
    queue = NegativeQueue(8, 6).to(dtype)
    queue.keys.copy_(case[f"{version}_init_queue"].T)
    for step in range(3):
        after = case[f"{version}_step{step}.queue"]
        rows = (torch.arange(4) + 4 * step) % 8
        queue.enqueue(after.T[rows].to(dtype))  # the keys of this step stand where the authors put them
        near(queue.keys.T, after, tolerance)
        assert queue.position.tolist() == case[f"{version}_step{step}.ptr"].tolist()


def test_starts_at_row_zero_with_random_unit_vectors():
    queue = NegativeQueue(64, 8)
    near(queue.keys.norm(dim=1), torch.ones(64), 1e-5)
    assert queue.position.tolist() == [0] and queue.keys.std() > 0.2


def test_the_oldest_keys_are_overwritten_first():
    queue = NegativeQueue(6, 1)
    for step in range(4):
        queue.enqueue(torch.full((2, 1), float(step)))
    assert queue.keys.flatten().tolist() == [3, 3, 1, 1, 2, 2] and queue.position.item() == 2


def test_enqueued_keys_are_copies_without_graph():
    queue, keys = NegativeQueue(4, 2), torch.ones(2, 2, requires_grad=True)
    queue.enqueue(keys * 2)
    assert not queue.keys.requires_grad
    with torch.no_grad():
        keys.zero_()
    assert queue.keys[:2].eq(2).all()


def test_half_precision_keys_are_stored_in_float32():
    queue = NegativeQueue(4, 2)
    queue.enqueue(torch.ones(2, 2, dtype=torch.bfloat16))
    assert queue.keys.dtype == torch.float32


def test_keys_and_position_survive_saving():
    queue, other = NegativeQueue(8, 3), NegativeQueue(8, 3)
    queue.enqueue(F.normalize(torch.randn(4, 3)))
    other.load_state_dict(queue.state_dict())
    assert torch.equal(other.keys, queue.keys) and other.position.item() == 4


def test_a_queue_built_on_the_meta_device_is_filled_by_its_reset():
    with torch.device("meta"):
        queue = NegativeQueue(8, 3)
    queue = queue.to_empty(device="cpu")
    queue.keys.fill_(float("nan"))
    queue.initialize_parameters()
    near(queue.keys.norm(dim=1), torch.ones(8), 1e-5)
    assert queue.position.item() == 0


def test_reset_leaves_loaded_buffers_alone():
    queue = NegativeQueue(8, 3)
    loaded = queue.keys.clone()
    queue.keys._is_hf_initialized = True  # the flag transformers sets on what came from a checkpoint
    queue.initialize_parameters()
    assert torch.equal(queue.keys, loaded)


def test_a_length_that_is_no_multiple_of_the_keys_is_refused_with_one_that_is():
    with pytest.raises(ValueError, match="queue length 10 is not a multiple of the 4 keys of a step; use 8"):
        NegativeQueue(10, 2).enqueue(torch.zeros(4, 2))
