"""LoRA: the backbone stands still, low-rank adapters on its attention learn (arXiv 2106.09685).

peft puts the adapters into the modules; this is the only place that knows the names they get. What a run
writes has them merged, so that model and native encoder load as ever; a checkpoint also holds base weights
and adapters in a file of their own, so that the run resumes exactly.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME

from hf_ssl.modeling.shared.pretraining import SSLForPreTraining
from hf_ssl.modeling.shared.vit import SSLViTBackbone

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTER = "default"  # peft's name of the only one
LORA_FILE = "lora.safetensors"  # what merging would lose, in a checkpoint


def add_lora(model: SSLForPreTraining, rank: int) -> None:
    """Freeze the backbone and put adapters beside its attention projections, in student and teacher.

    Their scale is 1 (alpha is the rank), and they start at zero: nothing changes before the first step. A
    mask token learns on, as native encoders may lack one. The teacher's adapters follow the student's.

    Args:
        model: in memory as its method builds it.
        rank: of every adapter.

    Raises:
        ValueError: peft is missing, the backbone is no ViT of ours, or the method keeps a third one.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError("lora_rank needs peft: pip install 'hf-ssl[lora]'") from error
    if not isinstance(model.published_branch().backbone, SSLViTBackbone):
        raise ValueError("lora_rank needs a ViT backbone (model_type hf_ssl_vit); leave it out for CNNs")
    if getattr(model, "anchor", None) is not None:
        raise ValueError("lora_rank and gram_weight exclude each other: the anchor would have no adapters")
    branches: list[Any] = [model.student, model.teacher] if model.has_teacher else [model.student]
    for branch in branches:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS)
        inject_adapter_in_model(config, branch.backbone)
        token = branch.backbone.embeddings.mask_token
        if token is not None:
            token.requires_grad_(True)
    model.sync_branches(model.base_model_prefix)
    model.freeze_targets()


def merged_state(model: SSLForPreTraining) -> dict[str, Tensor]:
    """Tensors of a model with its adapters merged into the projections, under their plain names."""
    from peft.tuners.lora import LoraLayer

    state: dict[str, Tensor] = model.state_dict()
    for prefix, module in model.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            base = layer.get_base_layer()
            delta = layer.get_delta_weight(ADAPTER)
            for name in [name for name in state if name.startswith(f"{prefix}.")]:
                del state[name]
            state[f"{prefix}.weight"] = (base.weight + delta.to(base.weight.dtype)).detach()
            if base.bias is not None:
                state[f"{prefix}.bias"] = base.bias.detach()
    return state


def save_apart(model: SSLForPreTraining, folder: Path) -> None:
    """Write base weights and adapters of a model to a checkpoint whose weights are merged."""
    from peft.tuners.lora import LoraLayer

    names = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    prefixes = tuple(f"{name}." for name in names)
    state = {name: value for name, value in model.state_dict().items() if name.startswith(prefixes)}
    save_file({name: value.contiguous() for name, value in state.items()}, folder / LORA_FILE)


def load_apart(model: SSLForPreTraining, checkpoint: Path) -> None:
    """Load a checkpoint into a model with adapters; `check_tensors` has found it complete."""
    state = load_file(checkpoint / SAFE_WEIGHTS_NAME)
    if (checkpoint / LORA_FILE).is_file():  # of earlier versions, one file held them
        state |= load_file(checkpoint / LORA_FILE)
    wanted = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in state.items() if name in wanted})
