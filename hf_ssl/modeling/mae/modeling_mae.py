"""MAE: encode a quarter of the patches, reconstruct the pixels of the rest.

Source: He et al. 2021 (arXiv 2111.06377), section 3; compared with the authors' `models_mae.py`. Deliberate
differences: visible patches are gathered before their projection (equal to 1e-6, a quarter of the work), and
while training not predicted, as they have no loss; the bias of the patch projection starts at 0 instead of
torch's default.
Shape suffixes: B = images, N = patches, M = some of them, D = encoder width, E = decoder width,
P = pixel values of a patch, 3 * patch_size**2.
"""

import math

import torch
from torch import Tensor, nn

from hf_ssl.modeling.shared.backbone import build_backbone
from hf_ssl.modeling.shared.distributed import world_size
from hf_ssl.modeling.shared.losses import masked_patch_loss, patch_loss
from hf_ssl.modeling.shared.masks import num_kept_patches, random_masking
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.patches import normalize_patches, patch_grid, patchify
from hf_ssl.modeling.shared.predictor import PatchPredictor
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining, SSLModel, generator_of_step

from .configuration_mae import MAEConfig


class MAEModel(SSLModel):
    """The encoder on whole images; nothing is hidden."""

    config_class = MAEConfig


class MAEDecoder(PatchPredictor):
    """Light transformer that fills mask tokens into the hidden places and predicts pixels.

    Prefix tokens get no position, as the authors' class token gets zeros.
    """

    def __init__(self, config: MAEConfig) -> None:
        encoder = config.encoder_config
        super().__init__(
            encoder,
            config.decoder_hidden_size,
            config.decoder_num_hidden_layers,
            config.decoder_num_attention_heads,
            output_size=encoder.num_channels * encoder.patch_size**2,
        )
        self.num_prefix_tokens = encoder.num_prefix_tokens

    def forward(
        self,
        tokens_BTD: Tensor,
        restore_index_BN: Tensor,
        grid: tuple[int, int],
        wanted_index_BM: Tensor | None = None,
    ) -> Tensor:
        """Predict patches.

        Args:
            tokens_BTD: encoder tokens, prefix first, then the M visible patches in shuffled order.
            restore_index_BN: place of every patch in the order (visible, hidden).
            grid: (rows, columns) of patches; positions are resized where it is not the training grid.
            wanted_index_BM: patches to predict; None: all.

        Returns:
            Predicted pixels (B, N, P) or (B, M, P), inner order (row, column, channel).
        """
        tokens_BTE = self.embed(tokens_BTD)
        prefix, visible = tokens_BTE.split(
            [self.num_prefix_tokens, tokens_BTE.shape[1] - self.num_prefix_tokens], 1
        )
        num_hidden = restore_index_BN.shape[1] - visible.shape[1]
        hidden = self.mask_token.to(visible.dtype).expand(len(visible), num_hidden, -1)
        index = restore_index_BN.unsqueeze(-1).expand(-1, -1, visible.shape[-1])
        patches_BNE = torch.cat([visible, hidden], dim=1).gather(1, index) + self.positions(grid)
        states, _ = self.layers.run(torch.cat([prefix, patches_BNE], dim=1))
        patches_BNE = states[-1][:, self.num_prefix_tokens :]
        if wanted_index_BM is not None:
            patches_BNE = patches_BNE.gather(1, wanted_index_BM[:, :, None].expand(-1, -1, index.shape[-1]))
        return self.predict(self.layernorm(patches_BNE))


class MAEBranch(nn.Module):
    """Encoder and decoder."""

    def __init__(self, config: MAEConfig) -> None:
        super().__init__()
        self.backbone = build_backbone(config.backbone_config)
        self.head = MAEDecoder(config)


