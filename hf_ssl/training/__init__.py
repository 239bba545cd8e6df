"""Training: the Trainer subclass, its arguments, recipes and the run that a recipe describes."""

if __name__ != "hf_ssl.training":
    raise ImportError(
        "import hf_ssl.training; the folder training/ in the checkout's root is a link for readers"
    )

from typing import Any

_HOME_OF = {
    "SSLTrainer": "hf_ssl.training.trainer",
    "SSLTrainingArguments": "hf_ssl.training.arguments",
    "train": "hf_ssl.training.run",
    "load_recipe": "hf_ssl.training.recipes",
}

__all__ = list(_HOME_OF)


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOME_OF:
        raise AttributeError(f"module 'hf_ssl.training' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
