"""hf_ssl: pre-train, check, export and use self-supervised vision encoders with the Hugging Face tools.

Importing this is cheap. Public names load when first used, and every method is registered with transformers'
Auto classes as soon as transformers is imported, whichever import comes first.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "hf_ssl.modeling": ("METHODS",),
    "hf_ssl.modeling.simclr": ("SimCLRConfig", "SimCLRForPreTraining", "SimCLRImageProcessor", "SimCLRModel"),
    "hf_ssl.modeling.moco": ("MoCoConfig", "MoCoForPreTraining", "MoCoImageProcessor", "MoCoModel"),
    "hf_ssl.modeling.mocov3": ("MoCoV3Config", "MoCoV3ForPreTraining", "MoCoV3ImageProcessor", "MoCoV3Model"),
    "hf_ssl.modeling.mae": ("MAEConfig", "MAEForPreTraining", "MAEImageProcessor", "MAEModel"),
    "hf_ssl.modeling.beit": ("BEiTConfig", "BEiTForPreTraining", "BEiTImageProcessor", "BEiTModel"),
    "hf_ssl.modeling.beit_tokenizer": (
        "BEiTTokenizerConfig",
        "BEiTTokenizerForPreTraining",
        "BEiTTokenizerImageProcessor",
        "BEiTTokenizerModel",
    ),
    "hf_ssl.modeling.dino": ("DINOConfig", "DINOForPreTraining", "DINOImageProcessor", "DINOModel"),
    "hf_ssl.modeling.ibot": ("iBOTConfig", "iBOTForPreTraining", "iBOTImageProcessor", "iBOTModel"),
    "hf_ssl.modeling.dinov2": ("DINOv2Config", "DINOv2ForPreTraining", "DINOv2ImageProcessor", "DINOv2Model"),
    "hf_ssl.modeling.ijepa": ("IJEPAConfig", "IJEPAForPreTraining", "IJEPAImageProcessor", "IJEPAModel"),
    "hf_ssl.modeling.vjepa": ("VJEPAConfig", "VJEPAForPreTraining", "VJEPAImageProcessor", "VJEPAModel"),
    "hf_ssl.modeling.shared.configuration": ("SSLTimmConfig", "SSLViTConfig"),
    "hf_ssl.data": ("load_sample", "open_images"),
    "hf_ssl.training": ("SSLTrainer", "SSLTrainingArguments", "train"),
    "hf_ssl.hub": ("export_encoder", "publish"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hf_ssl' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


class _RegisterAfterTransformers(MetaPathFinder, Loader):
    """Imports `hf_ssl.modeling` right after `import transformers` has run, once."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "transformers":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self._loader = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader  # type: ignore[union-attr]
        self._loader.exec_module(module)
        importlib.import_module("hf_ssl.modeling")


if "transformers" in sys.modules:
    importlib.import_module("hf_ssl.modeling")
else:
    import importlib.util

    sys.meta_path.insert(0, _RegisterAfterTransformers())
