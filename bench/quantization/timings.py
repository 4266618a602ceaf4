"""Time ratios to float32, in the same rounds: quantised layers, scoring a quantised table, whole requests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adrec.config import LayerFormat, ProductQuantization, TableFormat
from adrec.data.dataset import Examples
from adrec.data.jagged import Jagged
from adrec.engines import CachedEngine
from adrec.engines.base import SCORES_BUDGET
from adrec.engines.top_k import chunked_top_k, quantized_top_k
from adrec.evaluation import top_overlap
from adrec.models.base import SequenceModel
from adrec.models.item_tables import QuantizedTable
from bench.timing import Call, TimingProtocol, measure_interleaved, paired_ratio
from compress.rounding import quantized_linear, torchao_quantization

SHAPES = ((128, 384), (128, 128), (128, 512), (512, 128))
LAYER_ROWS = (1, 8, 32, 64, 128, 512, 4096, 20000)
CATALOGUES = (6086, 2**14, 2**15, 2**17, 10**6)
BATCHES = (1, 8, 64, 512)
WIDTH, K = 128, 20
_WITH_CODES = 2**17


def layer_rows(seconds: float) -> Iterator[dict[str, Any]]:
    """Layers of the paper's shapes: float32 against int8-dynamic, bfloat16, and torchao's own eager int8 layer."""
    torchao = torchao_quantization()
    for inputs, outputs in SHAPES:
        torch.manual_seed(0)
        layer = nn.Linear(inputs, outputs)
        ours = quantized_linear(layer, LayerFormat(format="int8-dynamic"))
        halves = quantized_linear(layer, LayerFormat(format="int8", compute="bfloat16"))
        theirs = nn.Linear(inputs, outputs)
        theirs.load_state_dict(layer.state_dict())
        torchao.quantize_(theirs, torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
        for count in LAYER_ROWS:
            rows = torch.randn(count, inputs)
            calls = {
                "float32": _call(layer, rows),
                "int8-dynamic": _call(ours, rows),
                "torchao int8 dynamic, eager": _call(theirs, rows),
                "int8, computed in bfloat16": _call(halves, rows),
            }
            with torch.inference_mode():
                yield {"inputs": inputs, "outputs": outputs, "rows": count, **_ratios(calls, seconds)}


def scoring_rows(seconds: float) -> Iterator[dict[str, Any]]:
    """Top 20 of random tables: a float32 matrix product against the stored numbers, with the recall of the lists."""
    for items in CATALOGUES:
        generator = torch.Generator().manual_seed(items)
        table = 0.1 * torch.randn(items + 1, WIDTH, generator=generator)
        table[0] = 0.0
        formats = {"int8": TableFormat(format="int8"), "bf16": TableFormat(format="bf16")}
        if items >= _WITH_CODES:
            formats["int8 with 64 product codes"] = TableFormat(
                format="int8", product=ProductQuantization(subspaces=64)
            )
        stored = {name: QuantizedTable.of(table, each) for name, each in formats.items()}
        for each in stored.values():
            # Without the float32 copy that a small table keeps, which is scored like any float32 table.
            each.dense = None
        for batch in BATCHES:
            rows = torch.randn(batch, WIDTH, generator=generator)
            exact = _float32_top_k(table, rows).items
            calls = {"float32": _call(_float32_top_k, table, rows)}
            calls |= {name: _call(quantized_top_k, each, rows, K, None) for name, each in stored.items()}
            with torch.inference_mode():
                recall = {
                    name: round(float(top_overlap(quantized_top_k(each, rows, K, None).items, exact).mean()), 4)
                    for name, each in stored.items()
                }
                yield {"items": items, "users": batch, "recall@20": recall, **_ratios(calls, seconds)}


def engine_rows(models: Mapping[str, SequenceModel], examples: Examples, seconds: float) -> Iterator[dict[str, Any]]:
    """Whole requests, one reverse step and the top 20, in `cached`; the first model is float32."""
    engines = {name: CachedEngine(model) for name, model in models.items()}
    for batch in (1, 512):
        generator = torch.Generator().manual_seed(batch)
        picks = [torch.randperm(len(examples), generator=generator)[:batch] for _ in range(8)]
        histories = [examples.histories.select(rows) for rows in picks]
        calls = {name: _requests(engine, histories) for name, engine in engines.items()}
        yield {"users": batch, **_ratios(calls, seconds)}


def _call(function: Callable[..., Any], *arguments: Any) -> Call:
    return lambda number: function(*arguments)


def _requests(engine: CachedEngine, histories: list[Jagged]) -> Call:
    return lambda number: engine.recommend(histories[number % len(histories)], K, 1)


def _float32_top_k(table: Tensor, rows: Tensor) -> Any:
    items = table.shape[0] - 1
    chunk = max(K, min(items, SCORES_BUDGET // rows.shape[0]))
    return chunked_top_k(lambda first, last: rows @ table[first:last].T, rows, items, chunk, K, None)


def _ratios(calls: Mapping[str, Call], seconds: float) -> dict[str, Any]:
    """Median time of the first call in ms, and that of the others over it, [median, low, high] over rounds."""
    found = measure_interleaved(calls, TimingProtocol(seconds=seconds, rounds=9, rounds_slow=3))
    errors = {name: series.error for name, series in found.items() if series.error}
    if errors:
        raise RuntimeError(f"a call failed while it was measured: {errors}")
    first, *others = found
    base = found[first].medians_ms
    ratios = {name: [round(each, 3) for each in paired_ratio(found[name].medians_ms, base)] for name in others}
    return {f"{first}_ms": round(float(torch.tensor(base).median()), 4), "time_over_float32": ratios}
