"""`adrec export verify`: exported graphs beside the run they came from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from adrec.commands.options import choice, integers

if TYPE_CHECKING:
    from adrec.checkpoint import Run
    from adrec.data.dataset import Examples
    from compress.export.comparison import Pair


def verify(
    folder: Annotated[Path, typer.Argument(help="Folder written by `adrec export`.", show_default=False)],
    against: Annotated[Path, typer.Option(help="The run it came from.")],
    data: Annotated[Path | None, typer.Option(help="Data set; default: the one the run was trained on.")] = None,
    users: Annotated[int | None, typer.Option(min=1, help="Compare on a random sample of so many users.")] = None,
    split: Annotated[str, typer.Option(help="validation or test.")] = "validation",
    providers: Annotated[
        str | None,
        typer.Option(
            help="ONNX Runtime's: cpu, cuda, tensorrt, with commas, and no plans; default: those installed, and plans."
        ),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Users at a time; all go through the largest.")] = "1,2,33,512",
    save: Annotated[
        Path | None, typer.Option(help="Also save inputs, outputs and a script there that compares them on a GPU.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Also write every pair to this file.")] = None,
) -> None:
    """Compare exported graphs with the run they came from, on the same histories and noise.

    Exit status 1 where a graph is beyond the bound of its precision: scores to 1e-5 and the same lists up to ties
    (fp32), scores to 1e-2 and overlap .995 (fp16), 99.5 % of NDCG@20 (int8, fp8).
    """
    from adrec.checkpoint import load_run
    from adrec.engines.exported import load_manifest
    from adrec.environment import printable_command, read_environment, utc_now
    from adrec.files import check_output, write_text
    from compress.export.manifest import stored_formats
    from compress.export.replay import check_replay, save_for_replay
    from compress.export.verify import run_of, verify_export

    choice(split, ("validation", "test"), "--split")
    if output is not None:
        check_output(output, "--json")
    if save is not None:
        check_replay(folder, save)
    source = load_run(against)
    held = run_of(load_manifest(folder), source, folder)
    examples = _examples(source, data, split, users)
    console = Console(soft_wrap=True)
    pairs = verify_export(
        folder,
        source,
        examples,
        providers=None if providers is None else [each.strip() for each in providers.split(",")],
        batch_sizes=integers(batch_sizes, "--batch-sizes", 1, 2**20),
        report=lambda pair: console.print(_line(pair), markup=False, highlight=False),
    )
    plans = sorted(folder.glob("*.plan"))
    if plans and not any(pair.runtime == "tensorrt" for pair in pairs):
        why = "TensorRT cannot run here" if providers is None else "--providers leaves TensorRT's plans out"
        console.print(f"not compared: {', '.join(plan.name for plan in plans)} ({why})", markup=False, highlight=False)
    if formats := stored_formats(held.model):
        console.print(
            f"held to the numbers that the run stores ({', '.join(formats)}) in float32, not to what a dynamic format"
            " rounds of activations",
            markup=False,
            highlight=False,
        )
    if output is not None:
        content = {
            "command": printable_command(sys.argv),
            "measured_at_utc": utc_now(),
            "environment": read_environment().model_dump(mode="json"),
            "model_fingerprint": held.fingerprint,
            "dataset": held.info.dataset_name,
            "dataset_fingerprint": held.dataset_fingerprint,
            "split": split,
            "pairs": [pair.model_dump(mode="json") for pair in pairs],
        }
        write_text(output, json.dumps(content, indent=2) + "\n")
    if save is not None:
        saved = save_for_replay(folder, source, examples.histories, save)
        for each in saved:
            console.print(f"saved {each.inputs} and {each.outputs.name}", markup=False, highlight=False)
        if saved:
            said = (
                f"{save / 'replay.sh'} repeats them with TensorRT and Polygraphy (copy {folder} and {save} there); it"
                " compares lists up to ties, and scores to a tolerance where they are float32, and leaves Polygraphy's"
                " report of each graph beside them"
            )
            console.print(said, markup=False, highlight=False)
        else:
            console.print(f"{folder} holds no request graph that TensorRT reads, so nothing was saved", markup=False)
    if any(pair.faults for pair in pairs):
        raise typer.Exit(1)


def _line(pair: Pair) -> str:
    value, low, high = pair.hr_difference
    kept = "-" if pair.ndcg_kept is None else "{:.2f} % [{:.2f}, {:.2f}]".format(*pair.ndcg_kept)
    steps = "" if pair.steps is None else f", {pair.steps} steps"
    return (
        f"{pair.graph}, {pair.runtime}{steps}: score error {pair.score_error:.1e}, tie tolerance needed"
        f" {pair.tie_tolerance:.1e}, overlap {pair.overlap:.4f}, HR@20 {value:+.2f} [{low:+.2f}, {high:+.2f}], NDCG@20"
        f" kept {kept}, {pair.users} users: {pair.verdict}"
    )


def _examples(source: Run, data: Path | None, split: str, users: int | None) -> Examples:
    import numpy as np
    import torch

    from adrec.data.dataset import Examples
    from adrec.data.of_run import open_data

    examples = open_data(source, data).examples("test" if split == "test" else "validation")
    if users is None or users >= len(examples):
        return examples
    rows = torch.from_numpy(np.sort(np.random.default_rng(0).permutation(len(examples))[:users]))
    return Examples(examples.histories.select(rows), examples.targets[rows], examples.users[rows])
