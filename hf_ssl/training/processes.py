"""What the processes of one run must agree on."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from hf_ssl.training.checkpoints import CheckpointError

Found = TypeVar("Found")


def on_first_process(args: TrainingArguments, find: Callable[[], Found]) -> Found:
    """What the first process finds, in all of them; where it refuses, all raise its error.

    Args:
        args: of the run.
        find: called in the first process only; its result must be picklable.
    """
    outcome: list[Any] = [None, None]
    if args.process_index == 0:
        try:
            outcome[0] = find()
        except (ValueError, CheckpointError) as error:
            outcome[1] = error
    if args.world_size > 1:
        torch.distributed.broadcast_object_list(outcome, device=args.device)
    if outcome[1] is not None:
        raise outcome[1]
    found: Found = outcome[0]
    return found
