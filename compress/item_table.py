"""The item table in fewer bits, and what that does to the lists it gives."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from adrec.config import ProductQuantization, QuantizationConfig, TableFormat, TableFormatName
from adrec.engines import CachedEngine
from adrec.engines.top_k import quantized_top_k
from adrec.errors import ConfigError
from adrec.evaluation import top_overlap
from adrec.models import quantization_of
from adrec.models.item_tables import QuantizedTable
from adrec.models.quantized import sqnr_db
from compress.technique import (
    Change,
    CompressionError,
    Draft,
    Receipt,
    Technique,
    decibels,
    parameter_count,
    stored_bytes,
)

_GROUP = 32
_CUTOFFS = (20, 100)
_USERS_AT_A_TIME = 512


class ItemTableConfig(Technique):
    """Store the item table in int8, fp8 (a scale for each row), int4 (for each group) or bf16; optionally with codes.

    Histories, clean targets and scores all read the stored table. product: codes of product quantisation (FAISS) choose
    candidates, which the stored table scores; for catalogues whose scan takes too long.
    """

    technique: Literal["item_table"] = "item_table"
    format: TableFormatName = "int8"
    group_size: int | None = Field(None, ge=2, description="dimensions that share a scale, int4 only; none: 32")
    product: ProductQuantization | None = None
    recall_users: int = Field(1000, ge=1, description="validation histories that measure recall against float32")

    @model_validator(mode="after")
    def _consistent(self) -> ItemTableConfig:
        if self.group_size is not None and self.format != "int4":
            raise ValueError(f"group_size is {self.group_size}, but only int4 has groups; leave it out")
        return self

    @property
    def table_format(self) -> TableFormat:
        """The format as a run stores it."""
        group = (self.group_size or _GROUP) if self.format == "int4" else None
        return TableFormat(format=self.format, group_size=group, product=self.product)


def apply(draft: Draft, config: ItemTableConfig) -> Receipt:
    """Round the item table of the draft's model.

    The receipt has the table's signal to noise, and the share of the float32 model's 20 and 100 best items that are
    found: for the same representations, so that it is about scoring alone. Raises CompressionError for a table that is
    quantised already, numbers that are not finite, and a group or subspaces that do not divide the width.
    """
    before = draft.model.item_embedding
    if isinstance(before, QuantizedTable):
        raise CompressionError(
            f"the item table is stored in {before.format.format} already; start from the run it was made of"
        )
    table = before.weight.detach()
    try:
        stored = QuantizedTable.of(table, config.table_format)
    except ConfigError as error:
        raise CompressionError(f"item table: {error}") from None
    detail: dict[str, float | int | str] = {"sqnr_db": decibels(sqnr_db(table[1:], stored.weight[1:]))}
    notes: list[str] = []
    if draft.dataset is None:
        notes.append("no data set: recall was not measured")
    else:
        detail |= _recall(draft, config, table, stored)
    if config.product is not None:
        notes.append(
            "candidates come from product codes, so lists may miss items; metrics by rank are of the stored table in"
            " full, and recall is of the lists served"
        )
    if config.format in ("int4", "fp8"):
        notes.append(f"a CPU has no product with {config.format}: rows are unpacked to float32 before scoring")
    model = copy.deepcopy(draft.model)
    model.item_embedding = stored
    present = quantization_of(draft.model)
    layers = {} if present is None else present.layers
    after = config.format if config.product is None else f"{config.format} with {config.product.subspaces} codes"
    receipt = Receipt(
        settings=config.model_dump(mode="json"),
        changed=(Change(what="item_embedding", before="float32", after=after, detail=detail),),
        bytes_before=stored_bytes(draft.model),
        bytes_after=stored_bytes(model),
        parameters_before=parameter_count(draft.model),
        parameters_after=parameter_count(model),
        notes=tuple(notes),
    )
    quantization = QuantizationConfig(layers=layers, table=config.table_format)
    draft.model = model.eval()
    draft.settings = draft.settings.model_copy(update={"quantization": quantization})
    return receipt


@torch.inference_mode()
def _recall(draft: Draft, config: ItemTableConfig, table: Tensor, stored: QuantizedTable) -> dict[str, float]:
    """Share of the best 20 and 100 items by the float32 table that the stored one lists."""
    examples = draft.validation("item_table")
    generator = torch.Generator().manual_seed(draft.seed)
    chosen = torch.randperm(len(examples), generator=generator)[: config.recall_users]
    engine = CachedEngine(draft.model)
    overlaps: dict[int, list[Tensor]] = {k: [] for k in _CUTOFFS if k < table.shape[0]}
    for rows in chosen.split(_USERS_AT_A_TIME):
        users = examples.users[rows]
        represented = engine.represent(
            examples.histories.select(rows), draft.settings.serving, draft.seed, row_keys=users
        )
        for k, found in overlaps.items():
            listed = quantized_top_k(stored, represented, k, None).items
            found.append(top_overlap(listed, engine.top_k(represented, k).items))
    return {f"recall@{k}": round(float(torch.cat(found).mean()), 4) for k, found in overlaps.items()}
