"""What the measured rows advise, in words: which setting to deploy, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.pareto import Point, best_under, fastest_keeping, knee, pareto_front
from bench.record import Accuracy, Estimate, TimingSummary, TradeoffRecord

MARGIN_PERCENT = 1.0
BUDGETS_MS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
FEW_CALLS = 100
LEAST_CALLS = 3
WIDEST_RATIO = 2.0
BUSY_SHARE = 0.5
NEAR_PERCENT = 5.0
METRIC = "NDCG@20"


def recommendation(records: Sequence[TradeoffRecord], margin_percent: float = MARGIN_PERCENT) -> list[str]:
    """Return sentences for the rows of one study: the choice for each batch size, then what to know.

    The choice is the fastest setting whose NDCG@20 is, by the lower end of its 95 % interval over users, at
    least ``100 - margin_percent`` percent of that of the exact step count, at every seed. It is withheld where
    the timings behind it are too few or too uncertain.
    """
    sentences = [
        sentence
        for size in batch_sizes(records)
        if (sentence := _choice(rows_of_batch(records, size), size, margin_percent)) is not None
    ]
    if not sentences:
        return [_nothing_chosen(records, margin_percent)]
    rule = (
        f"Rule: the fastest setting whose {METRIC} is at least {100 - margin_percent:g} % of that "
        "of the exact step count, by the lower end of the 95 % interval."
    )
    return [*sentences, rule, *_baselines(records), *_cautions(records)]


def batch_sizes(records: Sequence[TradeoffRecord]) -> list[int]:
    """Return the batch sizes that occur, ascending."""
    return sorted({record.batch_size_users for record in records if record.batch_size_users is not None})


def rows_of_batch(records: Sequence[TradeoffRecord], size: int) -> list[TradeoffRecord]:
    """Return the complete rows (timing and accuracy) of a batch size."""
    return [each for each in records if each.batch_size_users == size and each.timing and each.accuracy]


def points_of(records: Sequence[TradeoffRecord]) -> list[Point]:
    """Return one point a setting; with several seeds, the mean accuracy and the least kept share."""
    groups: dict[str, list[tuple[TimingSummary, Accuracy]]] = {}
    for record in records:
        if record.timing is not None and record.accuracy is not None:
            groups.setdefault(setting(record), []).append((record.timing, record.accuracy))
    points = []
    for label, rows in groups.items():
        kept = [accuracy.ndcg20_kept_percent for _, accuracy in rows]
        points.append(
            Point(
                label=label,
                latency_ms=rows[0][0].latency_ms_p50,
                accuracy_percent=sum(accuracy.metrics_percent[METRIC].value for _, accuracy in rows) / len(rows),
                kept_low_percent=None if None in kept else min(each.low for each in kept if each is not None),
            )
        )
    return points


def _nothing_chosen(records: Sequence[TradeoffRecord], margin_percent: float) -> str:
    complete = [rows for size in batch_sizes(records) if (rows := rows_of_batch(records, size))]
    if not complete:
        return "No row has both a latency and an accuracy, so there is nothing to choose from."
    if not any(knows_kept(points_of(rows)) for rows in complete):
        return (
            f"No row says what it keeps of the exact step count's {METRIC}, which is 0 or was not measured: nothing is"
            " chosen."
        )
    return f"No setting surely keeps {100 - margin_percent:g} % of the exact step count's {METRIC}: nothing is chosen."


def knows_kept(points: Sequence[Point]) -> bool:
    """Whether a point knows what it keeps of the exact accuracy; where none does, accuracies tell nothing apart."""
    return any(point.kept_low_percent is not None for point in points)


def setting(record: TradeoffRecord) -> str:
    """Name a row's setting without its batch size and seed."""
    if record.steps is None:
        return record.model
    return f"{record.engine}, {counted(record.steps, 'step')}"


def budget_table(records: Sequence[TradeoffRecord]) -> list[tuple[int, str, str, list[tuple[float, str]]]]:
    """Return for each batch size: size, Pareto front from fast to slow, knee, best under each budget.

    A budget (in milliseconds) that changes nothing against the smaller one before it is left out.
    """
    table = []
    for size in batch_sizes(records):
        points = points_of(rows_of_batch(records, size))
        bend = knee(points) if knows_kept(points) else None
        best: list[tuple[float, str]] = []
        for budget in BUDGETS_MS:
            found = best_under(points, budget)
            if found is not None and (not best or best[-1][1] != found.label):
                best.append((budget, found.label))
        front = "; ".join(point.label for point in pareto_front(points)) or "none"
        table.append((size, front, bend.label if bend else "none", best))
    return table


def counted(count: int, noun: str) -> str:
    """Return ``1 step``, ``2 steps``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def share(ratio: float) -> str:
    """Return a time ratio in words' form: ``1/57`` below one, ``1.3 times`` above."""
    if ratio >= 1.0:
        return f"{ratio:.2g} times"
    return f"1/{1 / ratio:.0f}" if ratio < 0.1 else f"1/{1 / ratio:.1f}"


