"""Recipes: what YAML may say, what is refused in which words, and the recipes that come with adrec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from toy_techniques import TOYS, ForgetConfig, ScaleConfig

from adrec.errors import ConfigError
from compress.recipe import Entry, Recipe, read_recipe, read_stages, register_technique, techniques


@pytest.fixture
def recipe_file(tmp_path: Path, toys: None) -> Any:
    def write(values: Any) -> str:
        (tmp_path / "recipe.yaml").write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return str(tmp_path / "recipe.yaml")

    return write


def test_a_recipe_is_stages_and_a_bound(recipe_file: Any) -> None:
    recipe = read_recipe(recipe_file("max_loss: 2 %\nstages:\n- scale\n- technique: forget\n  keep: 3\n"))
    assert recipe == Recipe(stages=(ScaleConfig(), ForgetConfig(keep=3)), max_loss=2.0)
    assert [recipe.bound(stage) for stage in (ScaleConfig(), ScaleConfig(max_loss=0.5))] == [2.0, 0.5]
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    assert recipe.model_dump()["stages"][1]["keep"] == 3, "settings of subclasses are serialised"


@pytest.mark.parametrize(("text", "value"), [("1%", 1.0), ("1 %", 1.0), (1, 1.0), (0.25, 0.25), ("0", 0.0)])
def test_percentages(toys: None, text: Any, value: float) -> None:
    assert Recipe(stages=["scale"], max_loss=text).max_loss == value


def test_the_bound_is_one_percent_unless_said(toys: None) -> None:
    assert Recipe(stages=["scale"]).max_loss == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": ["scal"]}, r"stage 1: unknown technique 'scal' \(did you mean 'scale'\?\); allowed: scale, idle"),
        ({"stages": ["idle", {"technique": 3}]}, "stage 2: unknown technique 3; allowed"),
        ({"stages": [{"technique": ["scale"]}]}, r"stage 1: unknown technique \['scale'\]"),
        ({"stages": [{"keep": 3}]}, "stage 1 names no technique"),
        ({"stages": [["scale"]]}, r"stage 1 is \['scale'\]; expected settings"),
        ({"stages": [{"technique": "forget", "kep": 3}]}, r"\(forget\): unknown key 'kep' \(did you mean 'keep'"),
        ({"stages": [{"technique": "forget", "keep": -1}]}, r"stage 1 \(forget\): keep is -1; allowed: greater"),
        ({"stages": [{"technique": "scale", "max_loss": "lots"}]}, "a percentage such as 1% or 1.0 is expected"),
        ({"stages": {"technique": "scale"}}, "expected a list of stages"),
        ({"stages": "scale"}, "expected a list of stages"),
        ({"stages": []}, "names no stages; add a list `stages`, `- technique: NAME` each, one of scale, idle"),
        ({"stages": None}, "names no stages; add a list"),
        ({"max_loss": "1%"}, "names no stages; add a list"),
        ({"stages": [None]}, "stage 1 is None; expected settings"),
        ("", r"recipe\.yaml: is empty; expected settings"),
        ("# nothing yet", r"recipe\.yaml: is empty; expected settings"),
        ({"stages": ["scale"], "max_los": 1}, r"unknown key 'max_los' \(did you mean 'max_loss'"),
        ({"stages": ["scale"], "max_loss": True}, "a percentage such as 1% or 1.0 is expected"),
        ({"stages": ["scale"], "max_loss": "100%"}, "less than 100"),
        ("- scale", "expected a mapping"),
        ("stages: [", "cannot be read as YAML"),
    ],
)
def test_what_is_wrong_is_named(recipe_file: Any, values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(recipe_file(values))


def test_assignments_reach_every_stage_of_a_technique(recipe_file: Any) -> None:
    path = recipe_file({"stages": ["forget", "scale", {"technique": "forget", "keep": 1}]})
    recipe = read_recipe(path, ["forget.keep=9", "max_loss=3%", "scale.factor=0.5"])
    assert recipe == Recipe(stages=(ForgetConfig(keep=9), ScaleConfig(factor=0.5), ForgetConfig(keep=9)), max_loss=3.0)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("forgt.keep=9", r"has no stage 'forgt' \(did you mean 'forget'\?\); its stages: forget"),
        ("keep", "expected technique.key=value"),
        ("forget.=9", "expected technique.key=value"),
        ("forget.keep=[", "is not YAML"),
        ("forget.kep=9", r"unknown key 'kep' \(did you mean 'keep'"),
        ("max_lss=9", r"unknown key 'max_lss' \(did you mean 'max_loss'"),
    ],
)
def test_bad_assignments(recipe_file: Any, assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_recipe(recipe_file({"stages": ["forget"]}), [assignment])


def test_a_name_that_is_no_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"--recipe 'smal': .*did you mean 'small'"):
        read_recipe("smal")


def test_own_techniques_are_registered_once(toys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = {name: entry for name, entry in TOYS.items() if name != "forget"}
    monkeypatch.setattr("compress.recipe._registry", lambda: registry)
    register_technique(TOYS["forget"])
    assert "forget" in techniques()
    assert read_stages(["forget"]) == (ForgetConfig(),)
    with pytest.raises(ConfigError, match="'forget' is registered already"):
        register_technique(Entry(ForgetConfig, TOYS["scale"].apply))
