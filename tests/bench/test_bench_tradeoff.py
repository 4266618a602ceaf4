"""The sweep on a tiny real run: every row has both sides, failures stay in their row, files are whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from adrec.engines import ENGINES, CachedEngine
from adrec.engines.base import Sampled
from adrec.errors import AdrecError, NotSupportedError, RunError
from adrec.evaluation import evaluate
from bench.cli import register
from bench.record import TradeoffRecord, read_records
from bench.subject import draw_batches, load_subject
from bench.timing import TimingProtocol
from bench.tradeoff import run_tradeoff


class BreaksAtTwo(CachedEngine):
    """An engine that refuses two steps."""

    name = "breaks"

    def represent(self, histories: Any, steps: int | None = None, *rest: Any, **more: Any) -> torch.Tensor:
        if steps == 2:
            raise RuntimeError("two steps are too many")
        return super().represent(histories, steps, *rest, **more)


class Coarse(CachedEngine):
    """An engine whose results are rounded until they say little."""

    name = "coarse"
    dtype = torch.float16

    def generate(self, *arguments: Any, **more: Any) -> Sampled:
        found = super().generate(*arguments, **more)
        return replace(found, rows=found.rows.sign())


def test_an_engine_that_rounds_has_its_own_accuracy(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENGINES, Coarse.name, Coarse)
    rows = run_tradeoff(
        tiny_run, engines=["cached", Coarse.name], steps=[1], batch_sizes=[8], out=tmp_path / "rows.jsonl",
        protocol=TimingProtocol(seconds=0.01, rounds=3, rounds_slow=3), quiet=True,
    ).records  # fmt: skip
    found = {(row.engine, row.steps): row.accuracy for row in rows if row.model == "adrec"}
    subject = load_subject(tiny_run, None, "test", None)
    alone = evaluate(Coarse(subject.run.model.eval()), subject.examples, steps=1, seed=0)
    exact, coarse = found["cached", 4], found[Coarse.name, 1]
    assert exact is not None
    assert coarse is not None
    assert coarse.metrics_percent["NDCG@20"].value == alone.metrics["NDCG@20"].value
    assert coarse.metrics_percent["NDCG@20"].value < exact.metrics_percent["NDCG@20"].value
    assert coarse.ndcg20_kept_percent is not None
    assert coarse.ndcg20_kept_percent.value < 100
    assert (coarse.measured_with, coarse.engine_agreement_fraction) == (Coarse.name, None)
    assert coarse.top20_overlap_fraction == coarse.engine_top20_overlap_fraction
    assert coarse.engine_top20_overlap_users == coarse.users == 60


def test_every_latency_row_carries_its_accuracy(tiny_records: list[TradeoffRecord]) -> None:
    cells = [(row.model, row.engine, row.steps, row.batch_size_users) for row in tiny_records]
    assert cells[0] == ("popularity", None, None, None)
    assert len(cells) == len(set(cells)) == 1 + 2 * (2 * 2 + 2)
    assert all(row.error is None and row.accuracy is not None for row in tiny_records)
    assert all(row.timing is not None for row in tiny_records[1:])
    assert tiny_records[0].timing is None


def test_exact_rows_are_the_reference_of_all_others(tiny_records: list[TradeoffRecord]) -> None:
    for row in tiny_records:
        assert row.accuracy is not None
        assert row.accuracy.users == 60
        if row.steps == row.exact_steps:
            assert row.accuracy.top20_overlap_fraction == 1.0
            kept = row.accuracy.ndcg20_kept_percent
            assert kept is not None
            assert (kept.low, kept.high) == pytest.approx((100.0, 100.0))
        assert row.accuracy.engine_top20_overlap_users == (60 if row.engine else 0)
        if row.engine is not None:
            assert row.accuracy.engine_top20_overlap_fraction == pytest.approx(
                row.accuracy.top20_overlap_fraction, abs=0.02
            )
        if row.engine == "reference":
            assert row.timing is not None
            assert row.accuracy.measured_with == "cached"
            assert row.accuracy.engine_agreement_fraction == pytest.approx(1.0, abs=0.02)
            assert row.accuracy.engine_agreement_users == 60
            if row.steps == row.exact_steps:
                ratio = row.timing.time_ratio_to_baseline
                assert ratio is not None
                assert (ratio.value, ratio.low, ratio.high) == (1.0, 1.0, 1.0)


def test_batches_are_real_histories_and_repeatable(tiny_run: Path) -> None:
    histories = load_subject(tiny_run, None, "test", None).examples.histories
    first, again = draw_batches(histories, 8), draw_batches(histories, 8)
    assert all(torch.equal(one.values, other.values) for one, other in zip(first, again, strict=True))
    known = {tuple(histories[row].tolist()) for row in range(len(histories))}
    assert {tuple(batch[row].tolist()) for batch in first for row in range(8)} <= known
    assert [len(draw_batches(histories, size)) for size in (1, 32, 4096)] == [256, 128, 8]


def test_a_failing_cell_keeps_its_error_and_the_sweep_goes_on(
    tiny_run: Path, tiny_protocol: TimingProtocol, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(ENGINES, "breaks", BreaksAtTwo)
    out = tmp_path / "rows.jsonl"
    result = run_tradeoff(
        tiny_run, engines=["cached", "breaks"], steps=[1, 2], batch_sizes=[4], protocol=tiny_protocol,
        out=out, quiet=True, users=20,
    )  # fmt: skip
    assert [(row.engine, row.steps) for row in result.failed] == [("breaks", 2)]
    assert "RuntimeError: two steps are too many" in str(result.failed[0].error)
    assert result.failed[0].timing is None
    assert read_records(out) == result.records
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert any("20 of 60 users" in notice for notice in result.notices)


def test_an_interrupted_sweep_keeps_what_it_measured(
    tiny_run: Path, tiny_protocol: TimingProtocol, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(*arguments: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.cells.GroupTimer.measure", stop)
    out = tmp_path / "rows.jsonl"
    out.write_text("the earlier sweep\n")
    with pytest.raises(KeyboardInterrupt):
        run_tradeoff(tiny_run, steps=[1], protocol=tiny_protocol, out=out, quiet=True)
    assert out.read_text() == "the earlier sweep\n"
    assert [row.model for row in read_records(tmp_path / "rows.jsonl.partial")] == ["popularity"]


def test_bad_input_is_refused_before_measuring(tiny_run: Path, tmp_path: Path) -> None:
    for wrong, message in (
        ({"device": "warp"}, "device is 'warp'; allowed: cpu, cuda"),
        ({"threads": 0}, "--threads 0; allowed: 1 to "),
        ({"threads": 100_000}, "--threads 100000; allowed: 1 to "),
        ({"users": 0}, "--users 0"),
        ({"protocol": TimingProtocol(seconds=0.0)}, "--seconds-per-cell 0.0"),
        ({"protocol": TimingProtocol(seconds=float("nan"))}, "--seconds-per-cell nan"),
        ({"protocol": TimingProtocol(seconds=float("inf"))}, "--seconds-per-cell inf"),
        ({"out": tmp_path}, "--out is .*: a folder"),
        ({"steps": [5]}, "allowed are 1 to 4"),
    ):
        with pytest.raises(AdrecError, match=message):
            run_tradeoff(tiny_run, quiet=True, **wrong)  # type: ignore[arg-type]
    with pytest.raises(NotSupportedError, match="no steps to trade"):
        run_tradeoff(tiny_run / "baseline", quiet=True)
    with pytest.raises(RunError):
        run_tradeoff(tmp_path, quiet=True)


def test_data_that_moved_or_differs(tiny_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(tiny_run, copy)
    info = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps(info | {"data_path": str(tmp_path / "gone")}))
    with pytest.raises(RunError, match="--data"):
        load_subject(copy, None, "test", None)
    data = tiny_run.parent / "data"
    assert load_subject(copy, data, "test", None).notices == []
    (copy / "run.json").write_text(json.dumps(info | {"dataset_fingerprint": "0" * 64}))
    with pytest.raises(RunError, match=r"is not that of the run's data set 'tiny'.*item ids would not match"):
        load_subject(copy, data, "test", None)


def _app() -> typer.Typer:
    app = typer.Typer()
    register(app)
    app.command("other")(lambda: None)
    return app


def _invoke(*arguments: str) -> Any:
    return CliRunner().invoke(_app(), ["bench", *arguments])


def test_command_line_measures_and_reports(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path / "rows.jsonl")
    monkeypatch.setitem(ENGINES, "breaks", BreaksAtTwo)
    shared = [
        "--batch-sizes",
        "2",
        "--seconds-per-cell",
        "0.000001",
        "--users",
        "20",
        "--quiet",
        "--out",
        out,
    ]
    done = _invoke("tradeoff", str(tiny_run), "--steps", "1,4", "--engines", "cached", *shared)
    assert done.exit_code == 0, done.output
    failed = _invoke("tradeoff", str(tiny_run), "--steps", "2,4", "--engines", "cached,breaks", "--append", *shared)
    assert failed.exit_code == 1
    assert len(read_records(Path(out))) == 4 + 7
    report = _invoke("report", out, "--out", str(tmp_path / "page"))
    assert report.exit_code == 0, report.output
    assert (tmp_path / "page" / "report.html").is_file()


@pytest.mark.parametrize(("option", "text"), [("--steps", "1,x"), ("--batch-sizes", "0"), ("--seeds", "-1")])
def test_command_line_refuses_lists(tiny_run: Path, option: str, text: str) -> None:
    with pytest.raises(AdrecError, match=option):
        CliRunner().invoke(_app(), ["bench", "tradeoff", str(tiny_run), option, text], catch_exceptions=False)


def test_command_line_describes_the_machine() -> None:
    assert json.loads(_invoke("env", "--json").output)["machine"]["threads"] == torch.get_num_threads()
    assert "versions torch" in _invoke("env").output
