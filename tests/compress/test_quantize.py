"""Quantising layers: what is stored, what is skipped and said, and that the run it becomes loads and serves."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from adrec.checkpoint import load_run, model_fingerprint, save_run
from adrec.config import LayerFormat, RunConfig, TrainConfig
from adrec.data.dataset import Dataset
from adrec.data.jagged import Jagged
from adrec.engines import make_engine
from adrec.errors import AdrecError, NotSupportedError, RunError
from adrec.models import quantization_of
from adrec.models.base import SequenceModel
from adrec.models.quantized import QuantizedLinear, linear_layers, sqnr_db, unpack_int4
from adrec.recommender import Recommender
from compress import Recipe, compress_run, item_table, quantize
from compress.item_table import ItemTableConfig
from compress.quantize import QuantizeConfig
from compress.rounding import finish_training, prepare_training, quantized_linear
from compress.technique import CompressionError, Draft

pytest.importorskip("torchao")
ModelFactory = Callable[..., SequenceModel]
HISTORIES = Jagged.from_lists([[1, 2, 3], [7], [9, 4, 11, 30, 2, 5], [40, 39], [12] * 20])
FORMATS = ["int8", "int8-dynamic", "int4", "fp8", "fp8-dynamic", "bf16"]


def config_of(name: str, **options: object) -> QuantizeConfig:
    group = {"group_size": 8} if name == "int4" else {}
    return QuantizeConfig.model_validate({"format": name, "min_sqnr": 5.0} | group | options)


@pytest.fixture
def model(tiny_model: ModelFactory) -> SequenceModel:
    return tiny_model(timesteps=4, schedule="cosine", max_length=20, lambda_uncertainty=0.5)


@pytest.mark.parametrize("name", FORMATS)
def test_layers_hold_what_torchao_stores(name: str) -> None:
    layer = nn.Linear(16, 24)
    group = 8 if name == "int4" else None
    found = quantized_linear(layer, LayerFormat(format=name, group_size=group))  # type: ignore[arg-type]
    if name == "bf16":
        assert torch.equal(found.weight, layer.weight.bfloat16().float())
        return
    from torchao import quantization as torchao

    configs = {
        "int8": torchao.Int8WeightOnlyConfig(),
        "int8-dynamic": torchao.Int8DynamicActivationInt8WeightConfig(),
        "int4": torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(8)),
        "fp8": torchao.Float8WeightOnlyConfig(),
        "fp8-dynamic": torchao.Float8WeightOnlyConfig(),
    }
    twin = nn.Linear(16, 24)
    twin.load_state_dict(layer.state_dict())
    torchao.quantize_(twin, configs[name])
    values = unpack_int4(found.values) if name == "int4" else found.values
    assert torch.equal(values.float(), twin.weight.qdata.float())  # type: ignore[union-attr, operator]
    torch.testing.assert_close(found.weight, twin.weight.dequantize(), rtol=1e-6, atol=0.0)  # type: ignore[operator]
    # torchao rounds inputs with a scale of max / 127.5, so dynamic layers agree to a step of that.
    rows = torch.randn(9, 16, generator=torch.Generator().manual_seed(0))
    assert sqnr_db(twin(rows), found(rows)) > {"int8-dynamic": 30.0, "fp8-dynamic": 25.0}.get(name, 100.0)


@pytest.mark.parametrize("name", ["int8", "int8-dynamic"])
def test_trained_looking_layers_keep_35_db(name: str) -> None:
    """Columns and rows of very different size, as training makes them."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(128, 384)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(384, 1, generator=generator).exp()).mul_(
            torch.rand(128, generator=generator) + 0.5
        )
    found = quantized_linear(layer, LayerFormat(format=name))  # type: ignore[arg-type]
    rows = torch.randn(200, 128, generator=generator)
    assert sqnr_db(layer.weight, found.weight) > 35.0
    assert sqnr_db(layer(rows), found(rows)) > 35.0


