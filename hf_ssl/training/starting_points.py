"""What a run can start from: fresh weights, a pre-training checkpoint of its method, or any encoder."""

from typing import Any

from torch import Tensor
from transformers import AutoConfig, AutoModel

from hf_ssl.modeling import METHODS
from hf_ssl.modeling.shared.pretraining import SSLForPreTraining
from hf_ssl.training.recipes import Recipe, RecipeError

PREFIXES = (
    "backbone.",
    "timm_model.",
)  # of the network's tensors in our encoders and in transformers' wrapper
NOT_LEARNED_HERE = ("pooler.",)  # native ViTs carry one that our backbones do not have


def build_model(recipe: Recipe, config: Any) -> SSLForPreTraining:
    """The recipe's model, fresh or started from `init_from`.

    Raises:
        RecipeError: there is nothing to start from, or its encoder is of another shape.
    """
    model_class = METHODS[recipe.method].pretraining_class
    if recipe.init_from is None:
        return model_class(config)
    try:
        found = AutoConfig.from_pretrained(recipe.init_from)
        if found.model_type == config.model_type:
            return _continue_method(model_class, recipe.init_from, config)
        return _start_from_encoder(model_class(config), recipe.init_from)
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(
            f"cannot start from '{recipe.init_from}': {' '.join(str(error).split())}"
        ) from error


def _continue_method(model_class: Any, name: str, config: Any) -> SSLForPreTraining:
    """Everything the checkpoint has; heads it does not have start fresh, the encoder must be there."""
    model, info = model_class.from_pretrained(
        name, config=config, allow_new_heads=True, output_loading_info=True
    )
    lost = [key for key in info["missing_keys"] if key.startswith(f"{model.base_model_prefix}.backbone.")]
    if lost:
        raise ValueError(f"it lacks {len(lost)} tensors of the encoder, e.g. '{lost[0]}'")
    return model


def _start_from_encoder(model: SSLForPreTraining, name: str) -> SSLForPreTraining:
    """Fresh heads on the encoder of another method, a native model or a timm model."""
    encoder = AutoModel.from_pretrained(name)
    state = {
        _plain_name(key): value
        for key, value in encoder.state_dict().items()
        if not key.startswith(NOT_LEARNED_HERE)
    }
    branch: Any = model.published_branch()
    network = getattr(branch.backbone, "network", branch.backbone)  # a CNN's own names are timm's
    _check_shapes(network.state_dict(), state, type(encoder).__name__)
    network.load_state_dict(state, strict=False)
    model.sync_branches(model.base_model_prefix)
    return model


def _plain_name(name: str) -> str:
    for prefix in (*PREFIXES, "network."):
        name = name.removeprefix(prefix)
    return name


def _check_shapes(wanted: dict[str, Tensor], given: dict[str, Tensor], class_name: str) -> None:
    for name, tensor in wanted.items():
        if name not in given:
            raise ValueError(f"a {class_name} has no '{name}'; the backbones are of different kinds")
        if given[name].shape != tensor.shape:
            raise ValueError(
                f"'{name}' is {tuple(given[name].shape)} there and {tuple(tensor.shape)} here; give the same "
                "backbone_config (of a run with a small-image stem: the run, not its encoder folder)"
            )
