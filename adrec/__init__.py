"""Inference optimisation for diffusion-based sequential recommendation.

``Recommender.load(run).recommend(histories, k=20)`` is the whole serving interface; see README.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adrec.data.dataset import Dataset
    from adrec.recommender import Recommender

__all__ = ["Dataset", "Recommender"]


def __getattr__(name: str) -> Any:
    # Torch and Arrow take seconds to import; `adrec --help` and `import adrec` must not wait for them.
    if name == "Recommender":
        from adrec.recommender import Recommender

        return Recommender
    if name == "Dataset":
        from adrec.data.dataset import Dataset

        return Dataset
    raise AttributeError(f"module 'adrec' has no attribute '{name}'")