@pytest.mark.parametrize("run", ["beauty-0", "ml-100k-0"])
def test_trained_layers_keep_35_db(run: str) -> None:
    folder = Path(__file__).resolve().parents[2] / "runs" / run
    if not (folder / "run.json").is_file():
        pytest.skip(f"no run '{run}' beside the checkout")
    for name, layer in linear_layers(load_run(folder).model).items():
        assert sqnr_db(layer.weight, quantized_linear(layer, LayerFormat(format="int8")).weight) > 35.0, name


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_run_loads_bit_for_bit_and_engines_agree(
    tmp_path: Path, model: SequenceModel, tiny_dataset: Dataset, name: str
) -> None:
    draft = Draft.of(model, tiny_dataset)
    receipt = quantize.apply(draft, config_of(name))
    assert {change.after for change in receipt.changed} == {name}
    save_run(tmp_path, draft.settings, draft.model, tiny_dataset, "", {})
    loaded = load_run(tmp_path)
    assert loaded.settings == draft.settings
    assert quantization_of(loaded.model) == draft.settings.quantization
    expected, found = draft.model.state_dict(), loaded.model.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key].float(), found[key].float()) for key in expected)
    cached = make_engine("cached", loaded.model).represent(HISTORIES, 4)
    assert torch.equal(cached, make_engine("cached", draft.model).represent(HISTORIES, 4))
    reference = make_engine("reference", loaded.model).represent(HISTORIES, 4)
    if name.endswith("-dynamic"):
        # An input on the edge between two whole numbers may fall either way in two engines.
        assert sqnr_db(reference, cached) > (30.0 if name == "int8-dynamic" else 25.0)
    else:
        torch.testing.assert_close(cached, reference, rtol=0.0, atol=1e-5)
    assert sqnr_db(make_engine("cached", model).represent(HISTORIES, 4), cached) > (10.0 if name == "int4" else 25.0)


def test_int8_weights_and_table_are_a_third_on_disk_and_serve(
    tmp_path: Path, tiny_model: ModelFactory, tiny_dataset: Dataset
) -> None:
    model = tiny_model(width=64, lambda_uncertainty=0.1)
    save_run(tmp_path / "full", RunConfig(model=model.config), model, tiny_dataset, "", {})
    draft = Draft.of(model, tiny_dataset)
    first = quantize.apply(draft, QuantizeConfig())
    second = item_table.apply(draft, ItemTableConfig())
    save_run(tmp_path / "small", draft.settings, draft.model, tiny_dataset, "", {})
    full, small = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "small"))
    assert small <= full / 3
    assert first.bytes_before > first.bytes_after == second.bytes_before > second.bytes_after
    recommendations = [
        Recommender.load(tmp_path / "small", engine).recommend([[3, 4], [10]], 5) for engine in ("cached", "reference")
    ]
    assert [each.items for each in recommendations[0]] == [each.items for each in recommendations[1]]


def test_receipt_names_each_layer_with_its_numbers(model: SequenceModel, tiny_dataset: Dataset) -> None:
    draft = Draft.of(model, tiny_dataset)
    receipt = quantize.apply(draft, QuantizeConfig(calibration_users=7))
    names = list(linear_layers(model))
    assert [change.what for change in receipt.changed] == names
    for change in receipt.changed:
        layer = model.get_submodule(change.what)
        rounded = draft.model.get_submodule(change.what)
        assert isinstance(rounded, QuantizedLinear)
        assert change.detail["sqnr_db"] == pytest.approx(sqnr_db(layer.weight, rounded.weight), abs=0.01)  # type: ignore[arg-type]
        assert float(change.detail["output_sqnr_db"]) > 30.0
    assert any("7 validation histories" in note for note in receipt.notes)


def test_a_layer_without_noise_is_exact(model: SequenceModel, tiny_dataset: Dataset) -> None:
    """Weight decay leaves such layers where a student does not need one."""
    name, layer = next(iter(linear_layers(model).items()))
    with torch.no_grad():
        layer.weight.zero_()
    receipt = quantize.apply(Draft.of(model, tiny_dataset), QuantizeConfig())
    (change,) = (change for change in receipt.changed if change.what == name)
    assert change.detail["sqnr_db"] == change.detail["output_sqnr_db"] == "exact"


