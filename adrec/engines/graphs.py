"""Requests of fixed capacity for the triton engine, replayed as CUDA graphs: one launch from the host a request.

A graph has fixed shapes, so a request is padded: with filler users of one item up to the number of users, and to a
capacity of packed tokens. Which capacities pay is read from the length distribution (`token_capacities`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from adrec.data.jagged import Jagged
from adrec.engines.base import TopK, history_keys
from adrec.engines.triton import TritonEngine
from adrec.errors import ConfigError, NotSupportedError
from adrec.respacing import Steps
from kernels.philox import check_row_keys
from kernels.score_topk import counters

_FILLER_ITEM = 1
_SIMULATED_BATCHES = 1000
_CAPACITY_MULTIPLE = 64


def token_capacities(
    lengths: Tensor, users: int, max_length: int, shares: Sequence[float] = (0.5, 0.9, 0.99)
) -> list[int]:
    """Capacities, in packed tokens, for batches of ``users`` histories whose lengths are like ``lengths`` `[R]`.

    One for each share of random batches that must fit, rounded up to a multiple of 64, and ``users * max_length``,
    which fits all; ascending, without repetition. Deterministic.
    """
    if lengths.numel() == 0 or users < 1:
        raise ConfigError(f"{lengths.numel()} lengths and {users} users; expected 1 or more of both")
    largest = users * max_length
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(lengths.numel(), (_SIMULATED_BATCHES, users), generator=generator)
    totals = lengths.cpu().clamp(1, max_length)[picks].sum(1).double()
    wanted = torch.quantile(totals, torch.tensor(list(shares), dtype=torch.float64), interpolation="higher")
    rounded = (-(-wanted.long() // _CAPACITY_MULTIPLE) * _CAPACITY_MULTIPLE).clamp(max=largest)
    return sorted({*rounded.tolist(), largest})


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Make a CUDA device the current one; nothing for another device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class FixedRequest:
    """Buffers of one capacity and the launches that read them; use each from one stream and thread at a time.

    seed: `[1]` int64 on the device; a replay draws by its current value.
    """

    # Not inference mode: its tensors could not be written by a caller outside it, and the seed is for callers.
    @torch.no_grad()
    def __init__(self, engine: TritonEngine, users: int, tokens: int, k: int, steps: Steps) -> None:
        if tokens < users:
            raise ConfigError(f"a capacity of {tokens} tokens for {users} users; allowed: 1 token a user or more")
        self.engine, self.users, self.tokens, self.k = engine, users, tokens, k
        self.table = engine.table(steps)
        if self.table is not None and not self.table.starts_noisy and bool(self.table.sigma.any()):
            raise NotSupportedError(
                "a request of fixed capacity cannot start from zero and draw noise on the way: the seed lies on the"
                " device; start from noise, or sample with one step or with ddim and eta 0"
            )
        # A graph reads their memory: the engine keeps only the last tables of each number of steps.
        self._steps = None if self.table is None else engine.step_tables(self.table)
        self.seed = torch.zeros(1, dtype=torch.int64, device=engine.device)
        # Its own, since requests may run at the same time; made here, so that a graph does not fill it in each replay.
        self._arrivals = torch.zeros(counters(users), dtype=torch.int32, device=engine.device)
        # One buffer, so that a request is one copy to the device: items, offsets, row keys, places of the results.
        self._host = torch.zeros(tokens + 3 * users + 1, dtype=torch.int64, pin_memory=engine.device.type == "cuda")
        self._buffer = torch.zeros_like(self._host, device=engine.device)
        # The device may still read the host's buffer when the next request is written.
        self._copied = torch.cuda.Event() if engine.device.type == "cuda" else None
        self._write(Jagged.from_lists([]), torch.zeros(0, dtype=torch.int64))

    def _parts(self, buffer: Tensor) -> tuple[Tensor, ...]:
        """Items `[tokens]`, offsets `[users + 1]`, row keys and places `[users]`."""
        return buffer.split([self.tokens, self.users + 1, self.users, self.users])

    def fits(self, histories: Jagged) -> bool:
        """Whether a batch fits: its users, and its tokens with those of the filler users."""
        fillers = self.users - len(histories)
        return fillers >= 0 and histories.values.numel() + fillers <= self.tokens

    @torch.inference_mode()
    def __call__(self, histories: Jagged, *, seed: int | None = 0, row_keys: Tensor | None = None) -> TopK:
        """Recommend for up to ``users`` histories of 1 item or more; see `Engine.recommend`.

        seed: None leaves the device's seed, which the caller may write. Raises ValueError when the batch does not fit.
        """
        histories = histories.tail(self.engine.model.config.max_length).to("cpu")
        self.engine.check_histories(histories)
        if not self.fits(histories):
            raise ValueError(
                f"{len(histories)} histories of {histories.values.numel()} items do not fit {self.users} users and"
                f" {self.tokens} tokens (a filler user takes 1)"
            )
        if row_keys is not None and row_keys.shape != (len(histories),):
            raise ValueError(f"row_keys is {tuple(row_keys.shape)}; expected [{len(histories)}], one for each history")
        keys = history_keys(histories) if row_keys is None else row_keys.cpu()
        check_row_keys(keys)
        if seed is not None:
            self.seed.fill_(seed)
        self._write(histories, keys)
        found = self._run()
        # The next replay overwrites the results.
        return TopK(found.items[: len(histories)].clone(), found.scores[: len(histories)].clone())

    def _write(self, histories: Jagged, keys: Tensor) -> None:
        """Copy a batch, sorted by length, behind the filler users, which are the shortest."""
        if self._copied is not None:
            self._copied.synchronize()
        order = torch.argsort(histories.lengths, stable=True)
        ordered = histories.select(order)
        fillers = self.users - len(histories)
        items, offsets, row_keys, places = self._parts(self._host)
        items[:fillers] = _FILLER_ITEM
        items[fillers : fillers + ordered.values.numel()] = ordered.values
        offsets[:fillers] = torch.arange(fillers)
        offsets[fillers:] = ordered.offsets + fillers
        row_keys[:fillers] = 0
        row_keys[fillers:] = keys[order]
        places.zero_()
        places[order] = torch.arange(fillers, self.users)
        with _on(self.engine.device):
            self._buffer.copy_(self._host, non_blocking=True)
            if self._copied is not None:
                self._copied.record()

    def _body(self) -> TopK:
        items, offsets, row_keys, places = self._parts(self._buffer)
        state = self.engine.encode_sorted(Jagged(items, offsets))
        rows = self.engine.sample_sorted(state, self.table, seed=self.seed, row_keys=row_keys, steps=self._steps)
        found = self.engine.top_k(rows, self.k, arrivals=self._arrivals)
        return TopK(found.items[places], found.scores[places])

    def _run(self) -> TopK:
        return self._body()


class CapturedRequest(FixedRequest):
    """A `FixedRequest` captured in a CUDA graph when it is made: a call is one copy in, one replay, two copies out.

    A replay is the three kernels and two gathers of the results in the order of the request; with 16-bit weights one
    operator more rounds rows. A seed that is an int is written before, which is a launch of its own.
    """

    @torch.no_grad()
    def __init__(self, engine: TritonEngine, users: int, tokens: int, k: int, steps: Steps) -> None:
        if engine.device.type != "cuda":
            raise ConfigError(f"CUDA graphs need a CUDA device; the engine's model is on {engine.device}")
        super().__init__(engine, users, tokens, k, steps)
        with _on(engine.device):
            # Kernels compile and libraries initialise before the capture, on another stream as capturing demands.
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._body()
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._found = self._body()

    def _run(self) -> TopK:
        with _on(self.engine.device):
            self._graph.replay()
        return self._found


class CapturedEngine:
    """Graphs for several batch sizes and token capacities, captured at their first use.

    lengths: `[R]` history lengths of the requests to come, such as those of a data set. users: batch sizes.
    """

    def __init__(
        self,
        engine: TritonEngine,
        lengths: Tensor,
        *,
        k: int = 20,
        steps: Steps = None,
        users: Sequence[int] = (1, 8, 64, 512),
    ) -> None:
        longest = engine.model.config.max_length
        self.engine, self.k, self.steps = engine, k, steps
        self.capacities = [
            (batch, room) for batch in sorted(users) for room in token_capacities(lengths, batch, longest)
        ]
        self._captured: dict[tuple[int, int], CapturedRequest] = {}

    def recommend(self, histories: Jagged, *, seed: int = 0, row_keys: Tensor | None = None) -> TopK:
        """Replay the smallest graph that fits; a batch larger than every capacity goes through the engine itself.

        To draw by a seed that lives on the device use `CapturedRequest`. Items cannot be excluded in a graph.
        """
        histories = histories.tail(self.engine.model.config.max_length)
        tokens = histories.values.numel()
        for users, room in self.capacities:
            if len(histories) <= users and tokens + users - len(histories) <= room:
                if (users, room) not in self._captured:
                    self._captured[users, room] = CapturedRequest(self.engine, users, room, self.k, self.steps)
                return self._captured[users, room](histories, seed=seed, row_keys=row_keys)
        return self.engine.recommend(histories, self.k, self.steps, seed, row_keys)
