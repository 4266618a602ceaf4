"""Quantising the item table: receipts by value, accuracy of what is served, and runs that load."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from adrec.checkpoint import load_run, save_run
from adrec.data.dataset import Dataset
from adrec.data.jagged import Jagged
from adrec.engines import make_engine
from adrec.evaluation import evaluate, top_overlap
from adrec.models.base import SequenceModel
from adrec.models.item_tables import QuantizedTable
from adrec.models.quantized import sqnr_db
from compress import item_table, quantize
from compress.item_table import ItemTableConfig
from compress.quantize import QuantizeConfig
from compress.technique import CompressionError, Draft

ModelFactory = Callable[..., SequenceModel]
FORMATS = ["int8", "int4", "fp8", "bf16"]
HISTORIES = Jagged.from_lists([[1, 2, 3], [7], [9, 4, 11, 30, 2, 5], [40, 39]])


def config_of(name: str, **options: object) -> ItemTableConfig:
    group = {"group_size": 4} if name == "int4" else {}
    return ItemTableConfig.model_validate({"format": name} | group | options)


@pytest.fixture
def model(tiny_model: ModelFactory) -> SequenceModel:
    return tiny_model(timesteps=4, schedule="cosine", max_length=20, lambda_uncertainty=0.5)


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_loads_bit_for_bit_and_every_reader_sees_one_table(
    tmp_path: Path, model: SequenceModel, tiny_dataset: Dataset, name: str
) -> None:
    draft = Draft.of(model, tiny_dataset)
    item_table.apply(draft, config_of(name))
    save_run(tmp_path, draft.settings, draft.model, tiny_dataset, "", {})
    loaded = load_run(tmp_path).model
    stored = loaded.item_embedding
    assert isinstance(stored, QuantizedTable)
    assert torch.equal(loaded.table, draft.model.table)
    assert bool((loaded.table[0] == 0.0).all())
    ids = torch.tensor([0, 5, 40])
    assert torch.equal(loaded.clean_target(ids), loaded.table[ids])  # type: ignore[operator]
    cached, reference = make_engine("cached", loaded), make_engine("reference", loaded)
    torch.testing.assert_close(cached.represent(HISTORIES, 4), reference.represent(HISTORIES, 4), rtol=0.0, atol=1e-5)
    # A float32 model that holds the same numbers is the same function.
    twin = Draft.of(model).teacher
    with torch.no_grad():
        twin.item_embedding.weight.copy_(loaded.table)
    torch.testing.assert_close(
        cached.represent(HISTORIES, 4), make_engine("cached", twin).represent(HISTORIES, 4), rtol=0.0, atol=1e-6
    )
    rows = cached.represent(HISTORIES, 4)
    torch.testing.assert_close(cached.score(rows), rows @ loaded.table.T)
    assert torch.equal(cached.top_k(rows, 7).items, make_engine("cached", twin).top_k(rows, 7).items)


@pytest.mark.parametrize("name", FORMATS)
def test_receipt_by_value(model: SequenceModel, tiny_dataset: Dataset, name: str) -> None:
    draft = Draft.of(model, tiny_dataset)
    receipt = item_table.apply(draft, config_of(name, recall_users=60))
    (change,) = receipt.changed
    assert change.detail["sqnr_db"] == pytest.approx(sqnr_db(model.table[1:], draft.model.table[1:]), abs=0.01)
    examples = tiny_dataset.examples("validation")
    exact = make_engine("cached", model)
    rows = exact.represent(examples.histories, None, 0, row_keys=examples.users)
    scores = rows @ draft.model.table[1:].T
    lists = scores.topk(20, 1).indices + 1
    expected = float(top_overlap(lists, exact.top_k(rows, 20).items).mean())
    assert change.detail["recall@20"] == pytest.approx(expected, abs=1e-3)
    assert "recall@100" not in change.detail, "there are 40 items"
    table_bytes = {"int8": 41 * 16 + 41 * 4, "int4": 41 * 8 + 41 * 16, "fp8": 41 * 20, "bf16": 41 * 32}[name]
    assert receipt.bytes_before - receipt.bytes_after == 41 * 64 - table_bytes
    assert any("unpacked to float32" in note for note in receipt.notes) == (name in ("int4", "fp8"))


def test_accuracy_is_that_of_the_stored_table(model: SequenceModel, tiny_dataset: Dataset) -> None:
    """One item's row is so small beside its largest number that int8 loses it: its rank must change accordingly."""
    with torch.no_grad():
        model.item_embedding.weight[1:, 0] *= 300.0
    draft = Draft.of(model, tiny_dataset)
    item_table.apply(draft, ItemTableConfig())
    found = evaluate(make_engine("cached", draft.model), tiny_dataset.examples("validation"), bootstrap=1)
    twin = Draft.of(model).teacher
    with torch.no_grad():
        twin.item_embedding.weight.copy_(draft.model.table)
    expected = evaluate(make_engine("cached", twin), tiny_dataset.examples("validation"), bootstrap=1)
    assert torch.equal(found.ranks, expected.ranks)
    assert torch.equal(found.top_items, expected.top_items)


