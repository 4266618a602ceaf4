"""RecBole's SASRec beside a run: rows, files and errors with a stand-in for its process, and RecBole where it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from adrec.data.dataset import Dataset
from adrec.errors import ConfigError, DataError, NotSupportedError
from adrec.evaluation import interval_table
from adrec.evaluation.metrics import target_ranks
from bench.archive import read_any
from bench.charts import accuracy_against_latency
from bench.cli import register
from bench.guest import settled
from bench.record import TradeoffRecord
from bench.rivals import PYTHON_VARIABLE, recbole_child, recbole_sasrec
from bench.rivals.child import Child, ChildError
from bench.rivals.recbole_sasrec import RecBoleSasrec, interpreter, start, write_files
from bench.rivals.sweep import recbole_sweep
from bench.running.runner import select
from bench.running.unit import Context
from bench.subject import Subject, load_subject
from bench.timing import Clock, TimingProtocol

RECORD = Path(__file__).parents[2] / "bench" / "records" / "recbole-beauty-cpu-avx2.jsonl"
STAND_IN = """
import json, pathlib, sys

log = open("requests.jsonl", "w")
for line in sys.stdin:
    request = json.loads(line)
    do = request["do"]
    log.write(json.dumps(request) + "\\n")
    log.flush()
    if do == "versions":
        answer = {"versions": {"recbole": "9.9"}}
    elif do == "train":
        names = sorted(path.name for path in pathlib.Path(request["folder"], "rival").iterdir())
        assert names == ["rival.item", "rival.train.inter", "rival.validation.inter"]
        print(json.dumps({"progress": {"epoch": 1, "of": 2, "ndcg20_percent": 1.5}}))
        answer = {"epochs": 1, "most": 300, "fingerprint": "f" * 64}
    elif do == "rank":
        users = len(request["targets"])
        answer = {"ranks": list(range(users)), "top_items": [list(range(1, request["count"] + 1))] * users}
    elif do == "time":
        answer = {"ms": [2.0]}
    else:
        answer = {}
    print(json.dumps(answer), flush=True)
"""


class Seen:
    """A progress that keeps the names of the stages."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def update(self, stage: str, done_seconds: float, expected_seconds: float) -> None:
        self.stages.append(stage)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a script that knows the protocol, and no recommender, in the place of RecBole's."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(recbole_sasrec, "SCRIPT", script)
    return script


@pytest.fixture
def subject(tiny_run: Path) -> Subject:
    return load_subject(tiny_run, None, "test", None)


@pytest.fixture
def child(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Child]:
    """A process of the script that the test gives as parameter."""
    script = tmp_path / "child.py"
    script.write_text(request.param)
    with Child(sys.executable, script, "Rival") as found:
        yield found


def application() -> typer.Typer:
    app = typer.Typer()
    register(app)
    return app


@pytest.mark.usefixtures("stand_in")
def test_rows_hold_the_ratio_to_one_step_and_our_metrics(
    subject: Subject, counting_clock: Clock, tiny_protocol: TimingProtocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.sweep.clock_for", lambda device: counting_clock)
    seen = Seen()
    with recbole_sweep(subject, sys.executable, [1, 8], tiny_protocol, "adrec bench recbole", seen) as sweep:
        rows = list(sweep.rows())
    names = [(row.model, row.engine, row.steps, row.batch_size_users) for row in rows]
    assert names == [("popularity", None, None, None)] + [
        (model, engine, steps, size)
        for size in (1, 8)
        for model, engine, steps in (
            ("adrec", "cached", 1), ("sasrec+", "cached", None), ("recbole-sasrec", "recbole", None),
        )
    ]  # fmt: skip
    assert all(row.error is None for row in rows)
    theirs = rows[3]
    assert theirs.timing is not None
    assert theirs.accuracy is not None
    # Every call of ours takes 1 ms by the clock, every one of theirs says 2.
    ratio = theirs.timing.time_ratio_to_baseline
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert (theirs.timing.baseline_engine, theirs.timing.baseline_steps) == ("cached", 1)
    assert theirs.timing.latency_ms_p50 == 2.0
    assert theirs.timing.peak_memory_mib is None
    expected = interval_table(torch.arange(60), 1000)
    assert {name: each.value for name, each in theirs.accuracy.metrics_percent.items()} == {
        name: each.value for name, each in expected.items()
    }
    assert theirs.accuracy.measured_with == "recbole, best of 1 epoch trained, at most 300"
    assert theirs.model_fingerprint == "f" * 64
    assert theirs.environment.versions["recbole"] == "9.9"
    assert "recbole" not in rows[1].environment.versions
    assert seen.stages[0] == "training RecBole's SASRec"


@pytest.mark.usefixtures("stand_in")
def test_every_turn_comes_after_a_call_that_does_not_count(
    subject: Subject, tiny_protocol: TimingProtocol, tmp_path: Path
) -> None:
    with recbole_sweep(subject, sys.executable, [8], tiny_protocol, "", Seen()) as sweep:
        list(sweep.rows())
        guest = sweep.guests[0]
        assert isinstance(guest, RecBoleSasrec)
        requests = recbole_requests(guest.child)
    assert [each["do"] for each in requests[:4]] == ["versions", "train", "rank", "batches"]
    trained = requests[1]
    assert (trained["width"], trained["blocks"], trained["heads"], trained["max_length"]) == (16, 2, 2, 10)
    assert (trained["threads"], trained["items"], trained["epochs"]) == (torch.get_num_threads(), 40, None)
    # The first call, then two rounds of an untimed call and a timed turn.
    counted = [(each["number"], each["seconds"] > 0) for each in requests[4:]]
    assert counted == [(0, False), (0, False), (0, True), (1, False), (1, True)]


def recbole_requests(child: Child) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (child.folder / "requests.jsonl").read_text().splitlines()]


