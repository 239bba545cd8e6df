"""Self-distillation: a student learns a momentum teacher's choice among prototypes, view by view.

What the methods of this kind share: the two branches, the schedules of a step, targets of all micro-batches
of a step, and the moves of centre and teacher after it.
Shape suffixes: B = images of a micro-batch, P = images of the step in this process, G = global views,
L = local views, V = G + L, D = backbone width, d = bottleneck width, K = prototypes.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.centering import PrototypeCenter, centered_targets, mean_logits
from hf_ssl.modeling.shared.configuration import SSLDistillationConfig
from hf_ssl.modeling.shared.distributed import convert_batchnorm, world_size
from hf_ssl.modeling.shared.heads import PrototypeHead, Prototypes
from hf_ssl.modeling.shared.losses import koleo_loss
from hf_ssl.modeling.shared.pretraining import TEACHER_TENSORS, Branch, SSLForPreTraining
from hf_ssl.modeling.shared.prototypes import PrototypeTargets, PrototypeWeights
from hf_ssl.modeling.shared.teacher import cosine_momentum, linear_warmup, num_steps, update_teacher

NUM_GLOBAL_VIEWS = 2
CENTER_TENSORS = r"^(patch_)?center\.value$"


class SelfDistillation(SSLForPreTraining):
    """Base of the pre-training models; subclasses make the branches and centres and define `forward`."""

    base_model_prefix = "teacher"
    _keep_in_fp32_modules_strict = [TEACHER_TENSORS, CENTER_TENSORS]
    config: SSLDistillationConfig
    student: Branch
    teacher: Branch
    center: PrototypeCenter

    def __init__(self, config: SSLDistillationConfig) -> None:
        super().__init__(config)
        warms_up = config.teacher_temperature_warmup > 0
        self._teacher_temperature = float(
            config.teacher_temperature_start if warms_up else config.teacher_temperature
        )
        self._teacher_momentum = float(config.teacher_momentum)
        self._holds_prototypes = False
        self._step_seed = (0, 0)
        self._class_targets: StepTargets | None = None
        self._class_mean: Tensor | None = None

    @staticmethod
    def build_branch(config: SSLDistillationConfig) -> Branch:
        """Backbone and head; BatchNorm, if there is any, over all processes."""
        backbone = build_backbone(config.backbone_config)
        branch = Branch(backbone, build_head(config, backbone.hidden_size))
        convert_batchnorm(branch, "synchronized")
        return branch

    def finish_construction(self) -> None:
        """As for all methods; and put the teacher into its mode."""
        super().finish_construction()
        self.train(self.training)

    def train(self, mode: bool = True) -> "SelfDistillation":
        """The teacher stays in eval mode, so that no drop path blurs its targets; not so its BatchNorms.

        Those take the statistics of the batch, as in the authors' code: running ones lag behind weights
        that move.
        """
        super().train(mode)
        for module in self.teacher.modules():
            module.training = mode and isinstance(module, _BatchNorm)
        self._quiet_held_backbones()
        return self

    @property
    def target_branch(self) -> Branch:
        """The branch that makes the targets."""
        return self.teacher

    # The step

    def begin_step(self, step: int, total_steps: int, seed: int = 0) -> None:
        """Temperature and momentum of the step, and whether prototypes stand still."""
        config = self.config
        self._step_seed = (seed, step)
        self._teacher_temperature = linear_warmup(
            step,
            num_steps(config.teacher_temperature_warmup, total_steps),
            config.teacher_temperature_start,
            config.teacher_temperature,
        )
        self._teacher_momentum = cosine_momentum(
            step, total_steps, config.teacher_momentum, config.teacher_momentum_end
        )
        self._holds_prototypes = step < num_steps(config.freeze_prototypes, total_steps)
        self._class_targets = self._class_mean = None

    def held_parameters(self) -> Iterable[nn.Parameter]:
        """The student's prototypes at the start of a run; the MLP before them finds its place first."""
        for module in self.student.modules() if self._holds_prototypes else ():
            if isinstance(module, Prototypes):
                yield from module.parameters()

    def keep_class_targets(self, vectors_PGd: Tensor, micro_batch_size: int) -> None:
        """Targets of the step, and the mean logits that the centre will move by."""
        targets = self.targets_of(vectors_PGd)
        self._class_targets = StepTargets(targets, micro_batch_size)
        self._class_mean = mean_logits(targets.bottleneck.sum(dim=0), len(targets), targets.weights)

    def targets_of(self, vectors_PGd: Tensor) -> PrototypeTargets:
        """Targets of teacher vectors, in the order (P, G)."""
        weights = self.target_branch.head.prototypes.weights()  # type: ignore[union-attr, operator]
        return centered_targets(vectors_PGd.flatten(0, 1), weights, self.center, self._teacher_temperature)

    def end_step(self, updates: list[dict[str, Tensor]]) -> None:
        """Move the centre by the teacher that made the targets, then the teacher."""
        if self._class_mean is not None:
            self.center.update(self._class_mean, self.config.center_momentum)
        self._class_targets = self._class_mean = None
        update_teacher(self.teacher, self.student, self._teacher_momentum)

    # Parts of the loss

    def koleo(self, features_RD: Tensor, num_images: int) -> Tensor:
        """Sum over the global views of their spread; 0 where it has no weight."""
        if not self.config.koleo_weight:
            return features_RD.new_zeros(())
        views = features_RD[: NUM_GLOBAL_VIEWS * num_images].split(num_images)
        return torch.stack([koleo_loss(view, self.config.koleo_group_size) for view in views]).sum()

    def check_global_batch(self, global_batch_size: int) -> None:
        """Refuse a batch that has no whole groups for KoLeo; a micro-batch must have them too."""
        size = self.config.koleo_group_size
        if self.config.koleo_weight and size and global_batch_size % size:
            raise ValueError(
                f"koleo_group_size {size} does not divide the global batch {global_batch_size}; give one "
                "that divides the images of every micro-batch"
            )

    def expectations(self, num_images: int = 256) -> dict[str, float]:
        """Numbers in nats; where a random network's images still look alike, the loss starts lower.

        `most_information` is what targets can say at most about the teacher's views of `num_images`.
        """
        config = self.config
        log_k, width = math.log(config.num_prototypes), config.head_bottleneck_size
        spread = 1 / (2 * width * config.student_temperature**2)
        sharpness = 1 / (2 * width * config.teacher_temperature_start**2)
        return {
            "loss_at_start": log_k + spread,
            "loss_of_uniform": log_k,
            "target_entropy_at_start": max(log_k - sharpness, 0.0),
            "uniform_entropy": log_k,
            "most_information": min(log_k, math.log(NUM_GLOBAL_VIEWS * num_images)),
        }


