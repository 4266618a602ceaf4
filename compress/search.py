"""The search for the cheapest candidate that keeps the accuracy and meets a budget of time.

It reads no clock: what a candidate's accuracy and time are, it asks two functions. Two assumptions allow it to leave
candidates out. Loss: who takes away all that another candidate takes away loses at least as much; so once the whole
interval of a loss lies above the bound, nothing is combined further with what lost it. Cost: of two candidates that
differ in their reverse steps alone, the one with fewer takes no longer; so once few steps keep the accuracy, more are
not looked at. ``prune=False`` looks at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from adrec.errors import AdrecError
from compress.budget import Budget, Timing
from compress.candidates import Candidate, CandidateBook, CandidateRecord, Space
from compress.technique import METRIC, CompressionError, Receipt


@dataclass(frozen=True)
class Assessment:
    """What a candidate is, apart from its speed: receipts with accuracy, bytes and numbers of its weights."""

    receipts: tuple[Receipt, ...]
    bytes: int
    parameters: int


@dataclass(frozen=True)
class Search:
    """A search: ``assess`` makes a candidate and ranks the validation split, ``measure`` times it at batch sizes.

    fingerprint: of everything that decides the result of a candidate. progress: called before each candidate with
    those done, their total, and the next.
    """

    space: Space
    budget: Budget
    max_loss: float
    assess: Callable[[Candidate], Assessment]
    measure: Callable[[Candidate, Sequence[int]], dict[int, Timing]]
    fingerprint: Callable[[Candidate], str]
    prune: bool = True
    progress: Callable[[int, int, Candidate], None] = lambda done, total, candidate: None

    def run(self, book: CandidateBook) -> list[CandidateRecord]:
        """Look at every candidate, each a record in ``book``; what the book has measured is not measured again."""
        candidates = list(self.space.candidates())
        records: list[CandidateRecord] = []
        for done, candidate in enumerate(candidates):
            self.progress(done, len(candidates), candidate)
            known = book.measured(self.fingerprint(candidate))
            reason = self._pruned(candidate, records) if self.prune and known is None else None
            record = self._look_at(candidate, known) if reason is None else self._record(candidate, "pruned", reason)
            book.write(record)
            records.append(record)
        return records

    def _pruned(self, candidate: Candidate, records: Iterable[CandidateRecord]) -> str | None:
        for record in records:
            if record.status != "measured":
                continue
            other = record.candidate
            if record.least_loss > self.max_loss and self.space.reduces_as_much(candidate, other):
                return f"{other} already loses {record.loss:.2f} %"
            alike = other.model_copy(update={"steps": candidate.steps}) == candidate
            if alike and other.steps < candidate.steps and record.loss <= self.max_loss:
                return f"{other.steps} step{' keeps' if other.steps == 1 else 's keep'} the accuracy"
        return None

    def _look_at(self, candidate: Candidate, known: CandidateRecord | None) -> CandidateRecord:
        missing = [batch for batch in self.budget.batches if known is None or batch not in known.timings]
        if known is not None and not missing:
            return known
        try:
            if known is None:
                found = self.assess(candidate)
                known = self._record(candidate, "measured").model_copy(update=vars(found))
            timings = known.timings | self.measure(candidate, missing)
        except AdrecError as error:
            # An engine or a technique that cannot do this one says so in its record; the search goes on.
            return self._record(candidate, "failed", str(error))
        return known.model_copy(update={"timings": timings})

    def _record(self, candidate: Candidate, status: str, detail: str = "") -> CandidateRecord:
        return CandidateRecord(
            fingerprint=self.fingerprint(candidate), candidate=candidate, status=status, detail=detail
        )

    def time(self, record: CandidateRecord) -> tuple[float, float, float]:
        """Time at the first term's batch size, over that of the common partner, with its interval."""
        timing = record.timings[self.budget.batches[0]]
        if timing.ratio is None:
            return timing.p50_ms, timing.p50_ms, timing.p50_ms
        return timing.ratio.value, timing.ratio.low, timing.ratio.high

    def choose(self, records: Sequence[CandidateRecord]) -> CandidateRecord:
        """The cheapest record that keeps the accuracy within the budget: of those not surely slower, the smallest.

        Surely slower is one whose whole interval of time lies above that of another such record, whichever that is.
        Raises CompressionError naming the nearest candidate, and by how much it misses.
        """
        measured = [record for record in records if record.status == "measured"]
        if not measured:
            failed = next((record for record in records if record.status == "failed"), None)
            reason = "" if failed is None else f"; the first one failed: {failed.candidate}: {failed.detail}"
            raise CompressionError(f"no candidate could be measured{reason}")
        keeping = [record for record in measured if record.loss <= self.max_loss]
        if not keeping:
            record = min(measured, key=lambda each: each.loss)
            raise CompressionError(
                f"no candidate loses at most {self.max_loss:g} % of the validation {METRIC}; the nearest is"
                f" {record.candidate}, which loses {record.loss:.2f} %. Allow more with --max-loss"
            )
        meeting = [record for record in keeping if self.budget.met(record.timings)]
        if meeting:
            longest = min(self.time(record)[2] for record in meeting)
            equally_fast = [record for record in meeting if self.time(record)[1] <= longest]
            return min(equally_fast, key=lambda each: (each.bytes, self.time(each)))
        record = min(keeping, key=lambda each: self.budget.worst(each.timings)[1])
        raise CompressionError(
            f"no candidate that keeps the accuracy meets the budget; the nearest is {record.candidate} with"
            f" {self._miss(record)}. Relax the budget, or allow a larger --max-loss"
        )

    def judge(self, records: Iterable[CandidateRecord], chosen: CandidateRecord | None) -> list[CandidateRecord]:
        """The records, those that were measured with why they are the choice or are not in their ``detail``.

        chosen: what `choose` returned; None where it found nothing.
        """
        return [
            record.model_copy(update={"detail": self._verdict(record, chosen)})
            if record.status == "measured"
            else record
            for record in records
        ]

    def _verdict(self, record: CandidateRecord, chosen: CandidateRecord | None) -> str:
        if chosen is not None and record.candidate == chosen.candidate:
            return "chosen"
        if record.loss > self.max_loss:
            return f"loses {record.loss:.2f} % of the validation {METRIC}; allowed: {self.max_loss:g} %"
        if not self.budget.met(record.timings):
            return self._miss(record)
        if chosen is None:
            return ""
        batch = self.budget.batches[0]
        times = self.time(record)[0] / self.time(chosen)[0]
        if self.time(record)[1] > self.time(chosen)[2]:
            return f"takes {times:.2f} times as long as the choice at batch {batch}"
        if record.bytes > chosen.bytes:
            larger = record.bytes / chosen.bytes
            return f"not surely faster than the choice at batch {batch}, and {larger:.2f} times as large"
        return f"another that keeps the accuracy is surely faster at batch {batch}"

    def _miss(self, record: CandidateRecord) -> str:
        term, excess = self.budget.worst(record.timings)
        value = term.reached(record.timings[term.batch])
        unit = "users/s" if term.quantity == "throughput" else "ms"
        return f"{term.quantity} {value:.4g} {unit} at batch {term.batch}, {100.0 * excess:.0f} % beyond {term}"

    def front(self, records: Iterable[CandidateRecord]) -> list[CandidateRecord]:
        """Measured records that no other beats in both time and kept accuracy, from fast to slow."""
        front: list[CandidateRecord] = []
        measured = [record for record in records if record.status == "measured"]
        for record in sorted(measured, key=lambda each: (self.time(each), each.loss)):
            if not front or record.loss < front[-1].loss:
                front.append(record)
        return front
