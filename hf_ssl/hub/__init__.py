"""Landing an encoder in a native class. Importing this is cheap; public names load when first used."""

import importlib
from typing import Any

_HOME_OF = {"ExportReport": "hf_ssl.hub.landing", "export_encoder": "hf_ssl.hub.landing"}

__all__ = [*_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hf_ssl.hub' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