class StepTargets:
    """Targets of all global views of a step in this process.

    Args:
        targets: in the order (P, G), micro-batch after micro-batch.
        micro_batch_size: B.
    """

    def __init__(self, targets: PrototypeTargets, micro_batch_size: int) -> None:
        self.targets = targets
        self.micro_batch_size = micro_batch_size

    def first_rows(self, pixel_values: Tensor) -> Tensor:
        """Rows of the global batch that a first micro-batch of this process alone would have."""
        return torch.arange(len(pixel_values), device=pixel_values.device)

    def positions(self, row_index: Tensor) -> Tensor:
        """Place among this process's P images of rows (j * W + r) * B + i of the global batch."""
        rows_of_all = self.micro_batch_size * world_size()
        return row_index // rows_of_all * self.micro_batch_size + row_index % self.micro_batch_size

    def of_rows(self, row_index: Tensor, weights: PrototypeWeights) -> PrototypeTargets:
        """Targets of rows of the global batch, view after view, with the teacher's `weights` as they are."""
        views = torch.arange(NUM_GLOBAL_VIEWS, device=row_index.device)[:, None]
        return self.targets.rows(self.positions(row_index) * NUM_GLOBAL_VIEWS + views, weights)


def view_by_view(network: Callable[[Tensor], Tensor], rows: Tensor, num_views: int) -> Tensor:
    """Results for rows that are blocked by view, each view in a pass of its own."""
    return torch.cat([network(part) for part in rows.chunk(num_views)])


def build_head(config: SSLDistillationConfig, input_size: int) -> PrototypeHead:
    """The head that `config` describes."""
    return PrototypeHead(
        input_size,
        config.head_hidden_size,
        config.head_bottleneck_size,
        config.num_prototypes,
        config.num_head_layers,
        hidden_norm=config.normalize_head,
        train_scale=config.train_prototype_scale,
    )
