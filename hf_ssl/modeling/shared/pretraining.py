"""What every pre-training model shares: branches, loading rules and the step protocol.

A trainer knows of a method only this protocol, called in this order once per optimizer step:
`begin_step`, `prepare_step`, `forward` for every micro-batch, `end_step`. `forward` changes no state, so
accumulation, recomputation and evaluation are safe; whatever moves (teacher, queue) moves in the others.
"""

import logging
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_ssl.modeling.shared.backbone import SSLTimmBackbone, build_backbone
from hf_ssl.modeling.shared.configuration import SSLConfig, SSLViTConfig
from hf_ssl.modeling.shared.initialization import initialize_module
from hf_ssl.modeling.shared.losses import full_precision, normalize
from hf_ssl.modeling.shared.outputs import SSLOutput
from hf_ssl.modeling.shared.vit import SSLViTBackbone

logger = logging.getLogger(__name__)

# For `_keep_in_fp32_modules_strict`, whose entries are searched as regular expressions: it casts whatever it
# matches, so the counters of BatchNorm must not match.
TEACHER_TENSORS = r"^teacher\..+(?<!num_batches_tracked)$"


class SSLPreTrainedModel(PreTrainedModel):
    """Initialisation and loading rules of all our models."""

    config: SSLConfig
    base_model_prefix = "student"  # the published branch
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # Trainer must divide the loss by the number of micro-batches itself
    _no_split_modules = ["SSLViTLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def post_init(self) -> None:
        """Initialise weights once all modules exist."""
        self._share_attention_implementation()
        super().post_init()

    def _share_attention_implementation(self) -> None:
        """Give all branches the implementation chosen."""
        chosen = self.config._attn_implementation
        for module in self.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "model_type", None) != SSLViTConfig.model_type:
                continue
            if config.use_shared_relative_position_bias and "flash" in str(chosen):
                raise ValueError(f"{chosen} adds no relative positions to its scores; use sdpa or eager")
            config._attn_implementation = chosen

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], *args: Any, **kwargs: Any
    ) -> None:
        """Choose eager, sdpa or flash attention for all branches."""
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self._share_attention_implementation()

    def _init_weights(self, module: nn.Module) -> None:
        initialize_module(module)

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:  # type: ignore[override]
        """Publish as a repository of two parts; options are those of `hf_ssl.hub.publish`.

        In the copy of this file that such a repository holds, transformers' own push takes its place.
        """
        if not __name__.startswith("hf_ssl."):
            return super().push_to_hub(repo_id, **options)  # type: ignore[arg-type]
        return import_module("hf_ssl.hub").publish(self, repo_id, **options)

    def freeze_targets(self) -> None:
        """Set `requires_grad` as the method wants it; `from_pretrained` makes every parameter trainable."""
        for module in self.modules():
            for parameter in getattr(module, "frozen_parameters", ()):
                parameter.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, then freeze what the method freezes."""
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        model, info = loaded
        model._after_loading(info)
        model.freeze_targets()
        return (model, info) if wants_info else model

    def _after_loading(self, info: dict[str, Any]) -> None:
        """Finish what a checkpoint lacks: timm's networks know better than `_init_weights` how they start."""
        unread = _unread_tensors(info)
        for prefix, module in self.named_modules():
            if isinstance(module, SSLTimmBackbone):
                start = f"{prefix}.network."
                module.start_afresh({name.removeprefix(start) for name in unread if name.startswith(start)})


def _unread_tensors(info: dict[str, Any]) -> set[str]:
    """Names that a checkpoint lacks or holds in another shape."""
    return set(info["missing_keys"]) | {name for name, *_ in info.get("mismatched_keys", ())}