def test_settled_drops_one_call_of_a_turn_and_none_of_a_warm_up() -> None:
    made: list[tuple[int, float]] = []

    def turn(number: int, seconds: float) -> list[float]:
        made.append((number, seconds))
        return [1.0]

    assert settled(turn)(3, 0.5) == [1.0]
    assert settled(turn)(4, 0.0) == [1.0]
    assert made == [(3, 0.0), (3, 0.5), (4, 0.0)]


@pytest.mark.usefixtures("stand_in")
def test_the_process_and_its_folder_end_with_the_block(subject: Subject, tiny_protocol: TimingProtocol) -> None:
    with recbole_sweep(subject, sys.executable, [1], tiny_protocol, "", Seen()) as sweep:
        guest = sweep.guests[0]
        assert isinstance(guest, RecBoleSasrec)
        assert guest.child.folder.exists()
    assert guest.child._process.returncode == 0
    assert not guest.child.folder.exists()


@pytest.mark.usefixtures("stand_in")
def test_the_command_writes_records_that_report_and_compare_read(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    options = ["--python", sys.executable, "--batch-sizes", "1,8", "--seconds-per-cell", "0.001", "--out", str(out)]
    done = CliRunner().invoke(application(), ["bench", "recbole", str(tiny_run), *options, "--quiet"])
    assert done.exit_code == 0, done.output
    assert "recbole-sasrec" in done.output
    assert len(read_any(out)) == 7
    for command in (["report", str(out), "--out", str(tmp_path / "page.html")], ["compare", str(out), str(out)]):
        read = CliRunner().invoke(application(), ["bench", *command])
        assert read.exit_code == 0, read.output
    assert "recbole-sasrec" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_charts_draw_recbole() -> None:
    records = [each for each in read_any(RECORD) if isinstance(each, TradeoffRecord)]
    rows = [each for each in records if each.batch_size_users == 512]
    measured = next(each for each in rows if each.model == "recbole-sasrec")
    assert measured.timing is not None
    (line,) = (line for line in accuracy_against_latency(records, rows, 512).lines if line.name == "recbole-sasrec")
    assert line.x == [measured.timing.latency_ms_p50]


@pytest.mark.usefixtures("stand_in")
def test_the_suite_measures_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    context = Context(tmp_path, torch.device("cpu"), "", smoke=True, seconds=0.001)
    units, left_out = select(["rivals"], context)
    assert left_out == {}
    (rows,) = [list(unit.measure(lambda done, expected: None)) for unit in units]
    assert {row.model for row in rows if hasattr(row, "model")} == {"popularity", "adrec", "sasrec+", "recbole-sasrec"}


def test_the_suite_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recbole_sasrec, "interpreter", lambda: None)
    with pytest.raises(NotSupportedError, match=rf"pip install 'adrec\[recbole\]'.*{PYTHON_VARIABLE}"):
        select(["rivals"], Context(tmp_path, torch.device("cpu"), ""))


def test_files_hold_our_split_as_recbole_would_cut_it(tmp_path: Path) -> None:
    dataset = Dataset.from_lists([[3, 1, 2, 3], [2], [1, 2]], [[1], [3], []], [[2], [], []])
    write_files(tmp_path / "rival", dataset, 2)
    head = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    found = {path.name: path.read_text() for path in (tmp_path / "rival").iterdir()}
    assert found == {
        "rival.train.inter": head + "0\t3\t1\n0\t3 1\t2\n0\t1 2\t3\n2\t1\t2\n",
        "rival.validation.inter": head + "0\t2 3\t1\n1\t2\t3\n",
        "rival.item": "item_id:token\n1\n2\n3\n",
    }


def test_without_validation_there_is_nothing_to_stop_by(tmp_path: Path) -> None:
    dataset = Dataset.from_lists([[3, 1, 2]], [[]], [[1]])
    with pytest.raises(DataError, match="no validation examples"):
        write_files(tmp_path / "rival", dataset, 2)


