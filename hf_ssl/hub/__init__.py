"""Landing an encoder in a native class, and publishing it with all the rest.

Importing this is cheap; public names load when first used.
"""

import importlib
from typing import Any

_HOME_OF = {
    "ExportReport": "hf_ssl.hub.landing",
    "export_encoder": "hf_ssl.hub.landing",
    "PublishError": "hf_ssl.hub.publishing",
    "prepare_repository": "hf_ssl.hub.publishing",
    "publish": "hf_ssl.hub.publishing",
}

__all__ = [*_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'hf_ssl.hub' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME_OF[name]), name)
