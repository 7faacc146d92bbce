"""lrc: a compiler for low-rank structure in neural networks.

    result = lrc.compile(model, spec, inputs=inputs)     # .module .program .plan .graft(model) .save(dir) .to_onnx(path)
    lrc.capture  lrc.plan  lrc.load  lrc.set_adapter  lrc.register_pass

Importing this package is cheap: torch is imported when something is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lrc.api import Compiled as Compiled
    from lrc.api import adapters_of as adapters_of
    from lrc.api import capture as capture
    from lrc.api import compile as compile
    from lrc.api import load as load
    from lrc.api import plan as plan
    from lrc.api import register_pass as register_pass
    from lrc.api import set_adapter as set_adapter

__version__ = "0.1.0"
__all__ = ["Compiled", "__version__", "adapters_of", "capture", "compile", "load", "plan", "register_pass", "set_adapter"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("lrc.api"), name)
    raise AttributeError(f"module 'lrc' has no attribute {name!r}")