def test_a_layer_that_rounding_would_ruin_is_skipped_and_named(model: SequenceModel, tiny_dataset: Dataset) -> None:
    """One huge column that its input never uses leaves nothing of the others in int8."""
    fragile = "denoiser.blocks.0.feed_forward.down"
    layer = model.get_submodule(fragile)
    before = model.get_submodule("denoiser.blocks.0.feed_forward.up")
    with torch.no_grad():
        layer.weight[:, 3] = 1e4  # type: ignore[index]
        before.weight[3] = 0.0  # type: ignore[index]
        before.bias[3] = 0.0  # type: ignore[index]
    draft = Draft.of(model, tiny_dataset)
    receipt = quantize.apply(draft, QuantizeConfig())
    skipped = {skip.what: skip.why for skip in receipt.skipped}
    assert "int8 leaves" in skipped[fragile]
    assert "min_sqnr" in skipped[fragile]
    assert fragile not in {change.what for change in receipt.changed}
    assert type(draft.model.get_submodule(fragile)) is nn.Linear
    assert draft.settings.quantization is not None
    assert fragile not in draft.settings.quantization.layers
    assert len(receipt.changed) + 1 == len(linear_layers(model))


def test_a_layer_too_coarse_in_int4_falls_back_to_int8(model: SequenceModel, tiny_dataset: Dataset) -> None:
    plain = quantize.apply(Draft.of(model, tiny_dataset), config_of("int4", min_sqnr=-100.0))
    left = {change.what: float(change.detail["output_sqnr_db"]) for change in plain.changed}
    middle = sorted(left.values())[len(left) // 2 - 1 : len(left) // 2 + 1]
    bound = sum(middle) / 2.0
    draft = Draft.of(model, tiny_dataset)
    receipt = quantize.apply(draft, config_of("int4", min_sqnr=bound, fallback="int8"))
    after = {change.what: change.after for change in receipt.changed}
    assert after == {name: "int4" if found >= bound else "int8" for name, found in left.items()}
    assert set(after.values()) == {"int4", "int8"}
    for change in receipt.changed:
        kept = draft.model.get_submodule(change.what)
        assert isinstance(kept, QuantizedLinear)
        assert kept.format.format == change.after
        if change.after == "int8":
            assert change.detail["output_sqnr_db in int4"] == left[change.what]
    assert [skip.what for skip in receipt.skipped] == ["norms, biases, positions"]
    # Where neither will do, both reasons are given.
    refused = quantize.apply(Draft.of(model, tiny_dataset), config_of("int4", min_sqnr=1000.0, fallback="int8"))
    assert refused.changed == ()
    assert [refused.skipped[0].why.count(name) for name in ("int4 leaves", "int8 leaves")] == [1, 1]


def test_nothing_is_changed_where_every_layer_is_skipped(model: SequenceModel, tiny_dataset: Dataset) -> None:
    draft = Draft.of(model, tiny_dataset)
    settings = draft.settings
    receipt = quantize.apply(draft, QuantizeConfig(min_sqnr=1000.0))
    assert receipt.changed == ()
    assert draft.model is model
    assert draft.settings is settings
    assert receipt.bytes_before == receipt.bytes_after


def test_without_data_nothing_is_measured_and_the_receipt_says_so(model: SequenceModel) -> None:
    receipt = quantize.apply(Draft.of(model), QuantizeConfig(min_sqnr=1000.0))
    assert len(receipt.changed) == len(linear_layers(model))
    assert any("none was skipped" in note for note in receipt.notes)


@pytest.mark.parametrize(
    ("users", "bf16", "vnni", "expected"),
    [
        (512, True, True, "int8, computed in bfloat16"),
        (512, False, True, "int8-dynamic"),
        (512, False, False, "int8"),
        (127, True, True, "int8"),
    ],
)
def test_auto_leaves_float32_only_where_that_pays(
    model: SequenceModel, monkeypatch: pytest.MonkeyPatch, users: int, bf16: bool, vnni: bool, expected: str
) -> None:
    monkeypatch.setattr(quantize, "has_bf16", lambda: bf16)
    monkeypatch.setattr(quantize, "has_vnni", lambda: vnni)
    receipt = quantize.apply(Draft.of(model), QuantizeConfig(format="auto", users=users))
    found = {change.what: change.after for change in receipt.changed}
    assert found.pop("time_embedding.up") == "int8"
    assert found.pop("time_embedding.down") == "int8"
    assert set(found.values()) == {expected}
    assert any(f"auto chose by {users} users" in note for note in receipt.notes)


@pytest.mark.parametrize("first", [QuantizeConfig(), QuantizeConfig(format="bf16")])
def test_quantised_layers_are_not_quantised_again(model: SequenceModel, first: QuantizeConfig) -> None:
    draft = Draft.of(model)
    quantize.apply(draft, first)
    with pytest.raises(CompressionError, match=r"18 quantised layers already; start from the run it was made of"):
        quantize.apply(draft, QuantizeConfig())


def test_a_group_that_divides_nothing_names_the_layer(model: SequenceModel) -> None:
    draft = Draft.of(model)
    with pytest.raises(CompressionError, match=r"layer encoder\.blocks\.0\.attention\.qkv: group_size is 12; allowed"):
        quantize.apply(draft, QuantizeConfig(format="int4", group_size=12))
    assert draft.model is model


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": "int2"}, "'int8', 'int8-dynamic', 'int4', 'fp8', 'bf16' or 'auto'|Input should be"),
        ({"format": "int8", "group_size": 8}, "only int4 has groups"),
        ({"format": "auto"}, "auto needs users"),
        ({"format": "int8-dynamic", "fallback": "int8"}, "fallback is int8, which is what 'int8-dynamic' stores"),
        ({"format": "int8-dynamic", "compute": "bfloat16"}, "says itself how it computes"),
        ({"format": "fp8-dynamic", "compute": "bfloat16"}, "says itself how it computes"),
    ],
)
def test_bad_settings_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantizeConfig.model_validate(values)


