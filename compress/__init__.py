"""Turning a trained model into a cheaper one, or into a file another runtime reads.

One verb: `compress_` applies a technique to a model or a draft, `compress_run` a recipe to a run folder; both say in
receipts what was changed, skipped and lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.api import Compression, compress_, compress_run, read_compression
    from compress.recipe import Entry, Recipe, read_recipe, register_technique, techniques
    from compress.technique import CompressionError, Draft, Receipt, Technique

__all__ = [
    "Compression",
    "CompressionError",
    "Draft",
    "Entry",
    "Receipt",
    "Recipe",
    "Technique",
    "compress_",
    "compress_run",
    "read_compression",
    "read_recipe",
    "register_technique",
    "techniques",
]


def __getattr__(name: str) -> Any:
    # The command line reads this package to list its commands, and must not wait for torch.
    if name in __all__:
        from compress import api, recipe, technique

        return next(vars(module)[name] for module in (api, recipe, technique) if name in vars(module))
    raise AttributeError(f"module 'compress' has no attribute '{name}'")
