"""Accuracy of distilled runs beside their teacher and SASRec+: ``python -m bench.distilled TEACHER RUN... --out FILE``.

Every row holds what a user needs to repeat it: the recipe that made the run, the seed, and how it was sampled. Shares
of the teacher's accuracy are paired over users. The teacher takes all its reverse steps, each run those it is served
with.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from adrec.checkpoint import Run, load_run
from adrec.config import ServingConfig
from adrec.data.of_run import open_data
from adrec.engines import CachedEngine
from adrec.environment import Environment, Frozen, printable_command, read_environment
from adrec.evaluation import Evaluation, evaluate, kept_percent
from adrec.files import check_output, write_text
from adrec.models.adrec import ADRec
from adrec.respacing import Steps
from bench.accuracy import estimates
from bench.record import Estimate
from compress.api import read_compression
from compress.technique import Change, parameter_count

SPLITS: tuple[Literal["validation", "test"], ...] = ("validation", "test")


class DistilledRow(Frozen):
    """One run on one split. kept_percent, over_baseline_percent: its NDCG@20 in percent of the teacher's, of SASRec+'s.

    blocks: Transformer blocks that one request passes, all reverse steps together. recipe, changed: how the run was
    made and what its receipts say of it, the epoch of its weights included; None where nothing was compressed.
    """

    run: str
    role: Literal["teacher", "baseline", "distilled"]
    split: Literal["validation", "test"]
    sampled: str
    blocks: int
    parameters: int
    users: int
    metrics_percent: dict[str, Estimate]
    kept_percent: Estimate | None
    over_baseline_percent: Estimate | None
    recipe: dict[str, Any] | None
    changed: list[Change] | None


class DistilledRecord(Frozen):
    """Contents of a record file."""

    schema_version: Literal[1] = 1
    dataset: str
    command: str
    seed: int
    environment: Environment
    rows: list[DistilledRow]


def compare(teacher: Run, runs: list[Run], data: Path | None, seed: int, command: str) -> DistilledRecord:
    """Evaluate a teacher, its SASRec+ and runs made of it on both splits of their data set."""
    dataset, baseline = open_data(teacher, data), teacher.baseline()
    rows: list[DistilledRow] = []
    for split in SPLITS:
        examples = dataset.examples(split)
        first = evaluate(CachedEngine(teacher.model), examples, steps=None, seed=seed)
        other = None if baseline is None else evaluate(CachedEngine(baseline.model), examples, seed=seed)
        rows.append(_row("teacher", teacher, None, split, first, first, other))
        if baseline is not None and other is not None:
            rows.append(_row("baseline", baseline, None, split, other, first, other))
        for run in runs:
            steps: Steps = run.settings.serving if isinstance(run.model, ADRec) else None
            found = evaluate(CachedEngine(run.model), examples, steps=steps, seed=seed)
            rows.append(_row("distilled", run, steps, split, found, first, other))
    return DistilledRecord(dataset=dataset.name, command=command, seed=seed, environment=read_environment(), rows=rows)


def _row(
    role: Literal["teacher", "baseline", "distilled"],
    run: Run,
    steps: Steps,
    split: Literal["validation", "test"],
    found: Evaluation,
    teacher: Evaluation,
    baseline: Evaluation | None,
) -> DistilledRow:
    made = read_compression(run.path)
    table = CachedEngine(run.model).table(steps)
    denoiser = 0 if table is None or run.config.denoiser == "mlp" else run.config.denoiser_blocks * table.steps
    sampled = "no diffusion" if table is None else f"{table.steps} step{'s' if table.steps > 1 else ''}"
    if isinstance(steps, ServingConfig):
        sampled += f", {steps.sampler} from {steps.start}"
    return DistilledRow(
        run=run.path.name,
        role=role,
        split=split,
        sampled=sampled,
        blocks=run.config.encoder_blocks + denoiser,
        parameters=parameter_count(run.model),
        users=found.users,
        metrics_percent=estimates(found),
        kept_percent=_share(found, teacher),
        over_baseline_percent=None if baseline is None else _share(found, baseline),
        recipe=None if made is None else made.recipe,
        changed=None if made is None else [change for receipt in made.receipts for change in receipt.changed],
    )


def _share(found: Evaluation, of: Evaluation) -> Estimate | None:
    share = kept_percent(found.ranks, of.ranks)
    return None if share is None else Estimate(value=share.value, low=share.low, high=share.high)


def main(
    teacher: Annotated[Path, typer.Argument(help="Run that was distilled.")],
    runs: Annotated[list[Path], typer.Argument(help="Runs made of it.")],
    out: Annotated[Path, typer.Option(help="JSON file to write.")],
    data: Annotated[Path | None, typer.Option(help="Prepared data (default: where the run was trained from).")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise of sampling.")] = 0,
) -> None:
    """Write the accuracy of distilled runs beside their teacher and SASRec+."""
    check_output(out, "--out", make_folder=True)
    command = printable_command(["python", "-m", "bench.distilled", *sys.argv[1:]])
    record = compare(load_run(teacher), [load_run(run) for run in runs], data, seed, command)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, record.model_dump_json(indent=2) + "\n")
    for row in record.rows:
        shown = {name: row.metrics_percent[name] for name in ("HR@20", "NDCG@20")}
        kept, over = row.kept_percent, row.over_baseline_percent
        typer.echo(
            f"{row.split:10} {row.run:28} {row.sampled:22} {row.blocks:3} blocks"
            + "".join(f"  {name} {each.value:.2f} [{each.low:.2f}, {each.high:.2f}]" for name, each in shown.items())
            + (f"  kept {kept.value:.2f} [{kept.low:.2f}, {kept.high:.2f}] %" if kept else "")
            + (f"  of SASRec+ {over.value:.2f} [{over.low:.2f}, {over.high:.2f}] %" if over else "")
        )


if __name__ == "__main__":
    typer.run(main)
