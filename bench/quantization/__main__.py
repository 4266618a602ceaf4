"""Write the record of quantised layers, tables and runs: ``python -m bench.quantization --help``."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from adrec.checkpoint import WEIGHTS, load_run, save_run
from adrec.data.dataset import Dataset
from adrec.data.of_run import open_data
from adrec.engines import CachedEngine
from adrec.environment import printable_command, read_environment
from adrec.evaluation import evaluate, kept_percent
from adrec.files import write_text
from adrec.models.base import SequenceModel
from bench.quantization.timings import engine_rows, layer_rows, scoring_rows
from compress import item_table, quantize
from compress.item_table import ItemTableConfig
from compress.quantize import QuantizeConfig
from compress.technique import Draft, Technique

RECIPES: dict[str, tuple[Technique, ...]] = {
    "float32": (),
    "weights int8": (QuantizeConfig(),),
    "weights int8-dynamic": (QuantizeConfig(format="int8-dynamic"),),
    "weights int8, computed in bfloat16": (QuantizeConfig(compute="bfloat16"),),
    "weights bf16": (QuantizeConfig(format="bf16"),),
    "weights fp8": (QuantizeConfig(format="fp8"),),
    "weights int4": (QuantizeConfig(format="int4"),),
    "table int8": (ItemTableConfig(),),
    "table bf16": (ItemTableConfig(format="bf16"),),
    "table fp8": (ItemTableConfig(format="fp8"),),
    "table int4": (ItemTableConfig(format="int4"),),
    "both int8": (QuantizeConfig(), ItemTableConfig()),
    "both int8, weights dynamic": (QuantizeConfig(format="int8-dynamic"), ItemTableConfig()),
    "both int8, weights computed in bfloat16": (QuantizeConfig(compute="bfloat16"), ItemTableConfig()),
    "both bf16": (QuantizeConfig(format="bf16"), ItemTableConfig(format="bf16")),
    "both int4": (QuantizeConfig(format="int4"), ItemTableConfig(format="int4")),
}
TIMED = ("float32", "both int8", "both int8, weights dynamic", "both int8, weights computed in bfloat16")


def main(
    out: Annotated[Path, typer.Option(help="record to write, JSON")],
    run: Annotated[
        list[Path] | None, typer.Option(help="run whose accuracy and speed are measured; repeatable")
    ] = None,
    data: Annotated[list[Path] | None, typer.Option(help="data set of each run, in order")] = None,
    seconds: Annotated[float, typer.Option(help="time spent on each call")] = 0.5,
    threads: Annotated[int, typer.Option(help="threads of torch")] = 1,
    timings: Annotated[bool, typer.Option(help="measure layers and scoring too")] = True,
) -> None:
    """Measure accuracy, size and time of quantised runs, and the crossovers of layers and scoring."""
    torch.set_num_threads(threads)
    record: dict[str, Any] = {
        "schema_version": 1,
        "kind": "quantization",
        "command": printable_command(["python", "-m", "bench.quantization", *sys.argv[1:]]),
        "threads": threads,
        "time": "median over rounds of the same process, calls interleaved; ratios to float32 [median, low, high]",
        "runs": [],
    }
    for number, folder in enumerate(run or []):
        dataset = open_data(load_run(folder), (data or [])[number] if data else None)
        record["runs"].append(_measure_run(folder, dataset, seconds))
        typer.echo(f"{folder.name} measured")
    if timings:
        record["layers"] = list(layer_rows(seconds))
        record["scoring"] = list(scoring_rows(seconds))
    record["environment"] = read_environment().model_dump(mode="json")
    write_text(out, json.dumps(record, indent=1) + "\n")
    typer.echo(f"written to {out}")


def _measure_run(folder: Path, dataset: Dataset, seconds: float) -> dict[str, Any]:
    run = load_run(folder)
    exact: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    timed: dict[str, SequenceModel] = {}
    for name, recipe in RECIPES.items():
        draft = Draft.of(run.model, dataset, settings=run.settings)
        receipts = [
            (quantize if isinstance(stage, QuantizeConfig) else item_table).apply(draft, stage) for stage in recipe
        ]
        row: dict[str, Any] = {"recipe": name}
        for split in ("validation", "test"):
            found = evaluate(CachedEngine(draft.model), dataset.examples(split), steps=1)
            exact.setdefault(split, found)
            kept = kept_percent(found.ranks, exact[split].ranks)
            row[split] = {"NDCG@20_percent": round(found.metrics["NDCG@20"].value, 4)}
            if kept is not None:
                row[split]["kept_percent"] = [round(each, 3) for each in (kept.value, kept.low, kept.high)]
        with tempfile.TemporaryDirectory() as temporary:
            save_run(Path(temporary), draft.settings, draft.model, dataset, "", {})
            row["file_bytes"] = (Path(temporary) / WEIGHTS).stat().st_size
        details = [change.detail for receipt in receipts for change in receipt.changed]
        if details:
            row["lowest_sqnr_db"] = min(float(detail["sqnr_db"]) for detail in details)
        row["skipped"] = [skip.what for receipt in receipts for skip in receipt.skipped if "." in skip.what]
        row |= {key: value for detail in details for key, value in detail.items() if key.startswith("recall")}
        rows.append(row)
        if name in TIMED:
            timed[name] = draft.model
    return {
        "run": folder.name,
        "model_fingerprint": run.fingerprint,
        "dataset_fingerprint": dataset.fingerprint,
        "steps": 1,
        "formats": rows,
        "engine": list(engine_rows(timed, dataset.examples("test"), seconds)),
    }


if __name__ == "__main__":
    typer.run(main)
