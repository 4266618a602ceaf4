"""`adrec compress` and `adrec bench compress` as a user types them, and what they say when something is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from adrec import Recommender
from adrec.checkpoint import load_run
from adrec.cli import build_app
from adrec.engines import ReferenceEngine
from adrec.errors import ConfigError, NotSupportedError, RunError
from bench.archive import read_any
from bench.compression.record import CompressRecord
from compress.api import read_compression
from compress.recipe import read_recipe, shipped_recipes
from compress.technique import CompressionError


def adrec(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(build_app(), [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def recipe(tmp_path: Path, toys: None) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("max_loss: 95%\nstages:\n- technique: scale\n  factor: 4\n- technique: idle\n- serve\n")
    return path


def test_a_recipe_is_followed_and_shown(compressible_run: Path, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = adrec("compress", compressible_run, "--recipe", recipe, "--out", out, "--set", "scale.factor=8")
    for part in ("1 scale", "times 8", "2 idle", "its SQNR would be 3.1 dB", "3 serve", "kept %", "stage 3 of 3"):
        assert part in shown
    assert f"next: adrec evaluate {out}" in shown
    run, teacher = load_run(out), load_run(compressible_run)
    assert torch.equal(run.model.table, 8.0 * teacher.model.table)
    assert adrec("evaluate", out, "--steps", "1").count("adrec") >= 1


def test_a_failing_stage_shows_what_was_done(
    compressible_run: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text("stages: [scale, forget]\n")
    command = ["compress", str(compressible_run), "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    with pytest.raises(CompressionError, match="stage 2 of 2, 'forget': loses"):
        build_app()(command, standalone_mode=False)
    shown = capsys.readouterr().out
    assert "done before the failure; nothing was written" in shown
    assert "1 scale" in shown
    assert not (tmp_path / "out").exists()
    assert CompressionError.exit_code == 3


def test_max_loss_on_the_command_line_counts(compressible_run: Path, recipe: Path, tmp_path: Path) -> None:
    recipe.write_text("max_loss: 95%\nstages: [{technique: forget, keep: 5}]\n")
    adrec("compress", compressible_run, "--recipe", recipe, "--out", tmp_path / "out", "--quiet")
    with pytest.raises(CompressionError, match=r"allowed: 0\.5 % \(max_loss\)"):
        adrec("compress", compressible_run, "--recipe", recipe, "--out", tmp_path / "2", "--max-loss", "0.5 %")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --recipe .* or --budget"),
        (["--recipe", "small", "--budget", "p99<=2ms@batch=1"], "one of them"),
        (["--recipe", "smal"], "did you mean 'small'"),
        (["--budget", "p99<=2ms"], "cannot read 'p99<=2ms'"),
        (["--budget", "p99<=2ms@batch=1", "--set", "steps.steps=2"], "--set changes a recipe"),
        (["--budget", "p99<=2ms@batch=1", "--max-loss", "much"], "--max-loss is 'much'; allowed: 0%"),
        (["--budget", "p99<=2ms@batch=1", "--max-loss", ""], "--max-loss is ''; allowed: 0% to below 100%"),
        (["--recipe", "small", "--max-loss", ""], "--max-loss is ''; allowed: 0% to below 100%"),
        (["--recipe", "small", "--set", "quantize.format=int2"], r"format is 'int2'; allowed: 'int8', .* or 'auto'$"),
        (["--budget", "p99<=2ms@batch=1", "--max-loss", "100%"], "--max-loss is '100%'; allowed"),
        (["--budget", "p99<=2ms@batch=1", "--students", "3"], "--students holds '3'; allowed: 'teacher'"),
        (["--budget", "p99<=2ms@batch=1", "--students", "7+7"], r"'7\+7': .*7 \+ 7 blocks has more than .*: 4 in all"),
        (["--budget", "p99<=2ms@batch=1", "--students", "0+2"], "'0\\+2': encoder_blocks is 0; allowed: greater"),
        (["--budget", "p99<=2ms@batch=1", "--students", ""], "--students holds ''; allowed: 'teacher'"),
        (["--budget", "p99<=2ms@batch=1", "--precisions", "int8 tabel"], "did you mean 'int8 table'"),
        (["--budget", "p99<=2ms@batch=1", "--steps", "9"], "--steps holds 9; allowed: 1 to 4"),
        (["--budget", "p99<=2ms@batch=1", "--engines", "cache"], "did you mean 'cached'"),
    ],
)
def test_bad_options_are_named(compressible_run: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adrec("compress", compressible_run, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_run_and_a_destination_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="adrec compress RUN --recipe NAME --out RUN2"):
        adrec("compress", "--recipe", "small")
    with pytest.raises(RunError, match="not a finished run"):
        adrec("compress", tmp_path / "nothing", "--recipe", "small", "--out", tmp_path / "out")


def test_every_shipped_recipe_reads_and_is_listed() -> None:
    shown = adrec("compress", "--list")
    for name in ("steps", "student", "distill", "quantize", "item_table", *shipped_recipes()):
        assert name in shown
    assert {"small", "fast"} <= set(shipped_recipes())
    for name in shipped_recipes():
        assert read_recipe(name).max_loss == 1.0


def test_the_small_recipe_makes_a_small_run(compressible_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="quantising layers needs torchao")
    out = tmp_path / "small"
    adrec("compress", compressible_run, "--recipe", "small", "--out", out, "--max-loss", "50%", "--quiet")
    made = read_compression(out)
    assert made is not None
    assert [receipt.technique for receipt in made.receipts] == ["steps", "quantize", "item_table"]
    assert made.receipts[-1].bytes_after < made.receipts[0].bytes_before / 2
    run = load_run(out)
    assert run.settings.serving is not None
    assert run.settings.serving.count(4) == 1
    assert len(Recommender.load(out).recommend([[1, 2, 3]], k=5)[0].items) == 5
    # What is quantised already is refused, and the error names the stage.
    with pytest.raises(CompressionError, match=r"stage 2 of 3, 'quantize': .*(already|quantised)"):
        adrec("compress", out, "--recipe", "small", "--out", tmp_path / "twice", "--max-loss", "50%", "--quiet")
    assert not (tmp_path / "twice").exists()


def test_the_fast_recipe_makes_a_network_without_diffusion(compressible_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "fast"
    options = ["--set", "student.optimiser={epochs: 1}", "--max-loss", "90%", "--quiet"]
    adrec("compress", compressible_run, "--recipe", "fast", "--out", out, *options)
    made, run = read_compression(out), load_run(out)
    assert made is not None
    assert made.recipe["stages"][0]["optimiser"]["epochs"] == 1
    assert (run.config.model, run.config.encoder_blocks) == ("sasrec", 2)
    assert run.settings.serving is None
    assert made.receipts[0].parameters_after < made.receipts[0].parameters_before
    assert len(Recommender.load(out).recommend([[1, 2, 3]], k=5)[0].items) == 5


ANY_TIME, NO_TIME = ["--budget", "p50<=1e6ms@batch=4"], ["--budget", "p50<=1us@batch=1"]
SEARCH = ["--max-loss", "60%", "--students", "teacher"]
SEARCH += ["--precisions", "float32,int8 table", "--steps", "1,4", "--seconds", "0.01"]


def test_a_search_chooses_writes_and_resumes(compressible_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        "compress",
        compressible_run,
        "--out",
        out,
        "--budget",
        "p50<=1e6ms@batch=4",
        "--max-loss",
        "60%",
        *SEARCH,
    ]
    shown = adrec(*command, "--quiet")
    for part in ("Pareto front, fast to slow", "chosen: teacher", " measured, ", "serve it with engine 'cached'"):
        assert part in shown
    first = load_run(out)
    lines = (out / "candidates.jsonl").read_text().splitlines()
    last = {json.loads(line)["fingerprint"]: json.loads(line) for line in lines}
    assert len(last) == 4
    measured = [record["detail"] for record in last.values() if record["status"] == "measured"]
    assert measured.count("chosen") == 1
    assert all(measured), "every candidate says why it is not the choice"
    assert "not chosen: teacher" in shown
    assert "chosen: teacher" in adrec(*command)
    assert (out / "candidates.jsonl").read_text().splitlines() == lines
    assert load_run(out).fingerprint == first.fingerprint
    made = read_compression(out)
    assert made is not None
    assert made.engine == "cached"


def test_a_candidate_that_cannot_be_served_is_shown(
    compressible_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(engine: ReferenceEngine, *_: object, **__: object) -> None:
        raise NotSupportedError("no [reference] today")

    monkeypatch.setattr(ReferenceEngine, "represent", refuse)
    out = tmp_path / "out"
    command = ["compress", compressible_run, "--out", out, *ANY_TIME, *SEARCH, "--engines", "cached,reference"]
    shown = adrec(*command, "--quiet")
    assert "failed: teacher, 1 step, float32, reference: batch 4: NotSupportedError: no [reference] today" in shown
    assert "chosen: teacher" in shown
    made = read_compression(out)
    assert made is not None
    assert made.engine == "cached"


def test_an_engine_of_its_own_has_a_receipt(
    compressible_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.compression.session.MEASURED_ALREADY", ("cached",))
    options = [*ANY_TIME, *SEARCH, "--engines", "reference"]
    adrec("compress", compressible_run, "--out", tmp_path / "out", *options, "--quiet")
    made = read_compression(tmp_path / "out")
    assert made is not None
    assert len(made.receipts) == len(made.recipe["stages"]) + 1
    last = made.receipts[-1]
    assert (last.technique, last.changed[0].after) == ("engine", "reference")
    assert last.accuracy is not None
    assert last.accuracy.kept_of_before is not None
    # A model without reverse steps may be served without a single stage.
    command = ["compress", compressible_run / "baseline", "--out", tmp_path / "none", *options]
    with pytest.raises(CompressionError, match="as it is, the run meets the budget"):
        build_app()([str(part) for part in [*command, "--precisions", "float32"]], standalone_mode=False)


def test_a_budget_that_nothing_meets_names_the_nearest(
    compressible_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["compress", compressible_run, "--out", out, *NO_TIME, *SEARCH]
    with pytest.raises(
        CompressionError, match=r"nearest is teacher, .* p50 .* ms at batch 1, .* % beyond p50<=0\.001ms"
    ):
        build_app()([str(part) for part in command], standalone_mode=False)
    assert "too slow" in capsys.readouterr().out
    assert not (out / "run.json").exists()
    assert (out / "candidates.jsonl").exists()


def test_a_search_trains_each_student_once(compressible_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="quantising layers needs torchao")
    out = tmp_path / "out"
    command = ["compress", compressible_run, "--out", out, *ANY_TIME, "--max-loss", "90%"]
    command += ["--students", "teacher,1+1,2+0", "--precisions", "float32,int8", "--steps", "1", "--seconds", "0.01"]
    adrec(*command)
    trained = sorted(path.name for path in (out / "trained").iterdir())
    assert len(trained) == 2
    lines = (out / "candidates.jsonl").read_text().splitlines()
    assert len({json.loads(line)["fingerprint"] for line in lines}) == 6
    again = adrec(*command)
    assert sorted(path.name for path in (out / "trained").iterdir()) == trained
    assert "6 measured" in again or "pruned" in again


def test_compressed_runs_are_held_against_their_teacher(compressible_run: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="quantising layers needs torchao")
    records = tmp_path / "compress.jsonl"
    options = ["--precisions", "float32,int8", "--batch-sizes", "1,4", "--seconds-per-row", "0.01", "--rounds", "2"]
    shown = adrec("bench", "compress", compressible_run, *options, "--out", records)
    rows = [row for row in read_any(records) if isinstance(row, CompressRecord)]
    assert [(row.role, row.steps, row.precision, row.engine) for row in rows] == [
        ("teacher", 4, "float32", "reference"),
        ("baseline", None, "float32", "cached"),
        ("teacher", 4, "float32", "cached"),
        ("teacher", 1, "float32", "cached"),
        ("candidate", 1, "int8", "cached"),
    ]
    assert all(row.error is None for row in rows)
    assert rows[-1].file_bytes is not None
    assert rows[-1].file_bytes < rows[-1].teacher_file_bytes
    assert "throughput / reference, batch 4" in shown
    assert records.with_suffix(".md").read_text() in shown
    assert len(records.with_suffix(".csv").read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split", "tset"], r"--split is 'tset' \(did you mean 'test'"),
        (["--precisions", "int9"], "--precisions holds 'int9'"),
        (["--steps", "5"], "--steps holds 5; allowed: 1 to 4"),
        (["--out", "table.md"], "the tables would replace it"),
        (["--engines", "fast"], "--engines holds 'fast'"),
    ],
)
def test_bad_options_of_the_table_are_named(compressible_run: Path, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adrec("bench", "compress", compressible_run, *options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--recipe", "small", "--precisions", "int4"], "--precisions: of a search, and --recipe makes none"),
        (["--recipe", "small", "--threads", "1", "--exhaustive"], "--threads, --exhaustive: of a search"),
        (["--recipe", "."], "--recipe '.': a folder; give a YAML file or one that comes with adrec: fast, small"),
        (["--recipe", "smal"], r"--recipe 'smal': neither a file nor a recipe .* \(did you mean 'small'\?\)"),
    ],
)
def test_what_no_recipe_reads_is_refused(
    compressible_run: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        adrec("compress", compressible_run, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_runs_of_the_same_data_are_compared(compressible_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(compressible_run, other)
    info = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(info | {"dataset_fingerprint": "f" * 64}))
    with pytest.raises(RunError, match=r"--with .*other: was trained on 'tiny', RUN on 'tiny'; give runs of the same"):
        adrec("bench", "compress", compressible_run, "--with", other)
