"""Making the candidates of a search: each stage is applied once, and what was trained is kept in a folder."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from adrec.checkpoint import RUN_FILE, Run, load_run
from adrec.config import ModelConfig, parse
from adrec.data.dataset import Dataset
from adrec.errors import ConfigError, nearest
from compress.api import compress_, compression_of, draft_of, read_compression, write_compressed
from compress.candidates import Option, Space
from compress.recipe import Recipe, entry_of, read_stages
from compress.technique import CompressionError, Draft, Receipt, Technique

KEEP_ALL = 99.9
TEACHER = "teacher"
AUTO = "auto"
_TABLE: dict[str, object] = {"technique": "item_table"}
_BF16_TABLE: dict[str, object] = {"technique": "item_table", "format": "bf16"}
PRECISIONS: dict[str, list[dict[str, object]]] = {
    "float32": [],
    "bf16 table": [_BF16_TABLE],
    "int8 table": [_TABLE],
    "int8 weights": [{"technique": "quantize"}],
    "bf16": [{"technique": "quantize", "format": "bf16", "compute": "bfloat16"}, _BF16_TABLE],
    "int8": [{"technique": "quantize"}, _TABLE],
    "int8 bf16": [{"technique": "quantize", "compute": "bfloat16"}, _TABLE],
    "int8 dynamic": [{"technique": "quantize", "format": "int8-dynamic"}, _TABLE],
    "int4": [{"technique": "quantize", "format": "int4", "fallback": "int8"}, _TABLE],
}
"""Stages of each precision, by the name that commands take.

