"""`Recommender`: raw histories in, raw ids out, and nothing but history, seed and steps decides."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adrec import Recommender
from adrec.data.dataset import Dataset
from adrec.data.jagged import Jagged
from adrec.engines import OnnxRuntimeEngine
from adrec.errors import AdrecError, ConfigError, NotSupportedError, RunError
from adrec.recommender import Recommendation, UnknownItemError

HISTORIES = [[1, 2, 3], [40], [5, 5, 5, 5], list(range(1, 36)), [17, 3], [1, 2, 3]]


@pytest.fixture(scope="module")
def recommender(integer_run: Path) -> Recommender:
    return Recommender.load(integer_run)


@pytest.fixture(scope="module")
def text_recommender(text_run: Path) -> Recommender:
    return Recommender.load(text_run)


@pytest.fixture(autouse=True)
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def assert_same(first: list[Recommendation], second: list[Recommendation]) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.items == other.items
        assert one.scores == pytest.approx(other.scores, abs=2e-5)
        assert (one.unknown, one.source) == (other.unknown, other.source)


def test_three_lines(integer_run: Path) -> None:
    recommender = Recommender.load(str(integer_run))
    results = recommender.recommend([[1, 2, 3]], k=7)
    assert len(results) == 1
    assert len(results[0].items) == len(set(results[0].items)) == 7
    assert all(isinstance(item, int) and 1 <= item <= 40 for item in results[0].items)
    assert results[0].scores == sorted(results[0].scores, reverse=True)
    assert (results[0].unknown, results[0].source) == (0, "model")


def test_lists_are_those_of_a_brute_force_ranking(recommender: Recommender) -> None:
    found = recommender.recommend(HISTORIES, 40, steps=3, seed=9)
    rows = recommender.engine.represent(Jagged.from_lists(HISTORIES), steps=3, seed=9)
    scores = rows @ recommender.run.model.table.detach()[1:].T
    for result, row in zip(found, scores, strict=True):
        assert result.items == (row.argsort(descending=True) + 1).tolist()
        assert result.scores == pytest.approx(row.sort(descending=True).values.tolist(), abs=1e-5)


def test_reference_engine_gives_the_same_lists(integer_run: Path, recommender: Recommender) -> None:
    reference = Recommender.load(integer_run, engine="reference")
    assert_same(reference.recommend(HISTORIES, 10, steps=4), recommender.recommend(HISTORIES, 10, steps=4))
    with pytest.raises(ConfigError, match="did you mean 'reference'"):
        Recommender.load(integer_run, engine="referense")
    with pytest.raises(RunError, match=r"run\.json is missing"):
        Recommender.load(integer_run.parent)


def test_a_provider_is_there_before_anything_is_read(
    integer_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pytest.importorskip("onnxruntime")
    engine = Recommender.load(integer_run, engine="onnxruntime", provider="cpu").engine
    assert isinstance(engine, OnnxRuntimeEngine)
    assert engine.provider == "CPUExecutionProvider"
    monkeypatch.setattr(runtime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    refused: list[tuple[str, str, type[AdrecError], str]] = [
        ("onnxruntime", "cuda", NotSupportedError, "has no CUDAExecutionProvider, only CPUExecutionProvider"),
        ("onnxruntime-int8", "tensorrt", NotSupportedError, "has no TensorrtExecutionProvider"),
        ("onnxruntime", "cdua", ConfigError, "did you mean 'cuda'"),
        ("cached", "cpu", ConfigError, "engine 'cached' has none; leave it out, or use engine 'onnxruntime'"),
    ]
    for name, provider, error, message in refused:
        with pytest.raises(error, match=message):
            Recommender.load(tmp_path / "no run", engine=name, provider=provider)


def test_text_ids_give_the_same_lists_as_integers(recommender: Recommender, text_recommender: Recommender) -> None:
    texts = text_recommender.recommend([[f"item-{item}" for item in history] for history in HISTORIES], 10)
    numbers = recommender.recommend(HISTORIES, 10)
    assert [r.items for r in texts] == [[f"item-{item}" for item in r.items] for r in numbers]


def test_integers_as_text_match_in_their_plain_spelling(recommender: Recommender) -> None:
    assert_same(recommender.recommend([["1", "2", "3"]]), recommender.recommend([[1, 2, 3]]))
    odd = ["01", " 2", "+3", "4.0", "²", "٣", "", "-5"]
    result = recommender.recommend([[1, *odd]])[0]
    assert result.unknown == len(odd)


def test_numpy_integers_match(recommender: Recommender) -> None:
    assert_same(recommender.recommend([np.array([1, 2, 3])]), recommender.recommend([[1, 2, 3]]))  # type: ignore[list-item]


ODD_VALUES: list[Any] = ["1", "01", "-1", 0, 41, True, 2.0, 2.5, None, np.int64(3), "item-1", " 1"]


@pytest.mark.parametrize("text", [False, True], ids=["integers", "text"])
@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
def test_lookup_follows_the_data_sets_rule(
    recommender: Recommender,
    text_recommender: Recommender,
    tiny_dataset: Dataset,
    text_dataset: Dataset,
    text: bool,
    value: Any,
) -> None:
    served, dataset = (text_recommender, text_dataset) if text else (recommender, tiny_dataset)
    known = "item-1" if text else 1
    assert served.recommend([[known, value]], 1)[0].unknown == dataset.encode_items([value]).count(0)


def test_unknown_items_are_dropped_and_counted(text_recommender: Recommender) -> None:
    found = text_recommender.recommend([["item-1", "gone", "item-2", "gone", 7], ["item-1", "item-2"]])
    assert [result.unknown for result in found] == [3, 0]
    assert found[0].items == found[1].items
    with pytest.raises(UnknownItemError, match=r"history 1 holds 2 unknown items, the first is 'gone'"):
        text_recommender.recommend([["item-1"], ["item-2", "gone", "lost"]], unknown="raise")
    assert text_recommender.recommend([["item-1"]], unknown="raise")[0].unknown == 0
    assert issubclass(UnknownItemError, AdrecError)


def test_nothing_known_gets_popularity(recommender: Recommender, tiny_dataset: Dataset) -> None:
    with pytest.warns(UserWarning, match="2 of 3 histories hold no known item"):
        found = recommender.recommend([[], [1, 2], [99, 98]], 5)
    counts = tiny_dataset.item_counts()[1:]
    order = sorted(range(1, 41), key=lambda item: (-int(counts[item - 1]), item))
    assert found[0].items == found[2].items == order[:5]
    assert found[0].scores == [float(counts[item - 1]) for item in order[:5]]
    assert [(result.unknown, result.source) for result in found] == [(0, "popularity"), (0, "model"), (2, "popularity")]
    assert found[1].items == recommender.recommend([[1, 2]], 5)[0].items


def test_no_history_at_all(recommender: Recommender) -> None:
    assert recommender.recommend([]) == []


def test_exclusion_shortens_lists(recommender: Recommender) -> None:
    found = recommender.recommend(HISTORIES, 40, exclude_history=True)
    kept = recommender.recommend(HISTORIES, 40)
    for history, result, whole in zip(HISTORIES, found, kept, strict=True):
        assert len(result.items) == len(result.scores) == 40 - len(set(history))
        assert result.items == [item for item in whole.items if item not in history]
    everything = recommender.recommend([list(range(1, 41))], 3, exclude_history=True)[0]
    assert (everything.items, everything.scores, everything.source) == ([], [], "model")


@pytest.mark.parametrize("k", [0, -1, 41])
def test_k_outside_the_catalogue_is_refused(recommender: Recommender, k: int) -> None:
    with pytest.raises(AdrecError, match="allowed: 1 to 40"):
        recommender.recommend([[1]], k)


@pytest.mark.parametrize("steps", [0, -1, 5])
def test_steps_outside_the_schedule_are_refused(recommender: Recommender, steps: int) -> None:
    with pytest.raises(AdrecError, match="allowed: 1 to 4"):
        recommender.recommend([[1]], 2, steps=steps)


def test_no_steps_means_all(recommender: Recommender) -> None:
    assert_same(recommender.recommend(HISTORIES, steps=None), recommender.recommend(HISTORIES, steps=4))
    assert (
        recommender.recommend(HISTORIES, 40, steps=1)[0].items != recommender.recommend(HISTORIES, 40, steps=4)[0].items
    )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 44), min_size=1, max_size=30), min_size=1, max_size=12),
    st.integers(1, 5),
    st.data(),
)
def test_neither_batch_nor_order_matters(
    integer_run: Path, histories: list[list[int]], batch_size: int, data: st.DataObject
) -> None:
    recommender = _cached(integer_run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        whole = recommender.recommend(histories, 10, steps=2, seed=3)
        order = data.draw(st.permutations(range(len(histories))))
        other = recommender.recommend([histories[row] for row in order], 10, steps=2, seed=3, batch_size=batch_size)
    assert_same(other, [whole[row] for row in order])


_LOADED: dict[Path, Recommender] = {}


def _cached(run: Path) -> Recommender:
    # Hypothesis refuses function-scoped fixtures, and loading once per example would be slow.
    return _LOADED.setdefault(run, Recommender.load(run))


def test_same_history_same_result_and_seeds_differ(recommender: Recommender) -> None:
    found = recommender.recommend(HISTORIES, 40, steps=2)
    assert found[0].items == found[5].items
    assert_same(recommender.recommend(HISTORIES, 40, steps=2), found)
    other = recommender.recommend(HISTORIES, 40, steps=2, seed=1)
    assert all(a.scores != b.scores for a, b in zip(found, other, strict=True))


def test_user_keys_change_the_noise(recommender: Recommender) -> None:
    twice = [[1, 2, 3], [1, 2, 3]]
    first, second = recommender.recommend(twice, 40, user_keys=[5, 6])
    assert first.scores != second.scores
    again = recommender.recommend([[9], [1, 2, 3]], 40, user_keys=[1, 5], batch_size=1)
    assert_same([again[1]], [first])
    with pytest.raises(ConfigError, match="1 user keys for 2 histories"):
        recommender.recommend(twice, user_keys=[1])


def test_user_keys_stay_with_their_users_beside_empty_histories(recommender: Recommender) -> None:
    with pytest.warns(UserWarning, match="1 of 3"):
        found = recommender.recommend([[1, 2], [], [3, 4]], 40, user_keys=[7, 8, 9])
    assert_same([found[0], found[2]], recommender.recommend([[1, 2], [3, 4]], 40, user_keys=[7, 9]))


@pytest.mark.parametrize("key", [-1, 2**39])
def test_user_keys_outside_their_range_are_refused(recommender: Recommender, key: int) -> None:
    with pytest.raises(AdrecError):
        recommender.recommend([[1, 2]], user_keys=[key])


def test_only_the_last_items_are_read(recommender: Recommender) -> None:
    long = [item % 40 + 1 for item in range(50)]
    assert_same(recommender.recommend([long], steps=2), recommender.recommend([long[-20:]], steps=2))


@pytest.mark.parametrize("history", ["item-1", b"item-1"])
def test_text_instead_of_a_list_is_refused(text_recommender: Recommender, history: Any) -> None:
    with pytest.raises(ConfigError, match=r"history 1 is the text .*; expected a list"):
        text_recommender.recommend([["item-1"], history])


def test_one_flat_history_is_refused(text_recommender: Recommender) -> None:
    # The commonest slip: recommend(history) for recommend([history]).
    with pytest.raises(ConfigError, match="expected a list"):
        text_recommender.recommend(["item-1", "item-2"])  # type: ignore[arg-type]


@pytest.mark.parametrize("histories", [[1, 2], [None], [[[1, 2]]]], ids=["flat integers", "none", "nested"])
def test_other_shapes_are_refused_in_words(recommender: Recommender, histories: Any) -> None:
    with pytest.raises(AdrecError):
        recommender.recommend(histories)


@pytest.mark.parametrize("histories", [[], [[1]], [[41]]], ids=["none", "known", "unknown"])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"k": True}, "k is True; allowed: 1 to 40"),
        ({"k": 2.0}, "k is 2.0"),
        ({"k": "3"}, "k is '3'"),
        ({"steps": 5}, "steps is 5; allowed: 1 to 4"),
        ({"steps": True}, "steps is True"),
        ({"unknown": "rais"}, r"unknown is 'rais' \(did you mean 'raise'\?\); allowed: drop, raise"),
        ({"unknown": None}, "unknown is None"),
        ({"batch_size": 0}, "batch_size is 0; allowed: 1 to"),
        ({"batch_size": -1}, "batch_size is -1"),
    ],
    ids=str,
)
def test_options_are_checked_whatever_the_histories(
    recommender: Recommender, histories: list[list[int]], option: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        recommender.recommend(histories, **option)


@pytest.mark.parametrize("device", ["gpu", "foo", "cuda:999", "mps", "cpu:0", ""])
def test_devices_are_checked_before_the_run_is_read(tmp_path: Path, device: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{device}'.*allowed: "):
        Recommender.load(tmp_path / "none", device=device)


def test_baseline_has_no_steps_and_no_noise(make_run: Any) -> None:
    recommender = Recommender.load(make_run(model="sasrec"))
    found = recommender.recommend(HISTORIES, 10)
    assert_same(recommender.recommend(HISTORIES, 10, steps=None, seed=4, user_keys=range(6)), found)
    with pytest.raises(ConfigError, match="steps is 2; allowed: 1 to 1, a SASRec"):
        recommender.recommend(HISTORIES, 10, steps=2)
    rows = recommender.engine.represent(Jagged.from_lists(HISTORIES))
    best = (rows @ recommender.run.model.table.detach()[1:].T).topk(10).indices + 1
    assert [result.items for result in found] == best.tolist()


def test_recommending_changes_nothing_in_the_model(recommender: Recommender) -> None:
    before = {name: value.clone() for name, value in recommender.run.model.state_dict().items()}
    state = torch.get_rng_state()
    recommender.recommend(HISTORIES, steps=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in recommender.run.model.state_dict().items())


def test_import_does_not_import_torch() -> None:
    program = (
        "import sys, adrec, adrec.cli; adrec.cli.build_app();"
        "print([name for name in ('torch', 'lightning', 'pyarrow', 'polars') if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
    lazily = "import adrec; print(adrec.Recommender.__name__, adrec.Dataset.__name__); adrec.nothing"
    shown = subprocess.run([sys.executable, "-c", lazily], capture_output=True, text=True, check=False)
    assert shown.stdout.strip() == "Recommender Dataset"
    assert "has no attribute 'nothing'" in shown.stderr