class SSLModel(SSLPreTrainedModel):
    """An encoder: the published branch without its heads."""

    _keys_to_ignore_on_load_unexpected = [
        r"(^|\.)(patch_)?head\.",
        r"(^|\.)patch_prototypes\.",
        r"^(student|teacher|queue|predictor|(patch_)?center|anchor|distiller|decoder|tokenizer)\b",
        r"^(text_tower|text_projection|similarity)\b",
    ]

    def __init__(self, config: SSLConfig) -> None:
        super().__init__(config)
        self.backbone = build_backbone(config.backbone_config)
        self.post_init()
        self.freeze_targets()

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Encode images.

        Args:
            pixel_values: (B, C, H, W), normalised by the image processor; any size the backbone takes.
            output_hidden_states: also return the states between blocks.
            output_attentions: also return attention weights (eager attention only).
            return_dict: False returns a tuple.

        Returns:
            `last_hidden_state` (B, T, D) tokens after the final norm, or a feature map (B, D, H', W');
            `pooler_output` (B, D): the class token, or the mean of patches or positions.
        """
        outputs = self.backbone(
            pixel_values,
            output_hidden_states=bool(_first_set(output_hidden_states, self.config.output_hidden_states)),
            output_attentions=bool(_first_set(output_attentions, self.config.output_attentions)),
        )
        return outputs if _first_set(return_dict, True) else outputs.to_tuple()


def _first_set(value: bool | None, default: bool | None) -> bool | None:
    return default if value is None else value


class SSLForPreTraining(SSLPreTrainedModel):
    """Backbone, heads and training state, with the step protocol.

    Subclasses set `student` (and `teacher`), each an `nn.Module` with `backbone` and maybe `head`, and
    implement `forward`.
    """

    student: nn.Module
    teacher: nn.Module  # of methods that have one
    undecayed: tuple[str, ...] = ()  # ends of names of what has no weight decay beside vectors
    starts_with_fresh_heads = False  # set by who put an encoder under them that was trained before
    _holds_backbone = False

    @property
    def has_teacher(self) -> bool:
        """Whether the method keeps a momentum copy of the student."""
        return "teacher" in self._modules

    # The step protocol

    def begin_step(self, step: int, total_steps: int, seed: int = 0) -> None:
        """Start optimizer step `step` (0-based): schedules, and teachers that move before their forward."""

    def prepare_step(self, batches: list[dict[str, Tensor]]) -> None:
        """See all micro-batches of the step, to make targets that couple them."""

    def forward(self, pixel_values: Tensor, row_index: Tensor | None = None) -> SSLOutput:
        """Loss of one micro-batch; changes no state but BatchNorm's running statistics."""
        raise TypeError(f"{type(self).__name__} must define forward")

    def end_step(self, updates: list[dict[str, Tensor]]) -> None:
        """After the optimizer: move teacher, queue or centre once, by the `updates` of all micro-batches."""

    def held_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that stand still in the current step, as `begin_step` decided.

        They keep `requires_grad`; the trainer takes their gradients away after clipping, so that the
        optimizer skips them with decay and moments.
        """
        return ()

    # Heads before the backbone

    def hold_backbone(self, holds: bool) -> None:
        """Let the backbone stand still while heads find their place on it, or set it free.

        It is in eval mode then, so that heads learn on the features that the encoder gives: neither drop
        path nor a BatchNorm's statistics of the batch, and those it keeps do not move.
        """
        if holds != self._holds_backbone:
            self._holds_backbone = holds
            self.train(self.training)  # at once: a teacher may make targets before the next forward

    def held_backbone_parameters(self) -> Iterable[nn.Parameter]:
        """The student's backbone while it is held, but for a mask token, which only pre-training has."""
        if self._holds_backbone:
            backbone: Any = self.student.backbone
            for name, parameter in backbone.named_parameters():
                if not name.endswith("mask_token"):
                    yield parameter

    def train(self, mode: bool = True) -> "SSLForPreTraining":
        """As torch has it; a backbone that is held stays in eval mode, and so does the teacher's."""
        super().train(mode)
        self._quiet_held_backbones()
        return self

    def _quiet_held_backbones(self) -> None:
        branches: list[Any] = [self.student, self.teacher] if self.has_teacher else [self.student]
        for branch in branches if self._holds_backbone else ():
            branch.backbone.eval()

    def check_global_batch(self, global_batch_size: int) -> None:
        """Raise ValueError before step one where the method cannot work with this many images per step."""

    def expectations(self, num_images: int = 256) -> dict[str, float]:
        """Numbers a healthy run shows, e.g. `loss_at_start`; the doctor compares with them.

        Args:
            num_images: of a micro-batch.
        """
        return {}

    @property
    def loss_couples_the_batch(self) -> bool:
        """Whether an image's loss depends on the other images, so that accumulation is no larger batch.

        Such a method defines `loss_from_embeddings` and takes `embed_only=True` in `forward`, which then
        returns `embeddings` alone: gradient caching makes one large batch of several forwards with these.
        """
        return False

    def loss_from_embeddings(self, embeddings: dict[str, Tensor]) -> SSLOutput:
        """The second half of `forward`: heads and loss over all images of this process.

        Args:
            embeddings: tensors whose first dimension counts images, so that micro-batches can be joined.
        """
        raise TypeError(f"{type(self).__name__} must define loss_from_embeddings, or its loss is no sum")

    @property
    def embedder(self) -> nn.Module:
        """The part of the network that makes `embeddings`; where it normalises, micro-batches matter."""
        backbone: Any = self.published_branch().backbone
        return backbone

    # Parameters

    def published_branch(self) -> nn.Module:
        """The branch whose backbone is the encoder."""
        return getattr(self, self.base_model_prefix)

    def trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named parameters that receive gradients."""
        return ((name, value) for name, value in self.named_parameters() if value.requires_grad)

    def parameter_groups(
        self,
        weight_decay: float,
        decay_norms_and_biases: bool = False,
        layer_decay: float = 1.0,
        patch_embedding_multiplier: float = 1.0,
    ) -> list[dict[str, Any]]:
        """Groups for the optimizer.

        Args:
            weight_decay: of the decayed groups.
            decay_norms_and_biases: put everything into the decayed groups, as the official SGD recipes do.
            layer_decay: factor on the learning rate per layer below the last norm of a ViT; 1: none.
            patch_embedding_multiplier: further factor on the rate of a ViT's patch projection.

        Returns:
            Groups with keys `params`, `weight_decay`, `lr_multiplier`, `exclude_from_adaptation` (LARS), one
            for each rate and kind; vectors and scalars are excluded from decay and adaptation unless asked
            for.

        Raises:
            ValueError: rates by layer were asked for, and the backbone has no layers to tell apart.
        """
        multipliers = self._learning_rate_multipliers(layer_decay, patch_embedding_multiplier)
        groups: dict[tuple[bool, float], dict[str, Any]] = {}
        for is_vector in (False, True):
            for name, value in self.trainable_parameters():
                if (value.ndim <= 1 or name.endswith(self.undecayed)) != is_vector:
                    continue
                multiplier = multipliers.get(name, 1.0)
                empty = {
                    "params": [],
                    "weight_decay": weight_decay if decay_norms_and_biases or not is_vector else 0.0,
                    "lr_multiplier": multiplier,
                    "exclude_from_adaptation": is_vector,
                }
                groups.setdefault((is_vector, multiplier), empty)["params"].append(value)
        return list(groups.values())

    def _learning_rate_multipliers(self, layer_decay: float, patch_embedding: float) -> dict[str, float]:
        if layer_decay == 1 and patch_embedding == 1:
            return {}
        backbones = {
            name: module for name, module in self.named_modules() if isinstance(module, SSLViTBackbone)
        }
        if not backbones:
            raise ValueError(
                f"layer_decay {layer_decay} and patch_embedding_multiplier {patch_embedding} need a ViT "
                "backbone (model_type hf_ssl_vit); leave them at 1"
            )
        return {
            f"{prefix}.{name}": value
            for prefix, backbone in backbones.items()
            for name, value in backbone.learning_rate_multipliers(layer_decay, patch_embedding)
        }

    def freeze_targets(self) -> None:
        """Freeze the teacher and what modules declare frozen."""
        super().freeze_targets()
        if self.has_teacher:
            self.teacher.requires_grad_(False)

    # Branches

    def sync_branches(self, source: str = "student") -> None:
        """Copy one branch's parameters and buffers into the other.

        Args:
            source: "student" or "teacher".
        """
        if not self.has_teacher:
            return
        target = "teacher" if source == "student" else "student"
        state = getattr(self, source).state_dict()
        # The student may have more than the teacher, e.g. a predictor; the teacher has nothing of its own.
        shared = {name: state[name] for name in self.teacher.state_dict()}
        getattr(self, target).load_state_dict(shared, strict=False)

    def finish_construction(self) -> None:
        """Initialise, start the teacher as the student, freeze; the last line of every `__init__`."""
        self.post_init()
        if not next(self.parameters()).is_meta:
            self.sync_branches()
        self.freeze_targets()

    @classmethod
    def from_pretrained(cls, *args: Any, allow_new_heads: bool = False, **kwargs: Any) -> Any:
        """Load a pre-training checkpoint, or start from an encoder.

        Args:
            *args: as in transformers.
            allow_new_heads: accept a checkpoint without heads or queue; they start fresh.
            **kwargs: as in transformers.

        Raises:
            ValueError: tensors are missing that no other branch can supply.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        fresh = sorted(model.fresh_tensors(info["missing_keys"]))
        if fresh and not allow_new_heads:
            raise ValueError(
                f"the checkpoint lacks {len(fresh)} tensors of {cls.__name__}, e.g. '{fresh[0]}'; pass "
                "allow_new_heads=True to start them fresh"
            )
        if fresh:
            logger.warning("started fresh: %d tensors, e.g. %s", len(fresh), fresh[0])
        return (model, info) if wants_info else model

    @torch.no_grad()
    def _after_loading(self, info: dict[str, Any]) -> None:
        """Copy what only one branch has to the other; where neither has it, the teacher is the student."""
        super()._after_loading(info)
        if not self.has_teacher:
            return
        # Loading keeps what it reads in float32, but makes what it lacks in the requested dtype.
        for tensor in [*self.teacher.parameters(), *self.teacher.buffers()]:
            tensor.data = full_precision(tensor.data) if tensor.is_floating_point() else tensor.data
        unread = _unread_tensors(info)
        state = self.state_dict()
        for name in self.teacher.state_dict():
            student, teacher = f"student.{name}", f"teacher.{name}"
            if teacher in unread:
                state[teacher].copy_(state[student])
            elif student in unread:
                state[student].copy_(state[teacher])
        lacking = self._branch_without_backbone(info["missing_keys"])
        if lacking is not None:
            source = "student" if lacking == "teacher" else "teacher"
            logger.warning("the checkpoint has no %s; it starts as a copy of the %s", lacking, source)

    def _branch_without_backbone(self, missing: Iterable[str]) -> str | None:
        """The branch whose backbone the checkpoint lacks entirely while it holds the other one's entirely."""
        if not self.has_teacher:
            return None
        missing = set(missing)
        names = [f"backbone.{name}" for name in self.teacher.backbone.state_dict()]  # type: ignore[union-attr]
        counts = {
            branch: sum(f"{branch}.{name}" in missing for name in names) for branch in ("student", "teacher")
        }
        for lacking, source in (("teacher", "student"), ("student", "teacher")):
            if counts[lacking] == len(names) and counts[source] == 0:
                return lacking
        return None

    def fresh_tensors(self, missing: Iterable[str]) -> set[str]:
        """Missing tensors that the copy of a whole branch did not supply."""
        missing = set(missing)
        lacking = self._branch_without_backbone(missing)
        if lacking is None:
            return missing
        source = "student" if lacking == "teacher" else "teacher"
        supplied = {
            f"{lacking}.{name}" for name in self.teacher.state_dict() if f"{source}.{name}" not in missing
        }
        return missing - supplied


