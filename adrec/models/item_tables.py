"""The item table in fewer bits: what a model looks items up in, and what an engine scores.

Lookup, clean targets and scores all read the stored numbers, so a quantised table is one function everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adrec.config import TableFormat
from adrec.errors import ConfigError, NotSupportedError
from adrec.models.quantized import Packed, empty_packed, int8_matmul, pack, round_rows, unpack

DENSE_ITEMS = 2**16
"""Below so many rows a float32 copy is kept: fewer bits are not faster there at every batch size."""
CODE_BITS = 4
_CODES = 2**CODE_BITS
# bfloat16 scores are rounded to 8 significant bits.
_BF16_ROUNDING = 2.0**-8

Proxy = Callable[[int, int], Tensor]
"""``(first, last) -> scores [B, last - first]`` of the items in between, cheaper than exact ones."""


class QuantizedTable(nn.Module):
    """Item table `[N + 1, D]` stored in a `TableFormat`; row 0 is padding and exactly zero. Not for training.

    It stands where `nn.Embedding` does: called with ids it gives float32 rows. Raises ConfigError for a group size or
    a number of subspaces that the width does not allow.
    """

    values: Tensor
    scale: Tensor | None
    dense: Tensor | None
    codes: Tensor | None
    centroids: Tensor | None

    def __init__(
        self, packed: Packed, table_format: TableFormat, codes: Tensor | None = None, centroids: Tensor | None = None
    ) -> None:
        super().__init__()
        self.format = table_format
        self.num_embeddings = packed.values.shape[0]
        self.embedding_dim = packed.values.shape[1] * (2 if table_format.format == "int4" else 1)
        self.register_buffer("values", packed.values)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("codes", codes)
        self.register_buffer("centroids", centroids)
        self.register_buffer("dense", None, persistent=False)
        self._unpack()

    @classmethod
    def of(cls, table: Tensor, table_format: TableFormat) -> QuantizedTable:
        """Round a table `[N + 1, D]`; product codes are learned from its rows 1..N with FAISS."""
        packed = pack(table, table_format.format, table_format.group_size)
        if table_format.product is None:
            return cls(packed, table_format)
        subspaces = _check_subspaces(table_format.product.subspaces, table.shape[1])
        return cls(packed, table_format, *_learn_codes(table.detach()[1:].float(), subspaces))

    @classmethod
    def empty(cls, items: int, width: int, table_format: TableFormat) -> QuantizedTable:
        """A table of zeros for N items, to load a state into."""
        packed = empty_packed(items + 1, width, table_format.format, table_format.group_size)
        if table_format.product is None:
            return cls(packed, table_format)
        subspaces = _check_subspaces(table_format.product.subspaces, width)
        codes = torch.zeros(items, subspaces // 2, dtype=torch.uint8)
        return cls(packed, table_format, codes, torch.zeros(subspaces, _CODES, width // subspaces))

    @property
    def weight(self) -> Tensor:
        """The float32 numbers that the stored ones stand for, `[N + 1, D]`; all at once, so read it rarely."""
        return self.rows(0, self.num_embeddings) if self.dense is None else self.dense

    def rows(self, first: int, last: int) -> Tensor:
        """Rows ``first`` to ``last - 1`` in float32."""
        if self.dense is not None:
            return self.dense[first:last]
        return unpack(self._part(slice(first, last)), self.format.format)

    def forward(self, items: Tensor) -> Tensor:
        """Ids of any shape `[...]` -> float32 rows `[..., D]`."""
        if self.dense is not None:
            return F.embedding(items, self.dense)
        flat = unpack(self._part(items.reshape(-1)), self.format.format)
        return flat.view(*items.shape, self.embedding_dim)

    @property
    def kernel_operands(self) -> Packed | None:
        """What `kernels.score_topk` reads without unpacking; None for formats that it has not (int4)."""
        return None if self.format.format == "int4" else Packed(self.values, self.scale)

    @cached_property
    def _longest(self) -> float:
        """The largest Euclidean norm of a row."""
        spans = range(0, self.num_embeddings, DENSE_ITEMS)
        return max(float(self.rows(first, first + DENSE_ITEMS).norm(dim=1).max()) for first in spans)

    def proxy(self, rows: Tensor) -> tuple[Proxy, Callable[[Tensor], Tensor]] | None:
        """Scores of `[B, D]` float32 without unpacking the table, and a bound on what they miss; None: no such path.

        The bound maps a proxy score `[B]` to one that no item with a lower proxy score can exceed. int8: rows are
        rounded to int8 and multiplied as integers; what a row loses by that, times the longest row of the table, bounds
        the error (Cauchy-Schwarz). bf16: the same, and the rounding of the product.
        """
        if rows.device.type != "cpu" or self.format.format not in ("int8", "bf16"):
            return None
        if self.scale is None:
            halves = rows.to(torch.bfloat16)
            lost = (rows - halves.float()).norm(dim=1) * self._longest
            return (
                lambda first, last: (halves @ self.values[first:last].T).float(),
                lambda score: score + _BF16_ROUNDING * score.abs() + lost,
            )
        scale = self.scale
        whole, row_scale = round_rows(rows)
        lost = (rows - whole * row_scale).norm(dim=1) * self._longest
        # The scale of a row changes no order within it, and is left out of the many scores.
        return (
            lambda first, last: torch.mul(int8_matmul(whole, self.values[first:last]), scale[first:last]),
            lambda score: score * row_scale.squeeze(1) + lost,
        )

    def product_candidates(self, rows: Tensor, count: int) -> Tensor:
        """Ids `[B, count]` of likely best items by product quantisation; 0 where FAISS found fewer."""
        count = min(count, self.num_embeddings - 1)
        _, found = self._index.search(np.ascontiguousarray(rows.cpu().numpy()), count)
        return torch.from_numpy(found + 1).to(rows.device)

    @cached_property
    def _index(self) -> Any:
        assert self.codes is not None
        assert self.centroids is not None
        faiss = _faiss()
        subspaces = self.centroids.shape[0]
        index = faiss.IndexPQ(self.embedding_dim, subspaces, CODE_BITS, faiss.METRIC_INNER_PRODUCT)
        faiss.copy_array_to_vector(self.centroids.cpu().numpy().ravel(), index.pq.centroids)
        faiss.copy_array_to_vector(self.codes.cpu().numpy().ravel(), index.codes)
        index.ntotal, index.is_trained = self.num_embeddings - 1, True
        # The same codes in the order that its vector instructions read.
        return faiss.IndexPQFastScan(index)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTable:
        # The index of FAISS cannot be copied; the copy makes its own.
        buffers = [None if value is None else value.clone() for value in (self.codes, self.centroids)]
        packed = Packed(self.values.clone(), None if self.scale is None else self.scale.clone())
        return QuantizedTable(packed, self.format, *buffers).train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format.format}"

    def _part(self, rows: slice | Tensor) -> Packed:
        return Packed(self.values[rows], None if self.scale is None else self.scale[rows])

    def _unpack(self) -> None:
        self.__dict__.pop("_longest", None)
        self.__dict__.pop("_index", None)
        if self.num_embeddings < DENSE_ITEMS and self.format.product is None:
            with torch.inference_mode(False), torch.no_grad():
                self.dense = unpack(self._part(slice(None)), self.format.format)

    def _load_from_state_dict(self, *arguments: object) -> None:
        super()._load_from_state_dict(*arguments)
        self._unpack()


def _check_subspaces(subspaces: int, width: int) -> int:
    if subspaces % 2 or width % subspaces:
        raise ConfigError(f"subspaces is {subspaces}; allowed: even numbers that divide the width, {width}")
    return subspaces


def _learn_codes(rows: Tensor, subspaces: int) -> tuple[Tensor, Tensor]:
    faiss = _faiss()
    if rows.shape[0] < _CODES:
        raise ConfigError(f"{rows.shape[0]} items are fewer than the {_CODES} codes of a subspace; leave product out")
    matrix = np.ascontiguousarray(rows.cpu().numpy())
    quantizer = faiss.ProductQuantizer(rows.shape[1], subspaces, CODE_BITS)
    quantizer.train(matrix)
    codes = torch.from_numpy(quantizer.compute_codes(matrix))
    centroids = torch.from_numpy(faiss.vector_to_array(quantizer.centroids).copy())
    return codes, centroids.view(subspaces, _CODES, rows.shape[1] // subspaces)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise NotSupportedError(
            "product quantisation of the item table needs FAISS: pip install 'adrec[faiss]'"
        ) from None
    return faiss
