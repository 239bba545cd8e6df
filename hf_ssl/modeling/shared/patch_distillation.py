"""Self-distillation of hidden patches beside that of views.

The student sees global views with patches replaced by a mask token and predicts the teacher's choice among
prototypes for each of them, from the teacher's own, whole, view of the same crop (Zhou et al. 2021, arXiv
2111.07832; Oquab et al. 2023, arXiv 2304.07193).
Only hidden patches meet the prototypes. Targets of all micro-batches of a step are made together.
Shape suffixes: B = images of a micro-batch, P = images of the step in this process, G = global views,
V = views, N = patches, M = hidden patches in the order (image, view, patch), D = backbone width,
d = bottleneck width, K = prototypes.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from hf_ssl.modeling.shared.centering import PrototypeCenter, centered_targets, mean_logits
from hf_ssl.modeling.shared.configuration import SSLDistillationConfig
from hf_ssl.modeling.shared.distillation import (
    NUM_GLOBAL_VIEWS,
    SelfDistillation,
    StepTargets,
    view_by_view,
)
from hf_ssl.modeling.shared.distributed import rank, world_size
from hf_ssl.modeling.shared.heads import PrototypeHead, Prototypes
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.pretraining import Branch, join_views, std_of_normalized
from hf_ssl.modeling.shared.prototypes import (
    PrototypeTargets,
    PrototypeWeights,
    mean_of_other_views,
    row_cross_entropies,
    view_cross_entropies,
)

PATCHES_OF_STATISTICS = 512  # at K = 8,192 all would cost a third of the loss


class PatchBranch(Branch):
    """Backbone and head, and what patches have of their own: prototypes, a head, or nothing.

    Args:
        backbone: a ViT.
        head: of class tokens, and of patches without a head of their own.
        patch_head: of patches.
        patch_prototypes: of patches that share the MLP of `head`.
        separate_batch_norm: views one by one, and patches, pass `head` by themselves.
    """

    head: PrototypeHead

    def __init__(
        self,
        backbone: nn.Module,
        head: PrototypeHead,
        patch_head: PrototypeHead | None = None,
        patch_prototypes: Prototypes | None = None,
        separate_batch_norm: bool = False,
    ) -> None:
        super().__init__(backbone, head)
        self.separate_batch_norm = separate_batch_norm
        self.patch_head = patch_head
        self.patch_prototypes = patch_prototypes

    def vectors(self, classes_RD: Tensor, patches_MD: Tensor, num_views: int) -> tuple[Tensor, Tensor]:
        """Unit vectors of class tokens (R, d), blocked by view, and of patches (M, d)."""
        if self.patch_head is not None:
            return self.head(classes_RD), self.patch_head(patches_MD)
        # A single process may have hidden no patch, or one, and has no other's to make a batch of.
        if self.separate_batch_norm and (len(patches_MD) > 1 or world_size() > 1):
            return view_by_view(self.head, classes_RD, num_views), self.head(patches_MD)
        vectors = self.head(torch.cat([classes_RD, patches_MD]))
        return vectors[: len(classes_RD)], vectors[len(classes_RD) :]

    def patch_weights(self) -> PrototypeWeights:
        """Prototypes of patches."""
        head = self.head if self.patch_head is None else self.patch_head
        return (self.patch_prototypes or head.prototypes).weights()

    def patch_tokens(self, tokens: Tensor) -> Tensor:
        """Patches (B, G, N, D) of the tokens (G * B, T, D) of joined views."""
        num_prefix_tokens = int(self.backbone.config.num_prefix_tokens)  # type: ignore[union-attr, arg-type]
        patches = tokens[:, num_prefix_tokens:]
        return patches.unflatten(0, (NUM_GLOBAL_VIEWS, -1)).transpose(0, 1)


@dataclass(frozen=True)
class TeachersLook:
    """What the teacher makes of a micro-batch: bottleneck vectors, and which patches it was asked for.

    Attributes:
        classes: (B, G, d).
        is_masked: (B, G, N) bool, True = hidden from the student.
        patches: (M, d) of the hidden patches.
        centered: sum (d,) of the patch vectors that the centre covers, and how many they are.
    """

    classes: Tensor
    is_masked: Tensor
    patches: Tensor
    centered: tuple[Tensor, int]


class StepPatches:
    """Masks and targets of the patches of a step in this process.

    Args:
        targets: of the hidden patches, in the order (P, G, N).
        is_masked_PGN: which patches these are.
    """

    def __init__(self, targets: PrototypeTargets, is_masked_PGN: Tensor) -> None:
        self.targets = targets
        self.is_masked = is_masked_PGN
        self._number = (is_masked_PGN.flatten().cumsum(0) - 1).view(is_masked_PGN.shape)

    def of_images(self, position_B: Tensor, weights: PrototypeWeights) -> tuple[Tensor, PrototypeTargets]:
        """Masks (B, G, N) and targets (M,) of the images at these places; `weights` are the teacher's."""
        is_masked_BGN = self.is_masked[position_B]
        return is_masked_BGN, self.targets.rows(self._number[position_B][is_masked_BGN], weights)


