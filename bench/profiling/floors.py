"""The least work of each stage of a request, and the rates at which this machine does such work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from adrec.config import ModelConfig
from adrec.environment import Frozen
from bench.timing import Clock, TimingProtocol, clock_for, measure_interleaved
from kernels.inventory import Cost

PRODUCT_SIZE = 1024
COPY_BYTES = 2**28
PROTOCOL = TimingProtocol(seconds=0.5, rounds=3, rounds_slow=3, rounds_most=9, warmup_calls=2)


class Rates(Frozen):
    """What this machine reached just now: a square product in GFLOP/s, and a copy in GB/s (10^9, read and write)."""

    gflops: float
    gigabytes_per_second: float
    product_size: int = PRODUCT_SIZE
    copy_bytes: int = COPY_BYTES
    dtype: str

    def floor_ms(self, cost: Cost) -> tuple[float, str]:
        """Least milliseconds of a cost at these rates, and which of the two sets them."""
        compute, memory = cost.flops / self.gflops / 1e6, cost.bytes / self.gigabytes_per_second / 1e6
        return (compute, "compute") if compute >= memory else (memory, "memory")


def measure_rates(device: torch.device, dtype: torch.dtype, clock: Clock, protocol: TimingProtocol = PROTOCOL) -> Rates:
    """Time a product and a copy on a device; the best round counts, as a floor must not be above what is possible."""
    left, right = (torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype, device=device) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.ones(COPY_BYTES // 8, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    series = measure_interleaved(
        {
            "product": lambda number: torch.mm(left, right, out=product),
            "copy": lambda number: target.copy_(source),
        },
        protocol,
        clock,
    )
    best = {name: float(np.min(each.medians_ms)) for name, each in series.items()}
    return Rates(
        gflops=2 * PRODUCT_SIZE**3 / best["product"] / 1e6,
        # As many bytes are read as written.
        gigabytes_per_second=COPY_BYTES / best["copy"] / 1e6,
        dtype=str(dtype).removeprefix("torch."),
    )


@cache
def machine_rates(device: torch.device, dtype: torch.dtype, threads: int, seconds: float) -> Rates:
    """Rates of this process's machine, measured at the first call for a device, dtype and count of CPU threads.

    seconds: the most to spend on each of the two.
    """
    return measure_rates(device, dtype, clock_for(device), replace(PROTOCOL, seconds=min(PROTOCOL.seconds, seconds)))


def request_cost_of(config: ModelConfig, tokens: int, users: int, steps: int, itemsize: int) -> Cost | None:
    """Least work of a whole batch, the sum of `stage_costs`; None where those are not known."""
    costs = stage_costs(config, tokens, users, itemsize)
    if not costs:
        return None
    whole = [costs["encode"], *[costs["denoise step"]] * steps, costs["score"]]
    return Cost(bytes=sum(cost.bytes for cost in whole), flops=sum(cost.flops for cost in whole))


def stage_costs(config: ModelConfig, tokens: int, users: int, itemsize: int) -> Mapping[str, Cost]:
    """Least work of the stages of a batch; an empty mapping for a model other than ADRec with attention.

    Stages: ``encode`` (encoder on every token; the denoiser on the history, of whose last block only keys and values
    are needed), ``denoise step`` (one), ``score`` (the whole catalogue). A block holds `12 D^2` weights. Attention
    itself, some percent, is left out. Bytes: weights, item rows and the item table, each once; what a step reads may
    still lie in a cache, so that steps have none. Top-k has no floor: fused with the scores it reads nothing.
    """
    if config.model != "adrec" or config.denoiser != "att":
        return {}
    square, before = config.width**2, tokens - users
    block = 12 * square
    encode = config.encoder_blocks * block * tokens + ((config.denoiser_blocks - 1) * block + 2 * square) * before
    weights = (config.encoder_blocks + config.denoiser_blocks) * block
    return {
        "encode": Cost(bytes=(weights + tokens * config.width) * itemsize, flops=2 * encode),
        "denoise step": Cost(bytes=0, flops=2 * config.denoiser_blocks * block * users),
        "score": Cost(bytes=config.items * config.width * itemsize, flops=2 * users * config.items * config.width),
    }
