"""Records of compressed models held against the models they are made for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from adrec.environment import Environment, Frozen
from bench.places import PackedPlaces
from bench.record import Accuracy, Duration, Estimate, MeasuringProtocol


class CompressTiming(Frozen):
    """Latency at one batch size, all rows interleaved in one process.

    times_reference: throughput over that of ``reference`` at every trained step. latency_to_sasrec: time over that of
    SASRec+ in the same engine. Ratios are medians over rounds with a bootstrap interval; None where the other failed
    or was not there. round_medians_ms: one median a round, in the order of measuring; empty in older records.
    """

    batch_size_users: int = Field(ge=1)
    latency_ms_p50: float = Field(gt=0)
    latency_ms_p95: float = Field(gt=0)
    latency_ms_p99: float = Field(gt=0)
    throughput_users_per_second: float = Field(gt=0)
    times_reference: Estimate | None
    latency_to_sasrec: Estimate | None
    calls: int = Field(ge=1)
    rounds: int = Field(ge=1)
    round_medians_ms: list[Duration] = Field(default_factory=list)


class CompressAccuracy(Frozen):
    """Accuracy on a split, percent. kept: NDCG@20 in percent of the teacher's at every trained step, users paired.

    top20_overlap_fraction: mean share of the teacher's top 20. places_base64: the place of every user's target in the
    top 20, see `bench.places` (None in older records).
    """

    ndcg20_percent: Estimate
    hr20_percent: Estimate
    ndcg20_kept_percent: Estimate | None
    top20_overlap_fraction: float = Field(ge=0, le=1)
    users: int = Field(ge=1)
    measured_with: str
    places_base64: PackedPlaces | None = None

    def as_of_tradeoff(self) -> Accuracy:
        """The same as other records hold it, for comparing two files."""
        return Accuracy(
            metrics_percent={"NDCG@20": self.ndcg20_percent, "HR@20": self.hr20_percent},
            users=self.users,
            measured_with=self.measured_with,
            ndcg20_kept_percent=self.ndcg20_kept_percent,
            top20_overlap_fraction=self.top20_overlap_fraction,
            top20_overlap_against="the teacher at every trained step",
            engine_agreement_fraction=None,
            engine_agreement_users=0,
            places_base64=self.places_base64,
        )


class CompressRecord(Frozen):
    """One row: a network at a step count and a precision in an engine. steps is None for a model without any.

    role: what the row is there for. network: blocks of encoder and denoiser, or the baseline's name. run_name: the
    folder it comes from. file_bytes: of what the engine reads, the weights as a run stores them or the exported graph
    (None in older records). teacher_file_bytes: weights of the run it is held against. batch_sizes_users: what was to
    be timed; empty in older records.
    """

    schema_version: Literal[1] = 1
    kind: Literal["compress"] = "compress"
    measured_at_utc: str
    role: Literal["teacher", "baseline", "candidate"]
    network: str
    run_name: str
    steps: int | None
    precision: str
    engine: str
    split: str
    accuracy: CompressAccuracy | None
    batch_sizes_users: list[int] = Field(default_factory=list)
    timings: list[CompressTiming]
    file_bytes: int | None
    teacher_file_bytes: int
    skipped: list[str]
    error: str | None
    protocol: MeasuringProtocol
    dataset_name: str
    dataset_fingerprint: str
    model_fingerprint: str
    run_fingerprint: str
    environment: Environment
    command: str

    def timing(self, batch: int) -> CompressTiming | None:
        """The timing at a batch size, None where it was not measured."""
        return next((each for each in self.timings if each.batch_size_users == batch), None)