class Branch(nn.Module):
    """A backbone with a head: one side of a student/teacher pair."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled backbone features (B, D) and head outputs (B, d) of images (B, C, H, W)."""
        features_BD = self.backbone(pixel_values).pooler_output
        return features_BD, self.head(features_BD)


def generator_of_step(seed: int, step: int) -> torch.Generator:
    """Random numbers (CPU) that depend on (seed, step) alone: the same in every process and repetition."""
    return torch.Generator().manual_seed(hash((seed, step)) % 2**63)


def split_views(pixel_values: Tensor, num_views: int) -> list[Tensor]:
    """Views of a batch (B, V, C, H, W) as a list of V tensors (B, C, H, W).

    Raises:
        ValueError: the batch has another number of views or of dimensions.
    """
    if pixel_values.ndim != 5 or pixel_values.shape[1] != num_views:
        raise ValueError(
            f"pixel_values must be (batch, {num_views} views, channels, height, width), "
            f"got {tuple(pixel_values.shape)}"
        )
    return list(pixel_values.unbind(1))


def join_views(pixel_values: Tensor, num_views: int) -> Tensor:
    """Views of a batch (B, V, C, H, W) as (V*B, C, H, W), blocked by view.

    Raises:
        ValueError: the batch has another number of views or of dimensions.
    """
    split_views(pixel_values, num_views)
    return pixel_values.transpose(0, 1).flatten(0, 1)


@torch.no_grad()
def std_of_normalized(embeddings_BD: Tensor) -> Tensor:
    """Standard deviation over the batch of unit vectors, mean over dimensions.

    1/sqrt(D) when spread over the sphere, 0 when collapsed.
    """
    return normalize(embeddings_BD.detach()).std(dim=0).mean()