bf16: stored and computed in it. int8 bf16: stored in int8, computed in bfloat16. int8 dynamic: computed with integers.
int4: layers that bear it, others in int8.
"""

Made = tuple[Draft, tuple[Receipt, ...]]


class Workshop:
    """Applies stages to a run, each prefix of a recipe once.

    A stage that trains is written to ``folder`` as a run, with its receipts, and read back by a later process.
    """

    def __init__(
        self, run: Run, dataset: Dataset, folder: Path, *, seed: int = 0, report: Callable[[str], None] = print
    ) -> None:
        self.run, self.dataset, self.folder, self.seed, self.report = run, dataset, folder, seed, report
        self._made: dict[tuple[str, ...], Made] = {(): (draft_of(run, dataset, seed=seed, report=report), ())}

    def make(self, stages: Sequence[Technique]) -> Made:
        """The draft after these stages, and their receipts with accuracy; AdrecError where one cannot be applied."""
        key = tuple(stage.model_dump_json() for stage in stages)
        if key not in self._made:
            trains = entry_of(stages[-1]).trains
            kept = self._kept(stages) if trains else None
            self._made[key] = self._apply(stages) if kept is None else kept
            if trains and kept is None:
                self._keep(stages, self._made[key])
        draft, receipts = self._made[key]
        return copy.copy(draft), receipts

    def _apply(self, stages: Sequence[Technique]) -> Made:
        # Once, before it is copied with the draft.
        self._made[()][0].teacher_evaluation()
        draft, receipts = self.make(stages[:-1])
        return draft, (*receipts, compress_(draft, stages[-1]))

    def _place(self, stages: Sequence[Technique]) -> Path:
        settings = self.run.settings.model_dump(mode="json")
        content = [self.run.fingerprint, settings, self.run.dataset_fingerprint, self.seed]
        content += [stage.model_dump(mode="json") for stage in stages]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{stages[-1].technique}-{digest[:12]}"

    def _kept(self, stages: Sequence[Technique]) -> Made | None:
        place = self._place(stages)
        made = read_compression(place)
        if made is None or not (place / RUN_FILE).is_file():
            return None
        self._made[()][0].teacher_evaluation()
        run, (draft, _) = load_run(place), self.make(())
        draft.model, draft.settings = run.model, run.settings
        draft.changed()
        self.report(f"{stages[-1].technique}: trained already, read from {place}")
        return draft, made.receipts

    def _keep(self, stages: Sequence[Technique], made: Made) -> None:
        draft, receipts = made
        recipe = Recipe(stages=tuple(stages), max_loss=KEEP_ALL)
        story = compression_of(self.run, recipe, receipts, self.seed, None)
        write_compressed(self._place(stages), draft, self.run, story, data_path=self.run.data_path)


def space_of(
    model: ModelConfig,
    students: Sequence[str],
    precisions: Sequence[str],
    steps: Sequence[int],
    engines: Sequence[str],
) -> Space:
    """The candidates that commands name: ``teacher`` or ``E+D`` blocks, precisions, step counts and engines.

    precisions: of `PRECISIONS`, or auto, which is all of them: so that the choice, which is never one that is surely
    slower than another that keeps the accuracy, has been held against float32 and bf16 at the batch sizes asked for.
    Raises ConfigError naming what is unknown, or outside of what the model has.
    """
    for name in precisions:
        if name not in (AUTO, *PRECISIONS):
            allowed = ", ".join((AUTO, *PRECISIONS))
            raise ConfigError(f"--precisions holds '{name}'{nearest(name, (AUTO, *PRECISIONS))}; allowed: {allowed}")
    stages = {name: read_stages(PRECISIONS[name]) for name in PRECISIONS if {name, AUTO} & set(precisions)}
    return Space(
        students=tuple(_student_options(model, students)),
        precisions=tuple(
            Option(name, own, frozenset(other for other, less in stages.items() if _part(less, own)))
            for name, own in sorted(stages.items(), key=lambda each: len(each[1]))
        ),
        step_stages=_step_stages(model, steps),
        engines=tuple(engines),
    )


def _part(less: Sequence[Technique], more: Sequence[Technique]) -> bool:
    return len(less) < len(more) and all(stage in more for stage in less)


def _step_stages(model: ModelConfig, steps: Sequence[int]) -> dict[int, tuple[Technique, ...]]:
    if model.model != "adrec":
        return {0: ()}
    for count in steps:
        if not 1 <= count <= model.timesteps:
            raise ConfigError(f"--steps holds {count}; allowed: 1 to {model.timesteps}, those the run was trained with")
    return {count: read_stages([{"technique": "steps", "steps": count}]) for count in steps}


def _student_options(model: ModelConfig, students: Sequence[str]) -> list[Option]:
    blocks: dict[str, tuple[int, int]] = {}
    for name in students:
        shape = [int(part) for part in name.split("+") if part.strip().isdecimal()]
        if name == TEACHER:
            blocks[name] = (2**31, 2**31)
        elif len(shape) == 2 and name.count("+") == 1:
            blocks[f"{shape[0]}+{shape[1]}"] = (shape[0], shape[1])
        else:
            raise ConfigError(
                f"--students holds '{name}'; allowed: '{TEACHER}' for the run's own network, or blocks of the encoder"
                " and of the denoiser, such as 1+1 or 2+0"
            )
    options = []
    # Deeper ones first, so that what a smaller one adds to the loss is known.
    for name, (encoder, denoiser) in sorted(blocks.items(), key=lambda each: [-part for part in each[1]]):
        deeper = {other for other, size in blocks.items() if size[0] >= encoder and size[1] >= denoiser}
        own = () if name == TEACHER else (_student(model, name, encoder, denoiser),)
        # A student is taught for one step, if it has any.
        steps = None if name == TEACHER else min(denoiser, 1)
        options.append(Option(name, own, frozenset(deeper - {name}), steps))
    return options


def _student(model: ModelConfig, name: str, encoder: int, denoiser: int) -> Technique:
    # At use: students bring Lightning with them.
    from compress.student import StudentConfig, student_config

    values = {"encoder_blocks": encoder, "denoiser_blocks": denoiser}
    stage = parse(StudentConfig, values, f"--students holds '{name}'")
    try:
        # What cannot be made must be refused before anything is measured.
        student_config(model, stage)
    except CompressionError as error:
        raise ConfigError(f"--students holds '{name}': {error}") from None
    return stage
