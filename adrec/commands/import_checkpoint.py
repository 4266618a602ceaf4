"""`adrec import-checkpoint`: the authors' released weights as a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from adrec.commands.options import apply_settings


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("import-checkpoint")(import_checkpoint)


def import_checkpoint(
    file: Annotated[Path, typer.Argument(help="Released state dict (.pth), read with weights_only.")],
    dataset: Annotated[Path, typer.Option(help="The data set it was trained on: a prepared folder or dataset.pkl.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting the file does not tell: --set model.lambda_uncertainty=0.1. Repeatable."),
    ] = None,
) -> None:
    """Turn a released ADRec or SASRec+ checkpoint into a run that every command reads.

    Width, blocks, denoiser and positions are read off the weights. Heads (4), max_length (50), timesteps (32),
    schedule (trunc_lin), lambda_uncertainty (0.001), geodesic (false) and guidance_scale (1; another needs
    condition_dropout, 0.3 in the released code) are not in them and change results: give what differs with --set.
    """
    from adrec.checkpoint import save_run
    from adrec.config import ModelConfig, RunConfig, parse
    from adrec.data.dataset import Dataset
    from adrec.errors import RunError
    from adrec.files import check_output_folder
    from adrec.models import build_model
    from adrec.released import from_released, read_released

    if not file.is_file():
        raise RunError(f"{file}: no such file; give the released state dict (.pth)")
    check_output_folder(out, "--out")
    if out.exists() and any(out.iterdir()):
        raise RunError(f"{out}: exists and is not empty; choose another --out")
    state = from_released(read_released(file))
    data = Dataset.load(dataset)
    # The model is all there is to set, so its section may be left out.
    own = [setting.strip().removeprefix("model.") for setting in settings or []]
    config = parse(ModelConfig, apply_settings(_shape(state, str(file)), own), str(file))
    if config.items != data.item_count:
        raise RunError(f"{file}: has {config.items} items, but data set '{data.name}' has {data.item_count}")
    model = build_model(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise RunError(f"{file}: the weights do not fit {config.model} with {config}: {error}") from None
    save_run(out, RunConfig(model=config), model, data, str(dataset), {"imported_from": file.name})
    Console(soft_wrap=True).print(
        f"{config.model} with {config.items} items written to {out}; next: adrec evaluate {out}", highlight=False
    )


def _shape(state: dict[str, Any], where: str) -> dict[str, Any]:
    from adrec.errors import RunError

    table = state.get("item_embedding.weight")
    if table is None or table.dim() != 2:
        raise RunError(f"{where}: holds no item_embedding.weight; found {', '.join(sorted(state)[:5]) or 'nothing'}")
    blocks = {
        part: len({name.split(".")[2] for name in state if name.startswith(f"{part}.blocks.")})
        for part in ("encoder", "denoiser")
    }
    values: dict[str, Any] = {
        "model": "adrec" if "time_embedding.up.weight" in state else "sasrec",
        "items": table.shape[0] - 1,
        "width": table.shape[1],
        "encoder_blocks": blocks["encoder"],
        "padding": "released",
    }
    if "denoiser.norm.weight" in state:
        values["denoiser"] = "mlp"
    elif blocks["denoiser"]:
        values["denoiser_blocks"] = blocks["denoiser"]
    if "position_embedding.weight" in state:
        values |= {"positions": "released", "max_length": state["position_embedding.weight"].shape[0]}
    return values