class MAEForPreTraining(SSLForPreTraining):
    """Encoder, decoder and the reconstruction loss."""

    config_class = MAEConfig
    student: MAEBranch

    def __init__(self, config: MAEConfig) -> None:
        super().__init__(config)
        self.student = MAEBranch(config)
        self._mask_seed = (0, 0)
        self._noise_of_step: Tensor | None = None
        self.finish_construction()

    def begin_step(self, step: int, total_steps: int, seed: int = 0) -> None:
        """Masks of a step depend on (seed, step) and the row alone."""
        self._mask_seed = (seed, step)
        self._noise_of_step = None

    def prepare_step(self, batches: list[dict[str, Tensor]]) -> None:
        """Draw the masks of all rows of the step, the same on every process."""
        pixel_values = batches[0]["pixel_values"]
        num_rows = world_size() * sum(len(batch["pixel_values"]) for batch in batches)
        generator = generator_of_step(*self._mask_seed)
        noise = torch.rand(num_rows, math.prod(self._grid(pixel_values)), generator=generator)
        self._noise_of_step = noise.to(pixel_values.device)

    def _grid(self, pixel_values: Tensor) -> tuple[int, int]:
        return patch_grid(pixel_values, self.config.encoder_config.patch_size)

    def forward(
        self,
        pixel_values: Tensor,
        row_index: Tensor | None = None,
        noise: Tensor | None = None,
        bool_masked_pos: Tensor | None = None,
    ) -> SSLOutput:
        """Reconstruct hidden patches.

        Args:
            pixel_values: (B, C, H, W), normalised.
            row_index: (B,) rows of the global batch, which choose the masks drawn for the step.
            noise: (B, N) chooses masks instead: the patches of least noise stay visible.
            bool_masked_pos: (B, N) bool chooses masks instead, True = hidden; equal counts per image.

        Returns:
            `loss`: squared error of hidden patches; `parts`: `loss_of_mean`, of the best constant guess,
            which the loss must beat, about 1 for normalised patches; `is_masked` (B, N);
            `predictions` (B, N, P) in units of the (normalised) targets, None while training.

        Raises:
            ValueError: no patch would stay visible, or masks of unequal size.
        """
        noise_BN = self._choose_noise(pixel_values, row_index, noise, bool_masked_pos)
        num_kept = self._num_kept(noise_BN, bool_masked_pos)
        kept_index_BM, restore_index_BN, is_masked_BN = random_masking(noise_BN, num_kept)
        tokens = self.student.backbone(pixel_values, kept_index=kept_index_BM).last_hidden_state
        # Without a loss of their own, visible patches are predicted for the eye alone.
        wanted_index_BM = restore_index_BN.argsort(dim=1)[:, num_kept:] if self.training else None
        predictions = self.student.head(tokens, restore_index_BN, self._grid(pixel_values), wanted_index_BM)
        with torch.no_grad():
            targets = patchify(pixel_values, self.config.encoder_config.patch_size, wanted_index_BM)
            if self.config.normalize_targets:
                targets = normalize_patches(targets)
            mean = targets.mean(dim=(0, 1), keepdim=True)
        if wanted_index_BM is None:
            loss = masked_patch_loss(predictions, targets, is_masked_BN)
        else:
            loss = patch_loss(predictions, targets)
        return SSLOutput(
            loss=loss,
            parts={"loss_of_mean": patch_loss(mean.expand_as(targets), targets)},
            features=tokens.detach().mean(dim=1),
            predictions=predictions.detach() if wanted_index_BM is None else None,
            is_masked=is_masked_BN,
        )

    def _choose_noise(
        self,
        pixel_values: Tensor,
        row_index: Tensor | None,
        noise: Tensor | None,
        bool_masked_pos: Tensor | None,
    ) -> Tensor:
        if bool_masked_pos is not None:
            return bool_masked_pos.float()
        if noise is not None:
            return noise
        if row_index is not None and self._noise_of_step is not None:
            return self._noise_of_step[row_index]
        return torch.rand(len(pixel_values), math.prod(self._grid(pixel_values)), device=pixel_values.device)

    def _num_kept(self, noise_BN: Tensor, bool_masked_pos: Tensor | None) -> int:
        if bool_masked_pos is None:
            return num_kept_patches(noise_BN.shape[1], self.config.mask_ratio)
        counts_B = (~bool_masked_pos).sum(dim=1)
        if counts_B.min() != counts_B.max() or not 0 < counts_B.min() < noise_BN.shape[1]:
            raise ValueError(
                f"bool_masked_pos must leave the same number of patches visible in every image, at least one "
                f"and not all {noise_BN.shape[1]}; got {int(counts_B.min())} to {int(counts_B.max())}"
            )
        return int(counts_B[0])

    def expectations(self, num_images: int = 256) -> dict[str, float]:
        """Loss of a fresh decoder (Xavier start), and of predicting the mean of normalised patches."""
        pixels = self.config.encoder_config.num_channels * self.config.encoder_config.patch_size**2
        width = self.config.decoder_hidden_size
        return {"loss_at_start": 1 + 2 * width / (width + pixels), "loss_of_constant": 1.0}
