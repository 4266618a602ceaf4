"""The three stages as one resumable job that ends in a run folder."""

from __future__ import annotations

import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import Callback, EarlyStopping, RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from adrec.checkpoint import BASELINE, RUN_FILE, WEIGHTS, Run, load_run, save_run
from adrec.config import ModelConfig, OptimiserConfig, RunConfig, TrainConfig, load_yaml
from adrec.data.dataset import Dataset
from adrec.errors import ConfigError, DataError, RunError
from adrec.files import write_text
from adrec.models import ADRec, build_model
from adrec.training.batches import derive_seed, useful_tokens
from adrec.training.checkpoints import MovableCheckpoint, WholeCheckpointIO, read_checkpoint, stage_ended
from adrec.training.logs import stage_loggers
from adrec.training.module import MONITOR, StageModule

CHECKPOINTS, LOGS, JOB = "checkpoints", "logs", "job.yaml"


class _Progress(RichProgressBar):
    """Loss and validation NDCG@20, without the logger's version name."""

    def get_metrics(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        metrics = super().get_metrics(*arguments, **options)
        metrics.pop("v_num", None)
        return metrics


class _EpochTimes(Callback):
    """Wall-clock seconds of each training epoch, validation not counted."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = self._paused = 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        self._start, self._paused = time.perf_counter(), 0.0

    def on_validation_start(self, *_: Any) -> None:
        self._paused -= time.perf_counter()

    def on_validation_end(self, *_: Any) -> None:
        self._paused += time.perf_counter()

    def on_train_epoch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start - self._paused)


def train_run(
    dataset: Dataset,
    data_path: str,
    out: Path,
    settings: RunConfig,
    *,
    resume: bool = False,
    accelerator: str = "auto",
    devices: int | str = "auto",
    progress: bool = True,
    report: Callable[[str], None] = print,
) -> Run:
    """Train ``settings.model`` on a data set and write the run folder ``out``; returns the run as loaded from disk.

    An ``adrec`` model runs stage 1 first (its SASRec+ stays in ``out/baseline``). resume: continue an interrupted run
    with the same settings; finished stages are not repeated. report: called with a line of text at each milestone.
    Raises RunError when ``out`` holds something else, ConfigError or DataError when settings, devices and data do not
    fit, each before ``out`` is touched. SIGTERM ends the process with status 143, Ctrl-C is a KeyboardInterrupt; both
    are reported with the command that continues.
    """
    train = settings.train or TrainConfig()
    settings = settings.model_copy(update={"train": train})
    if getattr(rank_zero_only, "rank", 0) > 0:
        # Lightning starts the other processes by running the same command again, after this one has claimed `out`.
        resume, report = True, _silent
    _check(dataset, out, settings, resume)
    _check_devices(train, accelerator, devices)
    _claim(out, settings, dataset.fingerprint)
    share = useful_tokens(dataset.training_sequences(), settings.model.max_length, train.batch_size, train.seed)
    report(
        f"useful tokens: {share['linear']:.1f} % in linear layers, {share['attention']:.1f} % in attention"
        f" ({share['padded']:.1f} % if every history were padded to {settings.model.max_length})"
    )
    job = _Job(dataset, data_path, train, accelerator, devices, progress, report)
    try:
        return _stages(job, settings, train, out)
    except (KeyboardInterrupt, SystemExit):
        report(f"interrupted; `adrec train {data_path} --out {out} --resume`, with the same settings, continues")
        raise


def _stages(job: _Job, settings: RunConfig, train: TrainConfig, out: Path) -> Run:
    report = job.report
    if settings.model.model == "sasrec":
        run = job.stage(settings.model, out, train.pretrain, "pretrain", out)
        report(f"run written to {out}; next: adrec evaluate {out}")
        return run
    if (out / BASELINE / RUN_FILE).is_file():
        report("stage 1 is finished, using its item table")
        baseline = load_run(out / BASELINE)
    else:
        report("stage 1 of 3: pre-train the item table (SASRec+)")
        body = settings.model.baseline(train)
        baseline = job.stage(body, out / BASELINE, train.pretrain, "pretrain", out)
    if train.warmup_epochs < train.main.epochs:
        report(f"stages 2 and 3: warm up {train.warmup_epochs} epochs with the table frozen, then train everything")
    else:
        report(
            f"stage 2 only: all {train.main.epochs} epochs have the table frozen, because train.warmup_epochs is"
            f" {train.warmup_epochs}; train longer, or lower it"
        )
    table = baseline.model.table.detach()
    run = job.stage(settings.model, out, train.main, "main", out, table=table, frozen=train.warmup_epochs)
    report(f"run written to {out}; next: adrec evaluate {out}")
    return run


def _silent(line: str) -> None:
    """Report nothing."""


class _Job:
    def __init__(
        self,
        dataset: Dataset,
        data_path: str,
        train: TrainConfig,
        accelerator: str,
        devices: int | str,
        progress: bool,
        report: Callable[[str], None],
    ) -> None:
        self.dataset, self.data_path, self.train = dataset, data_path, train
        self.accelerator, self.devices = accelerator, devices
        self.progress, self.report = progress, report

    def stage(
        self,
        config: ModelConfig,
        target: Path,
        optimiser: OptimiserConfig,
        name: str,
        out: Path,
        *,
        table: torch.Tensor | None = None,
        frozen: int = 0,
    ) -> Run:
        """Train one model to early stopping, keep its best validation weights and write the run ``target``."""
        torch.manual_seed(derive_seed(self.train.seed, name, "weights"))
        model = build_model(config)
        if table is not None and isinstance(model, ADRec):
            model.load_table(table)
        module = StageModule(model, self.dataset, self.train, optimiser, name, frozen_epochs=frozen)
        folder = out / CHECKPOINTS / name
        best = MovableCheckpoint(
            folder, "best", monitor=MONITOR, mode="max", save_weights_only=True, enable_version_counter=False
        )
        last = MovableCheckpoint(folder, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        times = _EpochTimes()
        stopping = EarlyStopping(MONITOR, mode="max", patience=optimiser.patience, check_on_train_epoch_end=False)
        callbacks: list[Callback] = [
            best,
            last,
            times,
            stopping,
        ]
        if self.progress:
            callbacks.append(_Progress())
        resumed = folder / "last.ckpt"
        with quiet_lightning():
            epochs = read_checkpoint(resumed)["epoch"] + 1 if resumed.is_file() else 0
            trainer = self._trainer(optimiser, callbacks, stage_loggers(out / LOGS, name, epochs))
            # Interrupted between early stopping and writing the run, there is nothing left to train.
            if not stage_ended(resumed, stopping, best):
                trainer.fit(module, ckpt_path=str(resumed) if resumed.is_file() else None, weights_only=True)
                epochs = trainer.current_epoch
        weights = read_checkpoint(Path(best.best_model_path))["state_dict"]
        prefix = "model." if module.average is None else "average.module."
        kept = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        model.load_state_dict(kept)
        seconds = sorted(times.seconds)
        reached = float(best.best_model_score or 0.0)
        metrics = {
            "validation": {MONITOR.removeprefix("val_"): reached},
            "epochs": epochs,
            "epoch_seconds_median": seconds[len(seconds) // 2] if seconds else None,
        }
        if trainer.is_global_zero:
            settings = RunConfig(model=config, train=self.train)
            save_run(target, settings, model, self.dataset, self.data_path, metrics)
        trainer.strategy.barrier()
        self.report(f"{config.model}: best validation NDCG@20 {reached:.2f} % in {epochs} epochs -> {target / WEIGHTS}")
        return load_run(target)

    def _trainer(
        self, optimiser: OptimiserConfig, callbacks: list[Callback], loggers: list[Logger]
    ) -> lightning.Trainer:
        return lightning.Trainer(
            accelerator=self.accelerator,
            devices=self.devices,
            precision=self.train.precision,
            max_epochs=optimiser.epochs,
            check_val_every_n_epoch=min(optimiser.validate_every, optimiser.epochs),
            num_sanity_val_steps=0,
            callbacks=callbacks,
            logger=loggers,
            plugins=WholeCheckpointIO(),
            use_distributed_sampler=False,
            reload_dataloaders_every_n_epochs=1,
            enable_model_summary=False,
            enable_progress_bar=self.progress,
            log_every_n_steps=1,
        )


def _check(dataset: Dataset, out: Path, settings: RunConfig, resume: bool) -> None:
    if settings.model.items != dataset.item_count:
        raise ConfigError(
            f"model.items is {settings.model.items}, but data set '{dataset.name}' has {dataset.item_count} items"
        )
    if (out / RUN_FILE).is_file():
        raise RunError(f"{out}: already a finished run; choose another --out or remove the folder")
    if out.exists() and any(out.iterdir()):
        if not resume:
            raise RunError(
                f"{out}: exists and is not empty; continue an interrupted run with --resume or choose another --out"
            )
        if not (out / JOB).is_file():
            raise RunError(f"{out}: holds no interrupted run ({JOB} is missing); choose another --out, new or empty")
    if len(dataset.examples("validation")) == 0:
        raise DataError(f"data set '{dataset.name}' has no validation example; early stopping needs 1 or more")
    if int((dataset.training_sequences().lengths >= 2).sum()) == 0:
        raise DataError(f"data set '{dataset.name}' has no user with 2 training interactions or more")


def _check_devices(train: TrainConfig, accelerator: str, devices: int | str) -> None:
    """Raise ConfigError when the devices that Lightning finds cannot train with these settings."""
    try:
        with quiet_lightning():
            trainer = lightning.Trainer(
                accelerator=accelerator,
                devices=devices,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    except MisconfigurationException as error:
        raise ConfigError(f"--device {accelerator} --devices {devices}: {error}; choose from these") from None
    if train.precision == "16-mixed" and trainer.strategy.root_device.type == "cpu":
        raise ConfigError("train.precision is '16-mixed', which needs a GPU; use 32-true or bf16-mixed")
    if trainer.world_size > train.batch_size:
        raise ConfigError(
            f"train.batch_size is {train.batch_size}; allowed: {trainer.world_size} or more, one user for each process"
        )


def _claim(out: Path, settings: RunConfig, fingerprint: str) -> None:
    """Note in ``out`` what is being trained, or raise ConfigError when something else was being trained there."""
    wanted = {"dataset_fingerprint": fingerprint, **settings.model_dump(mode="json")}
    note = out / JOB
    if not note.is_file():
        out.mkdir(parents=True, exist_ok=True)
        write_text(note, yaml.safe_dump(wanted, sort_keys=False))
        return
    found = load_yaml(note)
    differing = sorted(_flat(wanted).items() ^ _flat(found).items())
    if differing:
        keys = ", ".join(dict.fromkeys(key for key, _ in differing))
        raise ConfigError(
            f"{out}: was being trained with other settings ({keys}); keep those in {JOB}, or choose another --out"
        )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": repr(value)}
    return flat


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Run Lightning without its advertisements and its notes about accelerators, and end as other programs do.

    Its own way is to leave with status 0 on SIGTERM and 1 on Ctrl-C: here SIGTERM raises SystemExit(143), and Ctrl-C
    KeyboardInterrupt.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in (
            ".*treespec, LeafSpec.*",
            ".*does not have many workers.*",
            ".*is not an instance of.*",
            ".*Checkpoint directory.*exists.*",
            ".*Experiment logs directory.*exists.*",
        ):
            warnings.filterwarnings("ignore", message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        except SIGTERMException:
            raise SystemExit(128 + signal.SIGTERM) from None
        except SystemExit:
            raise KeyboardInterrupt from None
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