def mean_over_masked_views(values_M: Tensor, is_masked_BGN: Tensor) -> Tensor:
    """Mean over all views of each view's mean over its hidden patches; views without any count as 0."""
    count_BG1 = is_masked_BGN.sum(dim=2, keepdim=True).clamp_min(1).to(values_M.dtype)
    weight_M = (1 / count_BG1).expand(is_masked_BGN.shape)[is_masked_BGN]
    return (values_M * weight_M).sum() / (is_masked_BGN.shape[0] * is_masked_BGN.shape[1])


def patch_statistics(targets: PrototypeTargets, losses_M: Tensor) -> dict[str, Tensor]:
    """Statistics of evenly spaced targets of hidden patches; none where no patch is hidden."""
    if not len(targets):
        return {}
    step = max(len(targets) // PATCHES_OF_STATISTICS, 1)
    index = torch.arange(0, len(targets), step, device=losses_M.device)[:PATCHES_OF_STATISTICS]
    statistics = targets.rows(index).statistics()
    statistics["divergence"] = losses_M.detach()[index].mean() - statistics["target_entropy"]
    return {f"patch_{name}": value for name, value in statistics.items()}


class PatchSelfDistillation(SelfDistillation):
    """Base of the pre-training models; subclasses build the branches and draw the masks."""

    student: PatchBranch
    teacher: PatchBranch
    patch_center: PrototypeCenter
    hides_patches = True  # from the student
    # Whether the centre of patches is that of all of them or of the hidden ones.
    centers_all_patches: ClassVar[bool]

    def __init__(self, config: SSLDistillationConfig) -> None:
        super().__init__(config)
        self._patch_temperature = self._teacher_temperature
        self._step_patches: StepPatches | None = None
        self._patch_mean: Tensor | None = None

    @property
    def target_branch(self) -> PatchBranch:
        """The branch that makes the targets."""
        return self.teacher

    def draw_masks(
        self, row_index: Tensor, num_rows: int, grid: tuple[int, int], seed: tuple[int, int]
    ) -> Tensor:
        """Masks (B, G, N) bool of rows of a step, True = hidden.

        Args:
            row_index: (B,) rows of the global batch.
            num_rows: of the step on all processes.
            grid: (rows, columns) of patches.
            seed: the run's seed and the step.
        """
        raise TypeError(f"{type(self).__name__} must define draw_masks")

    def make_targets(
        self, vectors_Id: Tensor, weights: PrototypeWeights, center: PrototypeCenter, temperature: float
    ) -> PrototypeTargets:
        """Targets of teacher vectors of the whole step in this process."""
        return centered_targets(vectors_Id, weights, center, temperature)

    def targets_of(self, vectors_PGd: Tensor) -> PrototypeTargets:
        """Targets of class tokens, in the order (P, G)."""
        weights = self.target_branch.head.prototypes.weights()
        return self.make_targets(vectors_PGd.flatten(0, 1), weights, self.center, self._teacher_temperature)

    # The step

    def begin_step(self, step: int, total_steps: int, seed: int = 0) -> None:
        """As for all of the kind; the temperature of patches is that of views."""
        super().begin_step(step, total_steps, seed)
        self._patch_temperature = self._teacher_temperature
        self._step_patches = self._patch_mean = None

    def prepare_step(self, batches: list[dict[str, Tensor]]) -> None:
        """Draw all masks and let the teacher see all micro-batches."""
        looks: list[TeachersLook] = []
        for index, batch in enumerate(batches):
            pixel_values = batch["pixel_values"]
            size = len(pixel_values)
            first_row = (index * world_size() + rank()) * size
            masks = self.draw_masks(
                torch.arange(first_row, first_row + size),
                size * len(batches) * world_size(),
                self._grid(pixel_values),
                self._step_seed,
            )
            looks.append(self.look(pixel_values, masks.to(pixel_values.device)))
        self.keep_class_targets(torch.cat([look.classes for look in looks]), len(looks[0].classes))
        self._step_patches = self._patches_of(looks)
        total_d = torch.stack([look.centered[0] for look in looks]).sum(dim=0)
        count = sum(look.centered[1] for look in looks)
        self._patch_mean = mean_logits(total_d, count, self.target_branch.patch_weights())

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        patch_size = int(self.target_branch.backbone.config.patch_size)  # type: ignore[union-attr, arg-type]
        return pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size

    @torch.no_grad()
    def look(self, pixel_values: Tensor, is_masked_BGN: Tensor) -> TeachersLook:
        """The teacher's vectors of a micro-batch (B, G, C, H, W), of the patches that are to be hidden."""
        outputs = self.target_branch.backbone(join_views(pixel_values, NUM_GLOBAL_VIEWS))
        patches_BGND = self.target_branch.patch_tokens(outputs.last_hidden_state)
        wanted = torch.ones_like(is_masked_BGN) if self.centers_all_patches else is_masked_BGN
        classes_Rd, wanted_Md = self.target_branch.vectors(
            outputs.pooler_output, patches_BGND[wanted], NUM_GLOBAL_VIEWS
        )
        hidden_Md = wanted_Md[is_masked_BGN[wanted]]
        return TeachersLook(
            classes=classes_Rd.unflatten(0, (NUM_GLOBAL_VIEWS, -1)).transpose(0, 1),
            is_masked=is_masked_BGN,
            patches=hidden_Md,
            centered=(wanted_Md.sum(dim=0), len(wanted_Md)),
        )

    def _patches_of(self, looks: list[TeachersLook]) -> StepPatches:
        targets = self.make_targets(
            torch.cat([look.patches for look in looks]),
            self.target_branch.patch_weights(),
            self.patch_center,
            self._patch_temperature,
        )
        return StepPatches(targets, torch.cat([look.is_masked for look in looks]))

    def end_step(self, updates: list[dict[str, Tensor]]) -> None:
        """Move both centres, then the teacher."""
        if self._patch_mean is not None:
            self.patch_center.update(self._patch_mean, self.config.center_momentum)
        self._step_patches = self._patch_mean = None
        super().end_step(updates)

    # The loss

    def student_features(
        self, pixel_values: Tensor, local_pixel_values: Tensor | None, bool_masked_pos: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Pooled features (V * B, D) of all views, blocked by view, and the tokens of the global ones.

        Args:
            pixel_values: (B, G, C, H, W).
            local_pixel_values: (B, L, C, h, w), or None.
            bool_masked_pos: (G * B, N) bool, patches hidden in the global views.
        """
        crops = join_views(pixel_values, NUM_GLOBAL_VIEWS)
        outputs = self.student.backbone(crops, bool_masked_pos=bool_masked_pos)
        features = [outputs.pooler_output]
        if local_pixel_values is not None:
            # Crops of one size make one pass; another size is another pass.
            local = self.student.backbone(local_pixel_values.transpose(0, 1).flatten(0, 1))
            features.append(local.pooler_output)
        return torch.cat(features), outputs.last_hidden_state

    def distill(
        self,
        pixel_values: Tensor,
        local_pixel_values: Tensor | None,
        row_index: Tensor | None,
        bool_masked_pos: Tensor | None,
        anchor_pixel_values: Tensor | None = None,
    ) -> SSLOutput:
        """Predict the teacher's targets of every other view, and of the patches hidden in the own one.

        Args:
            pixel_values: (B, 2, C, H, W) global views, normalised.
            local_pixel_values: (B, V - 2, C, h, w) local views, of the student alone, nothing hidden.
            row_index: (B,) rows of the global batch among the prepared targets and masks; without it, both
                are made for this batch.
            bool_masked_pos: (B, 2, N) bool, masks to use instead, True = hidden.
            anchor_pixel_values: (B, 2, C, H', W') global views for `further_terms`; None: `pixel_values`.

        Returns:
            `loss` in nats; `parts` has `class_loss`, `patch_loss` and the statistics of both targets, of
            patches over some evenly spaced ones; `is_masked` (B, 2, N).
        """
        num_images = len(pixel_values)
        targets, patch_targets, is_masked_BGN = self._targets_and_masks(
            pixel_values, row_index, bool_masked_pos
        )
        features_RD, tokens = self.student_features(
            pixel_values,
            local_pixel_values,
            bool_masked_pos=is_masked_BGN.transpose(0, 1).flatten(0, 1) if self.hides_patches else None,
        )
        patches_BGND = self.student.patch_tokens(tokens)
        vectors_Rd, patches_Md = self.student.vectors(
            features_RD, patches_BGND[is_masked_BGN], len(features_RD) // num_images
        )
        temperature = self.config.student_temperature
        class_loss = mean_of_other_views(
            view_cross_entropies(
                vectors_Rd.unflatten(0, (-1, num_images)),
                self.student.head.prototypes.weights(),
                targets,
                temperature,
            )
        )
        losses_M = row_cross_entropies(patches_Md, self.student.patch_weights(), patch_targets, temperature)
        patch_loss = mean_over_masked_views(losses_M, is_masked_BGN)
        statistics = targets.statistics()
        parts = statistics | {
            **patch_statistics(patch_targets, losses_M),
            "class_loss": class_loss.detach(),
            "patch_loss": patch_loss.detach(),
            "divergence": class_loss.detach() - statistics["target_entropy"],
            "center_norm": self.center.value.norm(),
            "feature_std": std_of_normalized(features_RD[:num_images]),
        }
        loss = self.config.class_loss_weight * class_loss + self.config.patch_loss_weight * patch_loss
        if anchor_pixel_values is None:
            anchor_pixel_values = pixel_values
        for name, weight, term in self.further_terms(features_RD, patches_BGND, anchor_pixel_values):
            parts[name] = term.detach()
            loss = loss + weight * term
        return SSLOutput(
            loss=loss,
            parts=parts,
            features=features_RD[: NUM_GLOBAL_VIEWS * num_images].detach(),
            projections=vectors_Rd[: NUM_GLOBAL_VIEWS * num_images].detach(),
            is_masked=is_masked_BGN,
        )

    def further_terms(
        self, features_RD: Tensor, patches_BGND: Tensor, anchor_pixel_values: Tensor
    ) -> list[tuple[str, float, Tensor]]:
        """Name, weight and value of what else the loss sums: KoLeo, where it has a weight."""
        if not self.config.koleo_weight:
            return []
        return [("koleo", float(self.config.koleo_weight), self.koleo(features_RD, len(patches_BGND)))]

    def masked_share_of_views(self) -> float:
        """Share of the global views that have a mask."""
        raise TypeError(f"{type(self).__name__} must define masked_share_of_views")

    def expectations(self, num_images: int = 256) -> dict[str, float]:
        """As without patches, and those added: a view without a mask has no patch loss."""
        values, config = super().expectations(num_images), self.config
        share = config.patch_loss_weight * self.masked_share_of_views()
        log_k, spread = math.log(self.patch_center.value.numel()), self.patch_logit_spread()
        values["patch_uniform_entropy"] = log_k
        values["patch_most_information"] = min(log_k, math.log(PATCHES_OF_STATISTICS))
        values["loss_at_start"] = config.class_loss_weight * values["loss_at_start"] + share * (
            log_k + spread
        )
        values["loss_of_uniform"] = config.class_loss_weight * values["loss_of_uniform"] + share * log_k
        return values

    def patch_logit_spread(self) -> float:
        """What unrelated unit vectors cost above ln K: 1 / (2 d T^2)."""
        width = self.student.patch_weights().direction.shape[1]
        return 1 / (2 * width * self.config.student_temperature**2)

    def _targets_and_masks(
        self, pixel_values: Tensor, row_index: Tensor | None, bool_masked_pos: Tensor | None
    ) -> tuple[PrototypeTargets, PrototypeTargets, Tensor]:
        classes, patches = self._class_targets, self._step_patches
        if classes is None or patches is None or row_index is None or bool_masked_pos is not None:
            num_images = len(pixel_values)
            row_index = torch.arange(num_images)
            if bool_masked_pos is None:
                seed = (int(torch.randint(2**31, ())), 0)
                bool_masked_pos = self.draw_masks(row_index, num_images, self._grid(pixel_values), seed)
            look = self.look(pixel_values, bool_masked_pos.to(pixel_values.device))
            classes, patches = (
                StepTargets(self.targets_of(look.classes), num_images),
                self._patches_of([look]),
            )
            row_index = row_index.to(pixel_values.device)
        position_B = classes.positions(row_index)
        is_masked_BGN, patch_targets = patches.of_images(position_B, self.target_branch.patch_weights())
        return (
            classes.of_rows(row_index, self.target_branch.head.prototypes.weights()),
            patch_targets,
            is_masked_BGN,
        )
