"""MoCo v1 and v2: a query finds its key, made by a slow copy of the network, among a queue of older keys.

Source: He et al. 2020 (arXiv 1911.05722), Eq. 1-2 and Algorithm 1; Chen et al. 2020 (2003.04297) adds the MLP
head. Compared with the authors' `moco/builder.py`, which stores the queue transposed, (D, K), and enqueues
inside `forward`; ours enqueues in `end_step`, after backward, in the order of the global batch.
Shape suffixes: B = images in this process, N = images of all processes, d = projection width, K = queue
length.
"""

import torch
from torch import Tensor, nn

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.distributed import (
    all_gather,
    broadcast,
    convert_batchnorm,
    shuffle_rows,
    unshuffle_rows,
    world_size,
)
from hf_ssl.modeling.shared.heads import MLPHead
from hf_ssl.modeling.shared.losses import normalize, queue_contrastive_loss
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.pretraining import (
    TEACHER_TENSORS,
    Branch,
    SSLForPreTraining,
    SSLModel,
    generator_of_step,
    split_views,
    std_of_normalized,
)
from hf_ssl.modeling.shared.queue import NegativeQueue
from hf_ssl.modeling.shared.teacher import update_teacher

from .configuration_moco import MoCoConfig


class MoCoModel(SSLModel):
    """The encoder: the student (query) backbone."""

    config_class = MoCoConfig


class MoCoForPreTraining(SSLForPreTraining):
    """Student, teacher, queue and the contrastive loss."""

    config_class = MoCoConfig
    _keep_in_fp32_modules_strict = [TEACHER_TENSORS, r"^queue\.keys$"]

    def __init__(self, config: MoCoConfig) -> None:
        super().__init__(config)
        self.student = self._build_branch(config)
        self.teacher = self._build_branch(config)
        self.queue = NegativeQueue(config.queue_length, config.projection_size)
        self._shuffle_seed = (0, 0)
        self.finish_construction()

    @staticmethod
    def _build_branch(config: MoCoConfig) -> nn.Module:
        backbone = build_backbone(config.backbone_config)
        head = MLPHead(
            backbone.hidden_size,
            backbone.hidden_size,
            config.projection_size,
            num_layers=1 if config.projection_head == "linear" else 2,
            hidden_norm=config.normalize_projection,
            last_norm="none",
            bias=True,
        )
        branch = Branch(backbone, head)
        if config.batch_norm_splits == 1:
            return branch
        return convert_batchnorm(branch, "split", num_splits=config.batch_norm_splits)

    def begin_step(self, step: int, total_steps: int, seed: int = 0) -> None:
        """Move the teacher before it makes keys; at step 0 it still equals the student."""
        update_teacher(self.teacher, self.student, self.config.teacher_momentum)
        self._shuffle_seed = (seed, step)

    def forward(self, pixel_values: Tensor, row_index: Tensor | None = None) -> SSLOutput:
        """Contrast queries with their keys and the queue.

        Args:
            pixel_values: (B, 2, C, H, W), normalised; view 0 makes queries, view 1 keys.
            row_index: (B,) rows of the global batch; unused.

        Returns:
            `loss` in nats, ln(K + 1) for indistinguishable keys; `updates["keys"]` (B, d) for the queue.
        """
        query_view, key_view = split_views(pixel_values, num_views=2)
        features_BD, projections_Bd = self.student(query_view)
        query_Bd = normalize(projections_Bd)
        key_Bd = self.make_keys(key_view)
        loss = queue_contrastive_loss(query_Bd, key_Bd, self.queue.keys, self.config.temperature)
        with torch.no_grad():
            parts = {
                "projection_std": std_of_normalized(projections_Bd),
                "positive_similarity": (query_Bd * key_Bd).sum(dim=1).mean(),
                "negative_similarity": query_Bd.mean(dim=0) @ self.queue.keys.mean(dim=0).to(query_Bd.dtype),
            }
        return SSLOutput(
            loss=loss,
            parts=parts,
            features=features_BD.detach(),
            projections=projections_Bd.detach(),
            updates={"keys": key_Bd},
        )

    @torch.no_grad()
    def make_keys(self, key_view: Tensor) -> Tensor:
        """Unit keys (B, d) of the teacher, with images shuffled over devices or groups (ShuffleBN).

        The shuffle (paper, section 3.3) keeps a query and its key from sharing BatchNorm statistics, which
        would give the pair away.
        """
        if world_size() == 1 and self.config.batch_norm_splits == 1:
            return normalize(self.teacher(key_view)[1])
        # Drawn from (seed, step), so that a repeated forward deals the same groups; broadcast, because
        # processes that disagreed would match keys to foreign queries.
        generator = generator_of_step(*self._shuffle_seed)
        permutation_N = torch.randperm(len(key_view) * world_size(), generator=generator)
        permutation_N = broadcast(permutation_N.to(key_view.device))
        keys_Bd = normalize(self.teacher(shuffle_rows(key_view, permutation_N))[1])
        return unshuffle_rows(keys_Bd, permutation_N)

    def end_step(self, updates: list[dict[str, Tensor]]) -> None:
        """Enqueue the keys of the whole step, in the order of the global batch."""
        self.queue.enqueue(torch.cat([all_gather(update["keys"]) for update in updates]))

    def check_global_batch(self, global_batch_size: int) -> None:
        """Refuse a queue that the batch does not divide."""
        if self.config.queue_length % global_batch_size:
            fitting = max(self.config.queue_length // global_batch_size, 1) * global_batch_size
            raise ValueError(
                f"queue_length {self.config.queue_length} is not a multiple of the global batch "
                f"{global_batch_size}; use queue_length {fitting}"
            )

    def expectations(self, num_images: int = 256) -> dict[str, float]:
        """Loss when keys cannot be told apart; a run starts below it and climbs while the queue fills."""
        return {"loss_of_chance": float(torch.log(torch.tensor(self.config.queue_length + 1.0)))}
