"""Settings: what is refused and how it is said, the YAML round trip, and files written whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field, ValidationError

from adrec.config import (
    EarlyStop,
    LayerFormat,
    ModelConfig,
    RunConfig,
    StrictModel,
    TrainConfig,
    load_yaml,
    parse,
)
from adrec.errors import ConfigError
from adrec.files import write_text


def refusal(kind: type[StrictModel], **values: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(kind, values, "config.yaml")
    return str(caught.value)


def test_an_unknown_key_is_named_with_the_nearest_and_all_allowed() -> None:
    message = refusal(ModelConfig, items=5, lambda_uncertanty=0.1)
    assert message.startswith("config.yaml: unknown key 'lambda_uncertanty' (did you mean 'lambda_uncertainty'?)")
    assert "allowed: model, items, width" in message


def test_an_unknown_key_far_from_all_gets_no_suggestion() -> None:
    message = refusal(ModelConfig, items=5, zzz=1)
    assert "unknown key 'zzz'; allowed: " in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"items": 5, "widht": 8}}, "unknown key 'model.widht' (did you mean 'width'?); allowed: model, "),
        (
            {"model": {"items": 5}, "train": {"main": {"learning_rat": 1.0}}},
            "unknown key 'train.main.learning_rat' (did you mean 'learning_rate'?); allowed: learning_rate, ",
        ),
        (
            {"model": {"items": 5}, "train": {"batchsize": 8}},
            "unknown key 'train.batchsize' (did you mean 'batch_size'?); allowed: seed, batch_size",
        ),
        ({"model": {"items": 5}, "trains": {}}, "unknown key 'trains' (did you mean 'train'?)"),
    ],
)
def test_an_unknown_nested_key_is_compared_with_its_own_section(values: dict[str, Any], message: str) -> None:
    assert message in refusal(RunConfig, **values)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"items": 0}, ["items is 0", "greater than or equal to 1"]),
        ({"items": 5, "width": 5000}, ["width is 5000", "less than or equal to 4096"]),
        ({"items": 5, "dropout": 1.0}, ["dropout is 1.0", "less than 1"]),
        ({"items": 5, "lambda_uncertainty": -1e-3}, ["lambda_uncertainty is -0.001", "greater than or equal to 0"]),
        ({"items": 5, "timesteps": 4096}, ["timesteps is 4096", "less than or equal to 4095"]),
        ({"items": 5, "padding": "left"}, ["padding is 'left'", "'released' or 'masked'"]),
        ({"items": 5, "schedule": "quadratic"}, ["schedule is 'quadratic'", "'trunc_lin'"]),
        ({"items": "many"}, ["items is 'many'", "valid integer"]),
        ({"items": True}, ["items is True", "allowed: a number; YAML reads yes"]),
        ({"items": 5, "dropout": False}, ["dropout is False", "allowed: a number"]),
        ({}, ["items is missing"]),
    ],
)
def test_a_wrong_value_is_named_with_its_range(values: dict[str, Any], parts: list[str]) -> None:
    message = refusal(ModelConfig, **values)
    assert all(part in message for part in ["config.yaml: ", *parts]), message


def test_true_and_false_stay_what_switches_take() -> None:
    assert ModelConfig(items=5, geodesic=True, independent_noise=False).geodesic is True


class Either(StrictModel):
    name: Literal["a", "b"] | Literal["c"] | int | None = None
    section: EarlyStop | Literal["never"] | None = None
    formats: dict[str, LayerFormat] = Field(default_factory=dict)
    several: tuple[EarlyStop, ...] = ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "d"}, "name is 'd'; allowed: 'a' or 'b' or 'c' or a valid integer"),
        ({"section": "soon"}, "section is 'soon'; expected a section of settings (key: value lines), or 'never'"),
        ({"section": {"top": 0}}, "section.top is 0; allowed: greater than or equal to 1"),
        ({"section": {"tpo": 1}}, "unknown key 'section.tpo' (did you mean 'top'?); allowed: top, patience"),
        ({"formats": {"a.b": {"formt": "int8"}}}, "unknown key 'formats.a.b.formt' (did you mean 'format'?)"),
        ({"formats": {"a.b": 3}}, "formats.a.b is 3; expected a section of settings"),
        ({"several": [{}, {"patience": 0}]}, "several.1.patience is 0; allowed: greater than or equal to 1"),
    ],
)
def test_what_may_be_one_of_several_kinds_is_one_message(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Either, values, "here")
    lines = str(caught.value).splitlines()
    assert any(line.startswith(f"here: {message}") for line in lines), lines
    assert "literal" not in str(caught.value)
    assert "EarlyStop" not in str(caught.value)


def test_every_wrong_value_is_reported_at_once() -> None:
    lines = refusal(ModelConfig, items=0, width=1, sqeezed=True).splitlines()
    assert len(lines) == 3


@pytest.mark.parametrize(("width", "heads"), [(30, 4), (7, 7), (33, 3)])
def test_width_must_be_an_even_multiple_of_heads(width: int, heads: int) -> None:
    message = refusal(ModelConfig, items=5, width=width, heads=heads)
    assert f"width is {width}; allowed: even multiples of heads ({heads})" in message
    assert parse(ModelConfig, {"items": 5, "width": 6, "heads": 3}, "x").width == 6


def test_guidance_needs_a_model_that_learned_the_unconditional_case() -> None:
    message = refusal(ModelConfig, items=5, guidance_scale=2.0)
    assert "guidance_scale is 2.0 but condition_dropout is 0" in message
    assert "set condition_dropout" in message
    assert ModelConfig(items=5, guidance_scale=2.0, condition_dropout=0.3).guidance_scale == 2.0


def test_settings_are_frozen() -> None:
    config = ModelConfig(items=5)
    with pytest.raises(ValidationError):
        config.items = 6  # type: ignore[misc]


def test_the_architecture_is_the_papers() -> None:
    config = ModelConfig(items=5)
    assert (config.width, config.heads, config.max_length, config.timesteps) == (128, 4, 50, 32)
    assert (config.schedule, config.lambda_uncertainty) == ("trunc_lin", 0.001)
    main = TrainConfig().main
    assert (main.learning_rate, main.weight_decay, main.cosine_epochs) == (1e-3, 1e-5, 500)


def test_the_recipe_restores_the_papers_training() -> None:
    values = load_yaml(Path(__file__).resolve().parents[2] / "bench" / "recipes" / "paper.yaml")
    values["model"]["items"] = 5
    run = parse(RunConfig, values, "recipe")
    train = run.train
    assert train is not None
    assert (run.model.dropout, run.model.embedding_dropout, run.model.positions) == (0.1, 0.3, "none")
    assert (train.batch_size, train.pretrain_positions, train.frozen_decay, train.pcgrad) == (512, "none", True, False)
    for stage in (train.pretrain, train.main):
        assert (stage.average_decay, stage.cosine_epochs, stage.validate_every, stage.patience) == (0.0, 500, 5, 4)


def test_the_stage_one_body_has_no_diffusion() -> None:
    config = ModelConfig(items=5, width=6, heads=3, padding="masked", condition_dropout=0.3, guidance_scale=2.0)
    body = config.baseline(TrainConfig())
    assert (body.model, body.positions, body.items, body.width, body.heads) == ("sasrec", "learned", 5, 6, 3)
    assert (body.padding, body.condition_dropout, body.guidance_scale) == ("masked", 0.0, 1.0)


def test_yaml_round_trip(tmp_path: Path) -> None:
    settings = RunConfig(
        model=ModelConfig(items=7, width=6, heads=3, lambda_uncertainty=1e-5, schedule="pw_lin", geodesic=True),
        train=TrainConfig(seed=3, pcgrad=True, main={"learning_rate": 2e-4, "epochs": 3}),  # type: ignore[arg-type]
    )
    path = tmp_path / "config.yaml"
    write_text(path, yaml.safe_dump(settings.model_dump(mode="json")))
    assert parse(RunConfig, load_yaml(path), str(path)) == settings


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "just text", "", "# nothing", "key: [1, 2", "\t: x"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"settings\.yaml: (holds (list|str)|is empty|cannot be read)"):
        load_yaml(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmodel: {}\nseed: 2\n", "key 'seed' is given a second time in line 3; keep one"),
        ("model:\n  width: 8\n  width: 16\n", "key 'width' is given a second time in line 3; keep one"),
        ("stages:\n- {steps: 2,\n   steps: 4}\n", "key 'steps' is given a second time in line 3; keep one"),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_merged_key_may_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("a: &usual {x: 1, y: 2}\nb: {<<: *usual, x: 3}\nc: {x: 4}\n")
    assert load_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}, "c": {"x": 4}}


def test_a_file_that_is_missing_or_not_text_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read as YAML"):
        load_yaml(tmp_path / "none.yaml")
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read as YAML"):
        load_yaml(path)


def test_yaml_that_would_run_code_is_refused(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]"
    )
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_yaml(path)
    assert not canary.exists()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "notes.txt"
    write_text(path, "first, längs\n")
    assert path.read_text(encoding="utf-8") == "first, längs\n"

    def fails(self: Path, target: Path) -> Path:
        assert self.read_text(encoding="utf-8") == "second"
        assert self.parent == target.parent, "a rename is atomic only inside one file system"
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "second")
    monkeypatch.undo()
    assert path.read_text(encoding="utf-8") == "first, längs\n"
    write_text(path, "third")
    assert path.read_text(encoding="utf-8") == "third"
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]