def interval(estimate: Estimate, digits: int = 2) -> str:
    """Return ``value [low, high]``."""
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _choice(rows: Sequence[TradeoffRecord], size: int, margin_percent: float) -> str | None:
    points = points_of(rows)
    chosen = fastest_keeping(points, margin_percent)
    if chosen is None:
        return None
    row = next(each for each in rows if setting(each) == chosen.label)
    timing, accuracy = row.timing, row.accuracy
    if timing is None or accuracy is None or row.steps is None:
        return None
    batch = f"Batch of {counted(size, 'user')}"
    doubt = _doubt(row, timing, rows)
    if doubt is not None:
        return f"{batch}: no choice, because {doubt}; measure longer with --seconds-per-cell, on an idle machine."
    ratio = timing.time_ratio_to_baseline
    time = f"{timing.latency_ms_p50:.3g} ms"
    is_baseline = (row.engine, row.steps) == (timing.baseline_engine, timing.baseline_steps)
    if ratio is not None and not is_baseline:
        ends = f"[{share(ratio.low)}, {share(ratio.high)}]"
        steps = counted(timing.baseline_steps, "step")
        time = f"{share(ratio.value)} {ends} of the time of {timing.baseline_engine} at {steps}, {time}"
    near = [each.label for each in points if each != chosen and _as_fast_and_good(each, chosen, margin_percent)]
    also = f" As fast within {NEAR_PERCENT:g} %: {'; '.join(near)}." if near else ""
    if row.steps == row.exact_steps:
        return (
            f"{batch}: keep {counted(row.steps, 'step')} with the {row.engine} engine ({time}); fewer steps "
            f"do not surely keep {100 - margin_percent:g} % of its {METRIC}.{also}"
        )
    kept = accuracy.ndcg20_kept_percent
    kept_words = "an unknown share" if kept is None else f"{interval(kept, 1)} %"
    verb = "keeps" if row.steps == 1 else "keep"
    return (
        f"{batch}: {counted(row.steps, 'step')} {verb} {kept_words} of the {row.exact_steps}-step {METRIC} "
        f"at {time}; choose {counted(row.steps, 'step')} with the {row.engine} engine.{also}"
    )


def _doubt(row: TradeoffRecord, timing: TimingSummary, rows: Sequence[TradeoffRecord]) -> str | None:
    """Say why a choice would rest on too little: few calls of its row or the baseline's, or an uncertain ratio."""
    for each in rows:
        is_baseline = (each.engine, each.steps) == (timing.baseline_engine, timing.baseline_steps)
        if each.timing and (each is row or is_baseline) and each.timing.calls < LEAST_CALLS:
            return f"'{setting(each)}' was timed in {each.timing.calls} calls only ({LEAST_CALLS} are needed)"
    ratio = timing.time_ratio_to_baseline
    if ratio is not None and ratio.high > WIDEST_RATIO * ratio.low:
        return (
            f"the time ratio of the fastest setting, '{setting(row)}', is known no better than "
            f"[{share(ratio.low)}, {share(ratio.high)}]"
        )
    return None


def _as_fast_and_good(point: Point, chosen: Point, margin_percent: float) -> bool:
    near = point.latency_ms <= chosen.latency_ms * (1 + NEAR_PERCENT / 100)
    return near and fastest_keeping([point], margin_percent) is not None


def _baselines(records: Sequence[TradeoffRecord]) -> list[str]:
    exact = next((each for each in records if each.steps == each.exact_steps and each.accuracy), None)
    if exact is None or exact.accuracy is None:
        return []
    ours = exact.accuracy.metrics_percent[METRIC]
    sentences = []
    others = [each for each in records if each.steps is None and each.accuracy]
    for model in dict.fromkeys(each.model for each in others):
        rows = [each for each in others if each.model == model]
        rows = [each for each in rows if each.batch_size_users == rows[0].batch_size_users]
        # Of several engines the fastest.
        record = min(rows, key=lambda each: each.timing.latency_ms_p50 if each.timing else math.inf)
        if record.accuracy is None:
            continue
        theirs = record.accuracy.metrics_percent[METRIC]
        if theirs.low > ours.high:
            verdict = f"clearly more accurate than {exact.model} here"
        elif theirs.high < ours.low:
            verdict = f"clearly less accurate than {exact.model} here"
        else:
            verdict = f"not clearly different from {exact.model} here: the intervals overlap"
        timing = record.timing
        speed = (
            f", {timing.latency_ms_p50:.3g} ms at batch {record.batch_size_users} in {record.engine}" if timing else ""
        )
        sentences.append(
            f"{record.model} reaches {METRIC} {interval(theirs)} %{speed}; {exact.model} at "
            f"{counted(exact.exact_steps, 'step')} {interval(ours)} %: {record.model} is {verdict}."
        )
    return sentences


def _cautions(records: Sequence[TradeoffRecord]) -> list[str]:
    cautions = []
    failed = sum(record.error is not None for record in records)
    if failed:
        cautions.append(f"{counted(failed, 'row')} failed; the table names the errors.")
    few = [each.timing.calls for each in records if each.timing and each.timing.calls < FEW_CALLS]
    if few:
        cautions.append(
            f"{counted(len(few), 'row')} rest on fewer than {FEW_CALLS} calls (down to {min(few)}): "
            "their p99 is close to the slowest call seen."
        )
    machine = records[0].environment.machine
    if machine.load_one_minute is not None and machine.load_one_minute > BUSY_SHARE * machine.cores_usable:
        cautions.append(
            f"The machine was busy before the measurement (load {machine.load_one_minute:g} on "
            f"{counted(machine.cores_usable, 'core')}): expect noisy latencies, above all p95 and p99."
        )
    agreements = [
        each.accuracy.engine_agreement_fraction
        for each in records
        if each.accuracy and each.accuracy.engine_agreement_fraction is not None
    ]
    if agreements and min(agreements) < 0.999:
        cautions.append(
            f"The engines agree on only {100 * min(agreements):.2f} % of the top 20 at worst: "
            "accuracy measured with one does not hold exactly for the other."
        )
    return cautions
