"""`adrec train`: the three stages as one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from adrec.commands.options import apply_settings, section


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


def train(
    data: Annotated[Path, typer.Argument(help="Folder written by `adrec prepare`, or the authors' dataset.pkl.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="adrec (three stages, the default) or sasrec (the baseline alone).")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML with `model:` and `train:` sections.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override one setting: --set model.padding=masked. Repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, batches, noise and dropout.")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Most epochs of each stage (default 500).")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run, with the same settings.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
    devices: Annotated[str, typer.Option(help="Number of devices (DDP over several), or auto.")] = "auto",
    progress: Annotated[bool, typer.Option(help="Show the progress bar.")] = True,
) -> None:
    """Train ADRec: pre-train the item table (SASRec+), warm up with it frozen, then train everything.

    The run folder holds config.yaml, model.safetensors, metrics.json, logs (CSV, TensorBoard) and the SASRec+ baseline.
    """
    from adrec.config import RunConfig, TrainConfig, load_yaml, parse
    from adrec.data.dataset import Dataset
    from adrec.devices import check_accelerator
    from adrec.errors import ConfigError
    from adrec.files import check_output_folder
    from adrec.training.stages import JOB, train_run

    check_accelerator(device)
    if devices != "auto" and not (devices.isascii() and devices.isdigit() and int(devices) > 0):
        raise ConfigError(f"--devices is '{devices}'; allowed: auto or a whole number from 1")
    check_output_folder(out, "--out")
    console = Console(soft_wrap=True)
    dataset = Dataset.load(data)
    values: dict[str, Any] = {} if config is None else load_yaml(config)
    if resume and config is None and (out / JOB).is_file():
        # An interrupted run knows its settings; giving others is refused below.
        values = load_yaml(out / JOB)
        values.pop("dataset_fingerprint", None)
    where = str(config or "settings")
    model_section, train_section = section(values, "model", where), section(values, "train", where)
    model_section.setdefault("items", dataset.item_count)
    if model is not None and model_section.setdefault("model", model) != model:
        raise ConfigError(f"--model is '{model}', but the settings say '{model_section['model']}'; drop one")
    if seed is not None:
        train_section["seed"] = seed
    if epochs is not None:
        for stage in ("pretrain", "main"):
            section(train_section, stage, where)["epochs"] = epochs
    apply_settings(values, settings or [])
    if seed is not None and (other := section(values, "train", where).get("seed")) != seed:
        raise ConfigError(f"--seed is {seed}, but --set gives train.seed {other}; drop one")
    if section(values, "model", where).get("model") == "sasrec":
        # Alone, the baseline is what stage 1 would train.
        for name in ("positions", "dropout", "embedding_dropout"):
            stage_one = f"pretrain_{name}"
            default = train_section.get(stage_one, TrainConfig.model_fields[stage_one].default)
            model_section.setdefault(name, default)
    run_config = parse(RunConfig, values, where)
    train_run(
        dataset,
        str(data),
        out,
        run_config,
        resume=resume,
        accelerator=device,
        devices=devices if devices == "auto" else int(devices),
        progress=progress,
        report=lambda line: console.print(line, highlight=False),
    )
