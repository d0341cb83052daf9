"""Exact, masked top-k codebook kernels, and a module swap that puts them into Hugging Face models.

The public names and modules are imported on first use, so that ``import cu_fast`` stays light.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOME = {
    "attach": "hf",
    "attach_masks": "hf",
    "Attachment": "hf",
    "BottleneckConfig": "nn",
    "CodebookBottleneck": "nn",
    "Mask": "masks",
    "SAE": "sae",
    "StaleCacheError": "hf",
    "find_mask": "unlearn",
    "fit_gate": "unlearn",
    "level_for": "unlearn",
    "load_sae": "sae",
    "load_model": "hf",
    "save_model": "hf",
    "topics_of": "unlearn",
    "within_loss": "unlearn",
}
_MODULES = ("bench", "evaluate", "hf", "masks", "nn", "ops", "sae", "train", "unlearn")
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(f"cu_fast.{_HOME[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"cu_fast.{name}")
    raise AttributeError(f"module 'cu_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})
