"""Engines over graphs that were exported before: whole requests, users of similar length together.

A request is one run of a ``request`` graph (see `compress.export`), which takes histories, lengths and noise and
returns items, scores and representations. `recommend` takes the lists from the graph, `represent` its representations.
Graphs come from a folder (`from_export`) or are exported on the first request for a number of steps and kept in a cache
folder. What reads the files is a subclass: `adrec.engines.onnxruntime`, `adrec.engines.aotinductor`,
`adrec.engines.tensorrt`.
"""

from __future__ import annotations

import math
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from adrec.checkpoint import model_fingerprint
from adrec.data.jagged import Jagged
from adrec.engines.base import Engine, PlanFeature, TopK, history_key
from adrec.engines.exported import (
    ExportError,
    GraphFile,
    GraphFormat,
    Manifest,
    Precision,
    check_graph,
    load_manifest,
)
from adrec.errors import ConfigError, NotSupportedError, nearest
from adrec.models.base import SequenceModel
from adrec.noise import ExplicitNoise, PhiloxNoise
from adrec.respacing import Steps
from adrec.schedule import DiffusionTable
from kernels import philox

EXPORTERS = "adrec.exporters"
RESULTS = 20
# From here on the steps are a loop: its graph is made once, and 32 unrolled steps take a minute to export.
MOST_UNROLLED = 8
# Rows of the item table that cost as much as a token of a model of two and two blocks.
_ROWS_PER_TOKEN = 5
Own = TypeVar("Own", bound="ExportedEngine")


@dataclass(frozen=True)
class PaddedGroups:
    """Histories in rectangles of similar length. rows: input rows `[U]` of each; histories: the same, jagged."""

    rows: tuple[Tensor, ...]
    histories: tuple[Jagged, ...]
    size: int


