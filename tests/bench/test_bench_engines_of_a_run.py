"""Suite engines on a trained run: real histories, and the accuracy of each path beside its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adrec.data.dataset import Examples
from adrec.engines import Engine, make_engine
from adrec.evaluation import Evaluation, evaluate
from bench.accuracy import estimates
from bench.archive import read_any
from bench.comparing.comparison import compare
from bench.comparing.rows import rows_of
from bench.conversion.pytest_json import pytest_json, records_of
from bench.json_lines import json_line
from bench.kernels import engine_paths
from bench.kernels.catalogues import RandomCatalogue, TrainedCatalogue
from bench.kernels.engine_sweep import Axes, EngineSweep
from bench.kernels.measure import INPUTS, Timer
from bench.kernels.records import BASELINE
from bench.other_kinds import sections_of
from bench.subject import load_subject
from bench.timing import Clock, TimingProtocol


def silent(*progress: object) -> None:
    """Nothing is said of the progress."""


@pytest.fixture
def timer(tiny_protocol: TimingProtocol, counting_clock: Clock) -> Timer:
    return Timer(torch.device("cpu"), tiny_protocol, counting_clock, "adrec bench")


def test_a_run_in_place_of_a_random_model_has_its_accuracy_in_each_row(
    tiny_run: Path, timer: Timer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evaluated: list[tuple[str, object]] = []

    def counting(engine: Engine, examples: Examples, **options: Any) -> Evaluation:
        evaluated.append((engine.name, options["steps"]))
        return evaluate(engine, examples, **options)

    monkeypatch.setattr("bench.accuracy.evaluate", counting)
    subject = load_subject(tiny_run, None, "test", None)
    catalogue, random = TrainedCatalogue(subject), RandomCatalogue(30, 16)
    paths = ("reference", "cached", "sasrec-cached")
    sweep = EngineSweep(timer, Axes(paths, (1, 3), (1, 4), (catalogue, random)))
    rows = list(sweep.rows(silent))
    assert [row.error for row in rows] == [None] * (3 * 2 * 2 * 2)
    # Each count of steps once, whatever the batch sizes and the float32 paths; SASRec+ once.
    assert sorted(evaluated, key=str) == [("cached", 1), ("cached", 4), ("cached", None)]
    for row in rows:
        if row.items == 30:
            assert (row.trained, row.accuracy, row.weights) == (None, None, "")
            continue
        assert row.items == subject.run.config.items
        steps = None if row.path.startswith(BASELINE) else row.steps
        model = subject.baseline.model if row.path.startswith(BASELINE) else subject.run.model
        expected = evaluate(make_engine("cached", model), subject.examples, steps=steps, bootstrap=1000)
        assert row.accuracy is not None
        assert row.accuracy.metrics_percent == estimates(expected)
        assert (row.accuracy.users, row.accuracy.measured_with) == (60, "cached")
        assert (row.accuracy.engine_agreement_fraction, row.accuracy.engine_agreement_users) == (1.0, 60)
        if steps == 4:
            assert row.accuracy.top20_overlap_fraction == 1.0
        run = subject.baseline if row.path.startswith(BASELINE) else subject.run
        assert row.weights == run.fingerprint

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(map(json_line, rows)))
    assert read_any(path) == rows
    assert records_of(pytest_json(rows), "file") == rows
    benchmark = pytest_json(rows)["benchmarks"][1]
    assert benchmark["extra_info"]["accuracy"]["NDCG@20"] == rows[1].accuracy.metrics_percent["NDCG@20"].value
    assert benchmark["extra_info"]["steps"] == "1"
    assert benchmark["extra_info"]["model_fingerprint"] == subject.run.fingerprint
    (section,) = sections_of(rows, 0)
    metric = rows[1].accuracy.metrics_percent["HR@20"]
    assert f"{metric.value:.2f} [{metric.low:.2f}, {metric.high:.2f}]" in section.html
    assert "are of random models, which learned nothing" in section.html
    pairs = compare(rows_of(rows), rows_of(rows), bound=0.05, accuracy_bound=0.01).pairs
    assert sum(pair.accuracy is not None for pair in pairs) == 12


def test_batches_of_a_run_are_as_long_as_its_histories(tiny_run: Path) -> None:
    catalogue = TrainedCatalogue(load_subject(tiny_run, None, "test", None))
    lengths = catalogue.subject.examples.histories.lengths.clamp(max=10).sort().values
    for users in (1, 7, 60, 130):
        batches = [catalogue.histories(users, variant) for variant in range(INPUTS)]
        assert all(torch.equal(each.lengths, batches[0].lengths) for each in batches)
        assert torch.equal(batches[0].values, catalogue.histories(users, 0).values)
        wanted = lengths[((torch.arange(users) + 0.5) / users * 60).long()]
        assert torch.equal(batches[0].lengths.sort().values, wanted)
    assert len({tuple(each.values.tolist()) for each in batches}) == INPUTS


def test_a_compiled_path_is_compared_on_its_own_batch(
    tiny_run: Path, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(engine_paths.COMPILE_OPTIONS, "cpu", {"backend": "aot_eager", "dynamic": False})
    catalogue = TrainedCatalogue(load_subject(tiny_run, None, "test", None))
    for paths in (("cached", "cached-compiled"), ("reference-compiled",)):
        row = [*EngineSweep(timer, Axes(paths, (3,), (2,), (catalogue,))).rows(silent)][-1]
        found = row.accuracy
        assert (row.path, row.error) == (paths[-1], None)
        assert found is not None
        # With `cached`, in which the accuracy was measured, whether or not its time was.
        assert (found.measured_with, found.users) == ("cached", 60)
        assert (found.engine_agreement_fraction, found.engine_agreement_users) == (1.0, 3)
        assert found.engine_top20_overlap_fraction is None


def test_a_run_without_sasrec_and_an_accuracy_that_fails_are_errors_of_their_rows(
    tiny_run: Path, timer: Timer, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = load_subject(tiny_run, None, "test", None)
    subject.baseline = None
    catalogue = TrainedCatalogue(subject)

    def fail(*arguments: object, **options: object) -> Evaluation:
        raise RuntimeError("no")

    monkeypatch.setattr("bench.accuracy.evaluate", fail)
    rows = {
        row.path: row
        for row in EngineSweep(timer, Axes(("cached", "sasrec-cached"), (3,), (2,), (catalogue,))).rows(silent)
    }
    assert (rows["cached"].error, rows["cached"].accuracy) == ("accuracy: RuntimeError: no", None)
    assert rows["cached"].timing is not None
    assert "holds no SASRec+" in str(rows["sasrec-cached"].error)
