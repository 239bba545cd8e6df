"""Two processes train like one on the merged batch."""

import functools
import os
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.distributed import run_processes


def losses_of_training(method: str, batch_size: int, folder: str) -> tuple[list[float], dict[str, Any]]:
    """Loss of every step and the final weights, on the same images whatever the number of processes."""
    if "RANK" in os.environ:  # as torchrun does; without it accelerate sees one process
        os.environ["LOCAL_RANK"] = os.environ["RANK"]
    from hf_ssl.modeling import METHODS
    from hf_ssl.training.arguments import SSLTrainingArguments
    from hf_ssl.training.trainer import SSLTrainer
    from tests.modeling.tiny import BY_NAME
    from tests.training.conftest import FixedBatches, make_source

    row = BY_NAME[method]
    model = row.build()
    if os.environ.get("RANK", "0") != "0":  # all must start from the first one's weights, teacher and queue
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data.add_(1.0)
    args = SSLTrainingArguments(
        output_dir=folder,
        max_steps=3,
        per_device_train_batch_size=batch_size,
        global_batch_size=16,
        logging_steps=1,
        save_strategy="no",
        learning_rate=0.01,
        optimizer="sgd",
        learning_rate_schedule="constant",
        use_cpu=True,
    )
    trainer = SSLTrainer(
        model=model,
        args=args,
        train_dataset=make_source(64),
        processing_class=METHODS[row.method].processor_class.for_image_size(row.image_size),
    )
    assert args.gradient_accumulation_steps == 1 and args.world_size == 16 // batch_size
    rank, world_size = args.process_index, args.world_size
    batches = functools.partial(FixedBatches, row.image_size, row.num_views, batch_size, rank, world_size)
    trainer.get_train_dataloader = batches  # type: ignore
    trainer.train()
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], state


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mae", "moco-v2"])
def test_two_times_eight_images_are_sixteen(method: str, tmp_path: Any):
    """Mistake 56 among others: processes whose queues begin differently."""
    expected, expected_state = losses_of_training(method, 16, str(tmp_path / "one"))
    for losses, state in run_processes(losses_of_training, method, 8, str(tmp_path / "two")):
        assert losses == pytest.approx(expected, abs=1e-5)
        assert_close(state, expected_state, rtol=1e-4, atol=1e-5)
    assert len(set(expected)) == 3 and torch.isfinite(torch.tensor(expected)).all()