class ExportedEngine(Engine):
    """Runs exported graphs. Without a folder it exports what a request needs, and keeps it for the next process.

    only: the one file of the folder to use, whatever else it holds.
    """

    precision: ClassVar[Precision] = "fp32"
    format: ClassVar[GraphFormat]
    features = frozenset[PlanFeature]({"sampler dpm++2m", "start zero"})
    exports = True
    exporter: ClassVar[str | None] = None
    """What makes a file where no folder is given; None: the exporter of the format."""
    loops: ClassVar[bool] = False
    """Whether many steps are exported as a loop."""
    narrowest: ClassVar[int] = 1
    """Columns that a rectangle of histories has at least."""
    concurrent: int = 1
    """Runs at a time, each in a thread of its own."""
    run_tokens: ClassVar[float] = 16.0
    """What a run costs beside its tokens and its table, in tokens of a model of two and two blocks."""

    def __init__(self, model: SequenceModel, *, folder: Path | None = None, only: str | None = None) -> None:
        super().__init__(model)
        self.fingerprint = model_fingerprint(model.state_dict())
        self.folder, self.only = folder, only
        self._manifest: Manifest | None = None
        if folder is not None:
            self._manifest = load_manifest(folder)
            self._check_model(self._manifest, folder)
        self._sessions: dict[str, Any] = {}
        self._chosen: dict[Steps, tuple[GraphFile, Any]] = {}

    @classmethod
    def from_export(
        cls: type[Own], folder: Path | str, model: SequenceModel, *, precision: Precision | None = None, **options: Any
    ) -> Own:
        """An engine of the graphs in ``folder``, which must be of this model.

        precision: which of the folder's (None: its first). options: of the engine, such as threads and provider. Raises
        ExportError for a folder that is none, or of another model; ConfigError for a precision it does not hold.
        """
        folder = Path(folder)
        held = load_manifest(folder).precisions(cls.format)
        wanted = precision or (held[0] if held else None)
        if wanted is None or wanted not in held:
            raise ConfigError(
                f"{folder}: holds no {cls.format} request graph in {precision or 'any precision'}"
                f"{nearest(str(precision), held)}; it holds: {', '.join(held) or 'none'}"
            )
        kind = type(f"{cls.__name__}[{wanted}]", (cls,), {"name": f"{cls.name}[{wanted}]", "precision": wanted})
        engine: Own = kind(model, folder=folder, **options)
        return engine

    @abstractmethod
    def open(self, path: Path) -> Any:
        """Load a graph's file."""

    @abstractmethod
    def run(
        self, graph: GraphFile, session: Any, inputs: dict[str, np.ndarray], outputs: tuple[str, ...]
    ) -> dict[str, Tensor]:
        """Outputs of a loaded graph by name, on the CPU."""

    def encode(self, histories: Jagged) -> PaddedGroups:
        histories = histories.to("cpu")
        if len(histories) == 1:
            # What grouping costs is a tenth of a single user's request.
            return PaddedGroups((torch.zeros(1, dtype=torch.int64),), (histories,), 1)
        order = torch.argsort(histories.lengths, stable=True)
        lengths = histories.lengths[order]
        per_run = self.run_tokens + self.model.config.items / (_ROWS_PER_TOKEN * self.model.config.width)
        bounds = group_bounds(tuple(lengths.tolist()), per_run)
        rows = tuple(order[first:last] for first, last in pairwise(bounds))
        return PaddedGroups(rows, tuple(histories.select(part) for part in rows), len(histories))

    def sample(self, state: PaddedGroups, table: DiffusionTable | None, noise: PhiloxNoise | ExplicitNoise) -> Tensor:
        graph, session = self.session(table)
        out = torch.empty(state.size, self.model.config.width)
        for rows, found in self._runs(graph, session, state, table, noise, ("rows",)):
            out[rows] = found["rows"]
        return out.to(self.device)

    @torch.inference_mode()
    def recommend(
        self,
        histories: Jagged,
        k: int,
        steps: Steps = None,
        seed: int = 0,
        row_keys: Tensor | None = None,
        exclude: Jagged | None = None,
    ) -> TopK:
        """Lists as the graph ranks them.

        With ``exclude``, or a k above the graph's, the graph gives representations and they are scored as in the other
        engines; see `Engine.recommend` for the arguments.
        """
        table = self.table(steps)
        self._check_top_k(torch.empty(len(histories), 0), k, exclude)
        graph, session = self.session(table)
        if exclude is not None or graph.k is None or k > graph.k or len(histories) == 0:
            return super().recommend(histories, k, steps, seed, row_keys, exclude)
        if len(histories) == 1:
            inputs = self._single(graph, session, histories, table, seed, row_keys)
            found = self.run(graph, session, inputs, ("items", "scores"))
            return TopK(found["items"][:, :k].to(self.device), found["scores"][:, :k].to(self.device))
        histories, noise = self._checked(histories, table, seed, row_keys=row_keys)
        state = self.encode(histories)
        items = torch.empty(state.size, k, dtype=torch.int64)
        scores = torch.empty(state.size, k)
        for rows, found in self._runs(graph, session, state, table, noise, ("items", "scores")):
            items[rows], scores[rows] = found["items"][:, :k], found["scores"][:, :k]
        return TopK(items.to(self.device), scores.to(self.device))

    def _single(
        self,
        graph: GraphFile,
        session: Any,
        histories: Jagged,
        table: DiffusionTable | None,
        seed: int,
        row_keys: Tensor | None,
    ) -> dict[str, np.ndarray]:
        """Checked inputs of one user, made in numpy: what grouping and torch's calls cost is a third of its request."""
        items = histories.values.cpu().numpy()
        if row_keys is not None or not (len(items) and items.min() >= 1 and items.max() <= self.model.config.items):
            self._checked(histories, table, seed, row_keys=row_keys)
        items = items[-self.model.config.max_length :]
        padded = np.zeros((1, self.columns(session, 1, len(items))), dtype=items.dtype)
        padded[0, padded.shape[1] - len(items) :] = items
        drawn: Iterable[NDArray[np.float32]] = ()
        if table is not None:
            keys = np.array([history_key(items)]) if row_keys is None else row_keys.cpu().numpy()
            drawn = philox.draw_noise(seed, keys, table.draws, self.model.config.width)
        return request_inputs(graph, padded, np.array([len(items)]), table, drawn, self.model)

    def _runs(
        self,
        graph: GraphFile,
        session: Any,
        state: PaddedGroups,
        table: DiffusionTable | None,
        noise: PhiloxNoise | ExplicitNoise,
        outputs: tuple[str, ...],
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Input rows and outputs of each run, in no certain order."""

        place = noise.values.device if isinstance(noise, ExplicitNoise) else torch.device("cpu")

        def given(rows: Tensor, histories: Jagged, columns: int) -> dict[str, np.ndarray]:
            items, lengths = histories.padded(columns).numpy(), histories.lengths.numpy()
            theirs = noise if state.size == 1 else noise.select(rows.to(place))
            return request_inputs(graph, items, lengths, table, draws_of(theirs, table), self.model)

        # All widths first: where a run of the request is not possible, none is started.
        parts = [
            (rows, histories, self.columns(session, len(rows), histories.longest))
            for rows, histories in self._parts(state, self.most_users(session))
        ]
        if self.concurrent == 1 or len(parts) == 1:
            for rows, histories, columns in parts:
                yield rows, self.run(graph, session, given(rows, histories, columns), outputs)
            return
        # The largest first: what is started last keeps the others waiting least.
        parts.sort(key=lambda part: -len(part[0]) * part[2])
        running = [
            (rows, self._pool.submit(self.run, graph, session, given(rows, histories, columns), outputs))
            for rows, histories, columns in parts
        ]
        for rows, found in running:
            yield rows, found.result()

    def _parts(self, state: PaddedGroups, most_users: int | None) -> list[tuple[Tensor, Jagged]]:
        """Rows and histories of each run: groups, cut where one would outlast its share of the concurrent runs."""
        tokens = [len(rows) * each.longest for rows, each in zip(state.rows, state.histories, strict=True)]
        parts = []
        for rows, histories, size in zip(state.rows, state.histories, tokens, strict=True):
            pieces = math.ceil(size * self.concurrent / sum(tokens))
            users = min(most_users or len(rows), math.ceil(len(rows) / pieces))
            if users >= len(rows):
                parts.append((rows, histories))
                continue
            for part in torch.arange(len(rows)).split(users):
                parts.append((rows[part], histories.select(part)))
        return parts

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self.concurrent, thread_name_prefix=self.name)

    def most_users(self, session: Any) -> int | None:
        """Users that a run takes at most; None: any number."""
        return None

    def columns(self, session: Any, users: int, longest: int) -> int:
        """Width of the rectangle that a run of ``users`` histories is given; ``longest`` or more changes no result.

        Raises ConfigError where no width fits.
        """
        return max(self.narrowest, longest)

    def session(self, table: DiffusionTable | None) -> tuple[GraphFile, Any]:
        """The graph that runs a table, and its session. Raises ConfigError where the folder has none."""
        steps = self._plan_of(table)
        if steps not in self._chosen:
            graph, path = self._find(table)
            if graph.sha256 not in self._sessions:
                self._sessions[graph.sha256] = self.open(path)
            self._chosen[steps] = graph, self._sessions[graph.sha256]
        return self._chosen[steps]

    def file_bytes(self, steps: Steps = None) -> int:
        """Bytes of the file that requests run, its weights elsewhere included; see `session` for what is raised."""
        graph, path = self._find(self.table(steps))
        return sum((path.parent / name).stat().st_size for name in (graph.file, graph.data) if name is not None)

    def _find(self, table: DiffusionTable | None) -> tuple[GraphFile, Path]:
        """The graph that runs a table, and its file."""
        steps = self._plan_of(table)
        folder, manifest = self._graphs(steps)
        graph = manifest.choose("request", self.precision, steps, only=self.only, format=self.format)
        if graph is None or (graph.loop and table is not None and table.from_previous is not None):
            held = [
                str(each.steps or "loop")
                for each in manifest.graphs
                if each.kind == "request" and each.format == self.format
            ]
            raise ConfigError(
                f"{folder}: holds no {self.precision} graph for {steps} steps; it holds: {', '.join(held)};"
                f" export it with --steps {table.steps if table is not None else 1}"
            )
        return graph, check_graph(folder, graph)

    def _plan_of(self, table: DiffusionTable | None) -> Steps:
        """The plan that a table was made for: tables are kept by plan, and come back as they were given out."""
        if table is None:
            return None
        plan = next((plan for plan, kept in self._tables.items() if kept is table), table.steps)
        return self.model.config.timesteps if plan is None else plan

    def _graphs(self, steps: Steps) -> tuple[Path, Manifest]:
        if self.folder is not None and self._manifest is not None:
            return self.folder, self._manifest
        loop = self.loops and isinstance(steps, int) and steps > MOST_UNROLLED
        return export_for(
            self.exporter or self.format, self.model, self.fingerprint, None if loop else steps, loop, self.precision
        )

    def _check_model(self, manifest: Manifest, folder: Path) -> None:
        if manifest.model_fingerprint != self.fingerprint:
            raise ExportError(
                f"{folder}: was exported from another model ({manifest.model_fingerprint[:12]}) than this one"
                f" ({self.fingerprint[:12]}); export this run, or load the one it came from"
            )


def request_inputs(
    graph: GraphFile,
    items: NDArray[np.int64],
    lengths: NDArray[np.int64],
    table: DiffusionTable | None,
    drawn: Iterable[NDArray[np.float32]],
    model: SequenceModel,
) -> dict[str, np.ndarray]:
    """What a graph is given for a group of `U` users.

    items: their histories, left-padded to the longest or more, `[U, L]`. lengths: `[U]`. drawn: their noise, `[U, D]`
    for each of ``table.draws``.
    """
    kinds = {spec.name: spec.dtype for spec in graph.inputs}
    names = set(kinds)
    inputs: dict[str, np.ndarray] = {"lengths": lengths}
    if "histories" in names:
        inputs["histories"] = items
    if "embedded" in names:
        rows_of_table = model.table.detach().cpu()[items]
        inputs["embedded"] = rows_of_table.to(getattr(torch, kinds["embedded"])).numpy()
    if "noise" in names and table is not None:
        # Rows that no coefficient reads stay zero: nothing is drawn for them.
        noise = np.zeros((table.steps + 1, len(lengths), model.config.width), dtype=np.float32)
        for draw, values in zip(table.draws, drawn, strict=True):
            noise[draw] = values
        inputs["noise"] = noise
    if "times" in names and table is not None:
        coefficients = torch.stack([table.from_x0, table.from_xt, table.sigma], 1)
        inputs |= {"times": table.time.numpy(), "coefficients": coefficients.contiguous().numpy()}
    if "table" in names:
        inputs["table"] = model.table.detach().cpu().to(getattr(torch, kinds["table"])).numpy()
    return inputs


def draws_of(noise: PhiloxNoise | ExplicitNoise, table: DiffusionTable | None) -> Iterator[NDArray[np.float32]]:
    """The noise that sampling with a table reads, `[B, D]` a draw; one or a few are in memory."""
    for draw in () if table is None else table.draws:
        yield noise(draw).float().cpu().numpy()


def group_bounds(lengths: tuple[int, ...], run_tokens: float) -> tuple[int, ...]:
    """Cut rising lengths into groups, each padded to its longest, at the least cost.

    A group costs its padded tokens and ``run_tokens`` more. Returns where groups begin, and the end.
    """
    edges = [0, *(place for place in range(1, len(lengths)) if lengths[place] != lengths[place - 1]), len(lengths)]
    cheapest, began = [0.0] + [math.inf] * (len(edges) - 1), [0] * len(edges)
    for end in range(1, len(edges)):
        longest = lengths[edges[end] - 1]
        for start in range(end):
            cost = cheapest[start] + run_tokens + (edges[end] - edges[start]) * longest
            if cost < cheapest[end]:
                cheapest[end], began[end] = cost, start
    bounds, place = [edges[-1]], len(edges) - 1
    while place:
        place = began[place]
        bounds.append(edges[place])
    return tuple(reversed(bounds))


def export_for(
    exporter: str, model: SequenceModel, fingerprint: str, steps: Steps, loop: bool, precision: Precision
) -> tuple[Path, Manifest]:
    """Export the graph of a plan into the cache folder, or find it there; returns its folder and manifest."""
    exporters = {entry.name: entry for entry in entry_points(group=EXPORTERS)}
    if exporter not in exporters:
        raise NotSupportedError("this installation exports nothing: install adrec as a whole (pip install .)")
    export: Callable[..., Path] = exporters[exporter].load()
    folder = export(model, cache_folder() / fingerprint[:32], steps=steps, loop=loop, precision=precision, k=RESULTS)
    return folder, load_manifest(folder)


def cache_folder() -> Path:
    """Where engines keep what they export: ``adrec/exports`` in the user's cache folder."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "adrec" / "exports"