def test_without_data_recall_is_not_measured_and_the_receipt_says_so(model: SequenceModel) -> None:
    receipt = item_table.apply(Draft.of(model), ItemTableConfig())
    assert set(receipt.changed[0].detail) == {"sqnr_db"}
    assert receipt.notes == ("no data set: recall was not measured",)


def test_the_table_is_not_quantised_again(model: SequenceModel) -> None:
    draft = Draft.of(model)
    item_table.apply(draft, ItemTableConfig(format="bf16"))
    with pytest.raises(CompressionError, match="stored in bf16 already; start from the run it was made of"):
        item_table.apply(draft, ItemTableConfig())


def test_layers_and_table_in_either_order(model: SequenceModel) -> None:
    pytest.importorskip("torchao")
    first, second = Draft.of(model), Draft.of(model)
    quantize.apply(first, QuantizeConfig())
    item_table.apply(first, ItemTableConfig())
    item_table.apply(second, ItemTableConfig())
    quantize.apply(second, QuantizeConfig())
    assert first.settings == second.settings
    one, other = first.model.state_dict(), second.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_product_codes_are_stored_and_served(tmp_path: Path, model: SequenceModel, tiny_dataset: Dataset) -> None:
    pytest.importorskip("faiss")
    draft = Draft.of(model, tiny_dataset)
    receipt = item_table.apply(draft, config_of("int8", product={"subspaces": 8, "candidates": 3}))
    assert receipt.changed[0].after == "int8 with 8 codes"
    assert float(receipt.changed[0].detail["recall@20"]) > 0.9
    assert any("lists may miss items" in note for note in receipt.notes)
    save_run(tmp_path, draft.settings, draft.model, tiny_dataset, "", {})
    engine = make_engine("cached", load_run(tmp_path).model)
    found = engine.recommend(HISTORIES, 5, 1)
    assert torch.equal(found.items, make_engine("cached", draft.model).recommend(HISTORIES, 5, 1).items)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ItemTableConfig(format="int4"), "item table: group_size is 32; allowed: what divides 16"),
        (ItemTableConfig.model_validate({"product": {"subspaces": 5}}), "item table: subspaces is 5"),
    ],
)
def test_formats_that_do_not_fit_are_refused(model: SequenceModel, config: ItemTableConfig, message: str) -> None:
    draft = Draft.of(model)
    with pytest.raises(CompressionError, match=message):
        item_table.apply(draft, config)
    assert draft.model is model


@pytest.mark.parametrize(
    ("values", "message"), [({"format": "int3"}, "Input should be"), ({"group_size": 4}, "only int4 has groups")]
)
def test_bad_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ItemTableConfig.model_validate(values)