def test_the_script_ranks_by_our_rules() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-2, 3, (200, 3), generator=generator).float()
    table = torch.randint(-2, 3, (31, 3), generator=generator).float()
    rows[0] = torch.nan
    targets = torch.randint(1, 31, (200,), generator=generator)
    scores = rows @ table.T
    scores[:, 0] = -torch.inf
    found = recbole_child.ranks_of(scores, targets)
    expected = target_ranks(rows, table, targets)
    assert found[1:].tolist() == expected[1:].tolist()
    assert found[0] >= 20 <= expected[0]


def test_the_script_times_as_we_do() -> None:
    numbers: list[int] = []
    assert len(recbole_child.timed(numbers.append, 4, 0.0, 1000)) == 1
    assert len(recbole_child.timed(numbers.append, 5, 1e3, 3)) == 3
    assert numbers == [4, 5, 6, 7]


def test_an_interpreter_without_recbole_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    script.write_text('import sys\nsys.stdin.readline()\nprint(\'{"missing": "No module named recbole"}\')\n')
    monkeypatch.setattr(recbole_sasrec, "SCRIPT", script)
    with pytest.raises(ConfigError) as caught:
        start(sys.executable)
    assert f"--python {sys.executable}" in str(caught.value)
    assert "pip install 'adrec[recbole]'" in str(caught.value)


def test_an_interpreter_that_is_none_is_named(tiny_run: Path, tmp_path: Path) -> None:
    empty = CliRunner().invoke(application(), ["bench", "recbole", str(tiny_run), "--python", ""])
    with pytest.raises(ConfigError, match="--python is empty: name an interpreter that has RecBole"):
        raise empty.exception or AssertionError
    with pytest.raises(ConfigError, match=r"nowhere: no such program"):
        start(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("child", "message"),
    [
        ("import sys\nsys.stdin.readline()\nraise ValueError('out of cheese')", "status 1: ValueError: out of cheese"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9: it wrote nothing"),
        ("print('hello', flush=True)\ninput()", r"answered 'hello\\n', which is not JSON"),
        ('print(\'{"error": "loss is nan"}\', flush=True)\ninput()', "Rival: loss is nan"),
    ],
    indirect=["child"],
)
def test_a_process_that_fails_says_why(child: Child, message: str) -> None:
    with pytest.raises(ChildError, match=message):
        child.ask("versions")
    child.close()
    assert child._process.returncode is not None


@pytest.mark.parametrize("child", ["import time\ntime.sleep(600)"], indirect=True)
def test_a_process_that_does_not_answer_is_given_up(child: Child) -> None:
    with pytest.raises(ChildError, match=r"did not answer within 0\.2 s; is it the right program\?"):
        child.greet("versions", 0.2)
    child.close()
    assert child._process.returncode == -9


@pytest.mark.parametrize("child", ["import sys\nsys.stdout.buffer.write(b'\\xff\\xfe\\n')"], indirect=True)
def test_a_process_that_writes_no_text_is_told_of(child: Child) -> None:
    with pytest.raises(ChildError, match="which is not JSON"):
        child.ask("versions")


@pytest.mark.parametrize("child", ["import time\nprint('{}', flush=True)\ntime.sleep(600)"], indirect=True)
def test_a_process_that_does_not_end_is_killed(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.rivals.child.PATIENCE_SECONDS", 0.05)
    assert child.ask("versions") == {}
    child.close()
    assert child._process.returncode == -9


@pytest.mark.slow
@pytest.mark.skipif(
    interpreter() is None, reason=f"no RecBole: it is not installed here, and {PYTHON_VARIABLE} is unset"
)
def test_recbole_itself_sees_our_data_and_agrees_on_its_accuracy(
    subject: Subject, tiny_protocol: TimingProtocol
) -> None:
    news: list[dict[str, Any]] = []
    child, versions = start(str(interpreter()))
    with child:
        rival = RecBoleSasrec.train(child, versions, subject.dataset, subject.run.config, 4, news.append)
        assert rival.epochs == len(news) == 4
        assert len(rival.fingerprint) == 64
        # RecBole ranked the validation split itself, with its own loader and metrics, rounded to 4 places.
        ours = rival.evaluation(subject.dataset.examples("validation"))
        assert ours.metrics["NDCG@20"].value == pytest.approx(max(each["ndcg20_percent"] for each in news), abs=0.011)
        found = rival.evaluation(subject.examples)
        places = (found.top_items == subject.examples.targets[:, None]).nonzero()
        listed = found.ranks < 20
        assert places[:, 0].tolist() == listed.nonzero().flatten().tolist()
        assert places[:, 1].tolist() == found.ranks[listed].tolist()
        assert len(rival.turn([subject.examples.histories.select(torch.arange(8))], 20)(0, 0.0)) == 1
    with recbole_sweep(subject, str(interpreter()), [8], tiny_protocol, "", Seen(), epochs=1) as sweep:
        assert all(row.error is None for row in sweep.rows())
