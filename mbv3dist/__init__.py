"""mbv3dist trains MobileNetV3 classifiers and SSDLite detectors on many GPUs, from tar shards.

The names below are the Python interface. They are imported when first used, so that
`import mbv3dist` costs nothing and the commands that need no torch start without it.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "convert_imagefolder": "mbv3dist.convert.imagefolder",
    "convert_voc": "mbv3dist.convert.voc",
    "open_split": "mbv3dist.data.index",
    "Plan": "mbv3dist.data.plan",
    "Loader": "mbv3dist.data.loader",
    "create_model": "mbv3dist.models.directory",
    "load_model": "mbv3dist.models.directory",
    "detect": "mbv3dist.inference.predict",
    "predict": "mbv3dist.inference.predict",
    "evaluate": "mbv3dist.evaluation.run",
    "load_config": "mbv3dist.recipe",
    "train": "mbv3dist.training.run",
    "doctor": "mbv3dist.tools.doctor",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
