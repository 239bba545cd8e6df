"""What several commands load: an encoder with its processor, and images."""

from pathlib import Path
from typing import Any


def load_encoder(run_or_name: str) -> tuple[Any, Any]:
    """The encoder of a run, of a native folder or of a Hub name, with its image processor.

    Raises:
        ValueError: there is no model there, or it needs code of its own.
    """
    import torch
    from transformers import AutoImageProcessor, AutoModel

    from hf_ssl.hub.locations import locate

    location = locate(run_or_name)
    if location.is_folder and location.file("config.json") is None:
        raise ValueError(f"'{run_or_name}' is no run, encoder folder or Hub name: it has no config.json")
    if location.file("preprocessor_config.json") is None and location.file("video_preprocessor_config.json"):
        raise ValueError(
            f"'{run_or_name}' is an encoder of clips alone; give the run it comes from, whose view says "
            "which frames are taken"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what the checkpoint lacks, such as a pooler, is the same in every call
        return location.load(AutoModel).eval(), location.load(AutoImageProcessor)


def load_image_text(run_or_name: str) -> Any:
    """Both towers of a run of a method that learns from texts, as an `ImageTextEncoder`.

    Raises:
        ValueError: there is no such model, or it knows no texts.
    """
    from transformers import AutoConfig, AutoModelForPreTraining, AutoProcessor

    from hf_ssl.evaluation.image_text import ImageTextEncoder
    from hf_ssl.hub.locations import locate
    from hf_ssl.modeling import METHODS

    location = locate(run_or_name)
    subfolder = location.subfolder()
    if location.file("config.json", subfolder) is None:
        raise ValueError(f"'{run_or_name}' is no run or Hub name: it has no config.json")
    config = location.load(AutoConfig, subfolder)
    able = {m.config_class.model_type: name for name, m in METHODS.items() if m.text_processor_class}
    if config.model_type not in able:
        raise ValueError(
            f"'{run_or_name}' is a {config.model_type}, which knows no texts; give a run of "
            f"{' or '.join(able.values())}"
        )
    if location.file("tokenizer.json", subfolder) is None:
        raise ValueError(f"'{run_or_name}' has no tokenizer.json; give the folder that the run left")
    model = location.load(AutoModelForPreTraining, subfolder)
    return ImageTextEncoder(model, location.load(AutoProcessor, subfolder))


def run_recipe(run: str) -> Any:
    """The recipe saved with a run.

    Raises:
        ValueError: the folder is no run.
    """
    from hf_ssl.hub.cards import RECIPE_FILE
    from hf_ssl.training.recipes import load_recipe

    if not (Path(run) / RECIPE_FILE).is_file():
        raise ValueError(f"'{run}' is no run: it has no {RECIPE_FILE}")
    return load_recipe(str(Path(run) / RECIPE_FILE))
