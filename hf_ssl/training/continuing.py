"""Going on with an encoder that was trained before: heads first, and a guard over what it knew.

Published encoders come without the heads they were trained with. Fresh heads send gradients of no meaning
into the backbone, so they learn alone first. Afterwards the kNN score of the online probe is watched: nobody
goes on with an encoder to make it worse.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ssl.modeling.shared.pretraining import SSLForPreTraining
from hf_ssl.modeling.shared.teacher import num_steps
from hf_ssl.training.arguments import SSLTrainingArguments
from hf_ssl.training.processes import on_first_process

logger = logging.getLogger(__name__)

SHARE_OF_RUN = 0.1
MOST_STEPS = 1000
DEFAULT_DROP = 0.02  # about what chance moves 2,000 images by
SCORE = "eval_knn"
START_FLOORS = ("start_knn", "random_init_knn")  # the probe's names of the encoder before step one


def head_warmup_steps(args: SSLTrainingArguments, model: SSLForPreTraining) -> int:
    """Steps in which the backbone stands still.

    Raises:
        ValueError: nothing but the backbone would learn, or the whole run would be warm-up.
    """
    wanted = args.head_warmup_steps
    if wanted is None:
        if not model.starts_with_fresh_heads:
            return 0
        return min(num_steps(SHARE_OF_RUN, args.max_steps), MOST_STEPS)
    steps = num_steps(wanted, args.max_steps)
    if steps and steps >= args.max_steps:
        raise ValueError(
            f"head_warmup_steps {wanted:g} is no less than max_steps {args.max_steps}: the encoder would "
            "never learn"
        )
    return steps


def build_guard(trainer: Any) -> "KnnGuard | None":
    """The guard that the arguments ask for; None: no guard.

    Raises:
        ValueError: one was asked for, and there is no probe whose score it could watch.
    """
    args, wanted = trainer.args, trainer.args.max_knn_drop
    if wanted is None:
        is_watched = trainer.probe is not None and args.eval_strategy != "no" and not args.fsdp
        wanted = DEFAULT_DROP if trainer.model.starts_with_fresh_heads and is_watched else 1.0
    elif wanted < 1 and trainer.probe is None:
        raise ValueError(
            "max_knn_drop needs a probe with labelled images; give probe_dataset, or leave it out"
        )
    if wanted >= 1:
        return None
    if args.fsdp:
        raise ValueError(
            "max_knn_drop cannot bring a sharded model back; leave out fsdp, or give max_knn_drop 1"
        )
    if args.eval_strategy == "no":
        raise ValueError("max_knn_drop watches evaluations; give eval_strategy steps, or max_knn_drop 1")
    return KnnGuard(trainer, wanted)


class KnnGuard(TrainerCallback):
    """Stops a run whose encoder has become worse than it began, and brings the best one back.

    Args:
        trainer: an `SSLTrainer` before its first step; the model as it is now is what may be brought back.
        max_drop: of the score, between 0 and 1.
    """

    def __init__(self, trainer: Any, max_drop: float) -> None:
        self.trainer = trainer
        self.max_drop = max_drop
        self.start_score: float | None = None
        self.fallen_to: float | None = None
        # A run that is resumed builds the same model again before it loads its checkpoint.
        self._start = {
            name: value.detach().cpu().clone() for name, value in trainer.model.state_dict().items()
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the score that the run began with: a floor of the probe, or measured now."""
        self.fallen_to = None
        floors = self.trainer.floors
        score = next((floors[name] for name in START_FLOORS if name in floors), None)
        if score is None:
            score = on_first_process(args, self._score_of_start)
        self.start_score = score

    def _score_of_start(self) -> float:
        model = self.trainer.model
        now = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self._start)
        score = float(self.trainer.probe(model)["knn"])
        model.load_state_dict(now)
        return score

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop where the score fell too far."""
        if self.start_score is None or self.fallen_to is not None:  # not training, or brought back already
            return
        score = kwargs["metrics"][SCORE]
        if score < self.start_score - self.max_drop:
            self.fallen_to = score
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Bring back the best checkpoint, or the start where none is as good."""
        if self.fallen_to is None or self.start_score is None:
            return
        best, score = state.best_model_checkpoint, state.best_metric
        if best and score is not None and score >= self.start_score and Path(best).is_dir():
            self.trainer._load_from_checkpoint(best)
            back_to = f"{Path(best).name} with {score:.1%}"
        else:
            with torch.no_grad():
                self.trainer.model.load_state_dict(self._start)
            back_to = "the encoder it started from"
        logger.warning(
            "stopped at step %d: the kNN score is %.1f%% and was %.1f%% at the start, more than max_knn_drop "
            "%.1f points below; rolled back to %s. Lower learning_rate (%g), raise head_warmup_steps (%d) or "
            "teacher_momentum, or allow more by max_knn_drop",
            state.global_step,
            100 * self.fallen_to,
            100 * self.start_score,
            100 * self.max_drop,
            back_to,
            args.learning_rate,
            self.trainer.head_warmup_steps,
        )
        self.trainer.evaluate()
