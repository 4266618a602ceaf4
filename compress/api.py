"""The one verb: apply a technique to a model, or a recipe to a run, and say in receipts what it did and cost."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from adrec.checkpoint import BASELINE, RUN_FILE, Run, load_run, save_run
from adrec.config import RunConfig, ServingConfig, StrictModel, parse
from adrec.data.dataset import Dataset, tool_version
from adrec.data.json_text import parse_json
from adrec.data.of_run import open_data
from adrec.errors import AdrecError, ConfigError, RunError
from adrec.files import check_output_folder, write_text
from adrec.models.adrec import ADRec
from adrec.models.base import SequenceModel
from adrec.source import SOURCE, KeptShare, Source
from compress.recipe import Recipe, entry_of
from compress.technique import METRIC, CompressionError, Draft, Receipt, Technique

COMPRESSION_FILE = "compression.json"

OnReceipt = Callable[[int, Receipt], None]
"""Called after a stage with its number, from 1, and its receipt."""


class Compression(StrictModel):
    """Contents of ``compression.json``: how a compressed run was made. engine: the one a search chose, if any did.

    teacher: the same of the run that was handed in, where that was compressed already.
    """

    schema_version: Literal[1] = 1
    tool_version: str
    teacher_fingerprint: str
    dataset_fingerprint: str
    seed: int
    recipe: dict[str, Any]
    receipts: tuple[Receipt, ...]
    engine: str | None = None
    teacher: Compression | None = None


def compress_(subject: SequenceModel | Draft, config: Technique, *, measure: bool = True) -> Receipt:
    """Apply one technique in place and return its receipt.

    A `Draft` with a data set gets the accuracy on validation into its receipt (not with ``measure=False``), and is as
    it was when anything raises: CompressionError when the technique cannot be applied or loses more than
    ``config.max_loss``. A bare model is changed in place; CompressionError, and an unchanged model, where part of the
    result would lie outside of it (run settings, another class of model): pass a Draft then.
    """
    if not isinstance(subject, Draft):
        return _compress_model(subject, config)
    before = subject.model, subject.settings
    evaluated = subject.evaluate() if measure and subject.dataset is not None else None
    try:
        receipt = entry_of(config).apply(subject, config)
        subject.changed()
        if evaluated is not None:
            receipt = receipt.model_copy(update={"accuracy": subject.accuracy(evaluated)})
        if config.max_loss is not None:
            _check_loss(receipt, config.max_loss)
    except BaseException:
        subject.model, subject.settings = before
        subject.changed()
        raise
    return receipt


def _compress_model(model: SequenceModel, config: Technique) -> Receipt:
    draft = Draft.of(copy.deepcopy(model))
    settings = draft.settings
    receipt = compress_(draft, config)
    # What the model is and how its numbers are stored, it says itself.
    told = {"model": settings.model, "quantization": settings.quantization}
    outside = draft.settings.model_copy(update=told) != settings
    if outside or type(draft.model) is not type(model):
        what = "settings of the run" if outside else f"a model of another class ({type(draft.model).__name__})"
        raise CompressionError(
            f"'{config.technique}' makes {what}, which a bare model cannot hold; pass a Draft"
            " (compress.Draft.of(model, dataset)) and take its model and settings"
        )
    vars(model).clear()
    vars(model).update(vars(draft.model))
    return receipt


def _check_loss(receipt: Receipt, bound: float) -> None:
    accuracy = receipt.accuracy
    if accuracy is None:
        raise CompressionError(
            f"max_loss is {bound:g} %, but without a data set no loss can be measured; pass Draft.of(model, dataset)"
            " and measure"
        )
    if accuracy.kept is not None and accuracy.loss > bound:
        kept, own = accuracy.kept, accuracy.kept_of_before
        alone = "" if own is None else f" ({100.0 - own.value:.2f} % by this stage itself)"
        raise CompressionError(
            f"loses {accuracy.loss:.2f} % [{100.0 - kept.high:.2f}, {100.0 - kept.low:.2f}] of the validation {METRIC}"
            f"{alone}; allowed: {bound:g} % (max_loss). Weaken or drop the stage, or allow more"
        )


def apply_recipe(draft: Draft, recipe: Recipe, on_receipt: OnReceipt | None = None) -> tuple[Receipt, ...]:
    """Apply the stages of a recipe to a draft with a data set; returns their receipts.

    Raises CompressionError naming the stage that cannot be applied or loses too much, with the receipts before it.
    """
    receipts: list[Receipt] = []
    for number, stage in enumerate(recipe.stages, 1):
        where = f"stage {number} of {len(recipe.stages)}, '{stage.technique}'"
        draft.report(where)
        try:
            receipts.append(compress_(draft, stage.model_copy(update={"max_loss": recipe.bound(stage)})))
        except AdrecError as error:
            raise CompressionError(f"{where}: {error}", tuple(receipts)) from error
        if on_receipt is not None:
            on_receipt(number, receipts[-1])
    return tuple(receipts)


def draft_of(run: Run, dataset: Dataset, *, seed: int = 0, report: Callable[[str], None] = lambda line: None) -> Draft:
    """A draft of a loaded run; its teacher is the run as it was handed in."""
    return Draft(run.model, run.settings, copy.deepcopy(run.model).eval(), dataset, seed, report)


def compress_run(
    run: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    data: Path | None = None,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
    on_receipt: OnReceipt | None = None,
) -> Compression:
    """Apply a recipe to a run folder and write the run folder ``out``, whole or not at all.

    The result loads like any run and holds ``compression.json``, which is returned, and a copy of the baseline.
    data: the data set of the run (None: where it was trained from). report: called with a line at each milestone.
    Raises CompressionError when a stage fails or loses too much, RunError or ConfigError for a bad run or ``out``.
    """
    out = Path(out)
    check_destination(out)
    loaded = load_run(run)
    earlier = read_compression(loaded.path)
    dataset = open_data(loaded, data)
    draft = draft_of(loaded, dataset, seed=seed, report=report)
    receipts = apply_recipe(draft, recipe, on_receipt)
    if draft.settings != served_as_measured(draft):
        report(
            f"note: neither {loaded.path} nor the recipe says how it is sampled, so the result takes all"
            f" {draft.model.config.timesteps} reverse steps, as measured; add `- technique: steps` for fewer"
        )
    made = compression_of(loaded, recipe, receipts, seed, earlier)
    write_compressed(out, draft, loaded, made, data_path=str(data) if data is not None else loaded.data_path)
    return made


def compression_of(
    run: Run, recipe: Recipe, receipts: tuple[Receipt, ...], seed: int, earlier: Compression | None
) -> Compression:
    """What ``compression.json`` says of a recipe applied to a run."""
    return Compression(
        tool_version=tool_version(),
        teacher_fingerprint=run.fingerprint,
        dataset_fingerprint=run.dataset_fingerprint,
        seed=seed,
        recipe=recipe.model_dump(mode="json", exclude_none=True),
        receipts=receipts,
        teacher=earlier,
    )


def check_destination(out: Path) -> None:
    """Raise before any work unless a new run can be written at ``out``."""
    check_output_folder(out, "--out")
    if (out / RUN_FILE).exists():
        raise ConfigError(f"--out is {out}: already holds a run; choose another --out or remove the folder")
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out is {out}: exists and is not empty; choose another --out or remove the folder")


def write_compressed(out: Path, draft: Draft, run: Run, made: Compression, *, data_path: str) -> None:
    """Write a draft as the run folder ``out``, staged beside it; ``run.json`` appears last.

    The baseline is copied, so that the folder can be moved and evaluated by itself.
    """
    dataset = draft.require_dataset("write")
    accuracy = made.receipts[-1].accuracy
    kept = None if accuracy is None or accuracy.kept is None else KeptShare(**accuracy.kept.model_dump())
    source = Source(run=str(run.path), model_fingerprint=run.fingerprint, validation_kept=kept)
    metrics: dict[str, Any] = {SOURCE: source.model_dump(mode="json")}
    if accuracy is not None:
        metrics["validation"] = {METRIC: accuracy.metrics[METRIC].value}
    existed = out.exists()
    out.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=out))
    try:
        if (run.path / BASELINE).is_dir():
            shutil.copytree(run.path / BASELINE, staged / BASELINE)
        write_text(staged / COMPRESSION_FILE, made.model_dump_json(indent=2) + "\n")
        save_run(staged, served_as_measured(draft), draft.model, dataset, data_path, metrics)
        _move_in(staged, out)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        if not existed:
            shutil.rmtree(out, ignore_errors=True)
        raise
    staged.rmdir()


def served_as_measured(draft: Draft) -> RunConfig:
    """The draft's settings, with all its reverse steps written down where no stage chose fewer.

    A run without serving settings is served with one step, which is not what the receipts measured.
    """
    if draft.settings.serving is None and isinstance(draft.model, ADRec):
        return draft.settings.model_copy(update={"serving": ServingConfig()})
    return draft.settings


def _move_in(staged: Path, out: Path) -> None:
    (out / RUN_FILE).unlink(missing_ok=True)
    for entry in sorted(staged.iterdir(), key=lambda each: each.name == RUN_FILE):
        target = out / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        entry.replace(target)


def read_compression(run: Path) -> Compression | None:
    """How a run was compressed, None if it was not; raises RunError for a damaged file or one of another version."""
    path = run / COMPRESSION_FILE
    if not path.exists():
        return None
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path}: the run cannot be read: {error}. Restore the file from a copy, or compress the original run again"
        ) from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != 1:
        raise RunError(
            f"{path}: schema version {version!r}, this adrec reads 1; compress the original run again, or use the"
            " adrec that made this one"
        )
    try:
        return parse(Compression, content, str(path))
    except ConfigError as error:
        raise RunError(f"{error}. Restore the file from a copy, or compress the original run again") from None