def test_weights_that_are_not_finite_are_refused(model: SequenceModel) -> None:
    with torch.no_grad():
        model.get_submodule("encoder.blocks.1.attention.output").weight[0, 0] = float("inf")  # type: ignore[index]
    with pytest.raises(
        CompressionError, match=r"encoder\.blocks\.1\.attention\.output: holds weights that are not finite"
    ):
        quantize.apply(Draft.of(model), QuantizeConfig())


def test_torchao_that_is_missing_is_named(model: SequenceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(NotSupportedError, match=r"pip install 'adrec\[quantize\]'"):
        quantize.apply(Draft.of(model), QuantizeConfig())
    quantize.apply(Draft.of(model), QuantizeConfig(format="bf16"))


def test_settings_that_hide_the_formats_are_not_saved(
    tmp_path: Path, model: SequenceModel, tiny_dataset: Dataset
) -> None:
    draft = Draft.of(model)
    quantize.apply(draft, QuantizeConfig())
    with pytest.raises(RunError, match="pass settings"):
        save_run(tmp_path / "run", RunConfig(model=model.config), draft.model, tiny_dataset, "", {})
    assert not (tmp_path / "run").exists()


def test_stored_numbers_of_another_dtype_are_refused(
    tmp_path: Path, model: SequenceModel, tiny_dataset: Dataset
) -> None:
    draft = Draft.of(model)
    quantize.apply(draft, QuantizeConfig())
    save_run(tmp_path, draft.settings, draft.model, tiny_dataset, "", {})
    state = load_file(tmp_path / "model.safetensors")
    key = "encoder.blocks.0.attention.qkv.values"
    state[key] = state[key].float()
    save_file(state, tmp_path / "model.safetensors")
    text = (tmp_path / "run.json").read_text()
    old = load_run_fingerprint(text)
    (tmp_path / "run.json").write_text(text.replace(old, model_fingerprint(state)))
    with pytest.raises(RunError, match=rf"{key} is torch\.float32; expected torch\.int8"):
        load_run(tmp_path)


def load_run_fingerprint(text: str) -> str:
    import json

    return str(json.loads(text)["model_fingerprint"])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_layers_in_training_multiply_by_what_will_be_stored(model: SequenceModel, name: str) -> None:
    layer_format = LayerFormat(format=name, group_size=8 if name == "int4" else None)  # type: ignore[arg-type]
    names = ["encoder.blocks.0.attention.qkv", "time_embedding.up"]
    rows = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    stored = quantized_linear(linear_layers(model)[names[0]], layer_format)
    prepare_training(model, names, layer_format)
    layer = model.get_submodule(names[0])
    torch.testing.assert_close(layer(rows), stored(rows), rtol=1e-4, atol=1e-5)
    layer(rows).sum().backward()
    # Straight through: the gradient of the weights is that of a linear layer, and none for what a range cuts off,
    # which can only be the largest of a scale's numbers.
    gradient, weight = layer.weight.grad, layer.weight.detach()
    assert isinstance(gradient, torch.Tensor)
    cut = gradient == 0.0
    torch.testing.assert_close(gradient[~cut], rows.sum(0).expand(48, 16)[~cut], rtol=1e-4, atol=1e-5)
    peaks = weight.unflatten(1, (-1, layer_format.group_size or 16)).amax(2, keepdim=True)
    assert bool((weight.unflatten(1, (peaks.shape[1], -1)) == peaks).flatten(1)[cut].all())
    finish_training(model, names)
    assert type(model.get_submodule(names[0])) is nn.Linear


def test_fine_tuning_trains_for_the_rounded_layers(tiny_model: ModelFactory, tiny_dataset: Dataset) -> None:
    model = tiny_model(timesteps=4, schedule="cosine", max_length=20, dropout=0.0, embedding_dropout=0.0)
    run = RunConfig(model=model.config, train=TrainConfig(batch_size=4))
    draft = Draft.of(model, tiny_dataset, settings=run)
    config = config_of("int4", fine_tune_epochs=3, fine_tune_learning_rate=5e-3)
    before = draft.accuracy().metrics["NDCG@20"].value
    receipt = quantize.apply(draft, config)
    assert any(note.startswith("fine-tuned for 3 epochs") for note in receipt.notes)
    trained = draft.model.item_embedding.weight
    assert not torch.equal(trained, model.item_embedding.weight)
    assert bool((trained[0] == 0.0).all())
    assert draft.settings.quantization is not None
    assert set(draft.settings.quantization.layers) == set(linear_layers(model))
    assert draft.accuracy().metrics["NDCG@20"].value > before + 10.0


@pytest.mark.parametrize("name", ["fp8", "fp8-dynamic", "bf16"])
def test_only_integers_can_be_trained_for(model: SequenceModel, tiny_dataset: Dataset, name: str) -> None:
    with pytest.raises(CompressionError, match="cannot be trained for; allowed: int8, int8-dynamic, int4"):
        quantize.apply(Draft.of(model, tiny_dataset), config_of(name, fine_tune_epochs=1))


def test_fine_tuning_comes_before_the_table(model: SequenceModel, tiny_dataset: Dataset) -> None:
    draft = Draft.of(model, tiny_dataset)
    item_table.apply(draft, ItemTableConfig())
    with pytest.raises(AdrecError, match="fine-tune before the stage 'item_table'"):
        quantize.apply(draft, QuantizeConfig(fine_tune_epochs=1))


def test_a_recipe_of_layers_and_table_makes_a_run_that_serves(tmp_path: Path, compressible_run: Path) -> None:
    recipe = Recipe.model_validate({"stages": ["quantize", "item_table"], "max_loss": "50%"})
    made = compress_run(compressible_run, recipe, tmp_path / "small")
    assert [receipt.technique for receipt in made.receipts] == ["quantize", "item_table"]
    assert all(receipt.accuracy is not None for receipt in made.receipts)
    found = Recommender.load(tmp_path / "small").recommend([[1, 2]], 5)
    assert len(found[0].items) == 5
    with pytest.raises(CompressionError, match=r"stage 1 of 2, 'quantize': the model has 18 quantised layers already"):
        compress_run(tmp_path / "small", recipe, tmp_path / "smaller")
