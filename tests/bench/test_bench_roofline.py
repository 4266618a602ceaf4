"""`adrec kernels roofline`: floors by hand, devices by name, costs of every kernel, and what records reach of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_kernels
import typer
from typer.testing import CliRunner

from adrec.errors import AdrecError, ConfigError
from bench.kernels.commands import register
from bench.kernels.gpus import GPUS, gpu_of_device
from bench.kernels.measure import GRAPH, KernelBench, Timer
from bench.kernels.records import KernelRecord, append_record
from bench.kernels.selection import choose_cases
from bench.timing import Clock, TimingProtocol
from kernels import _runtime
from kernels.inventory import Cost, Entry, entries

CPU = torch.device("cpu")


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of kernels is that of the toys."""
    monkeypatch.setattr("bench.kernels.selection.entries", lambda: toy_kernels.ENTRIES)


def invoke(*arguments: str) -> Any:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, ["kernels", "roofline", *arguments])


def test_figures_are_dense_and_in_order() -> None:
    assert list(GPUS) == ["A100", "H100", "H200", "B200", "L4"]
    for gpu in GPUS.values():
        half, full = gpu.peaks[torch.bfloat16], gpu.peaks[torch.float32]
        assert full < half == gpu.peaks[torch.float16]
        # Tensor cores double their rate with half the bits; a figure with sparsity would show here.
        assert gpu.peaks[torch.int8] == pytest.approx(2 * half, rel=0.01)
        assert gpu.peaks.get(torch.float8_e4m3fn, 2 * half) == pytest.approx(2 * half, rel=0.01)
        assert "NVIDIA" in gpu.source
    assert torch.float8_e4m3fn not in GPUS["A100"].peaks
    assert GPUS["A100"].peak(torch.float8_e4m3fn) == GPUS["A100"].peak(torch.float16)


def test_floors_by_hand() -> None:
    h200 = GPUS["H200"]
    # A catalogue of 10 million rows of 128 bf16 numbers: 2.56 GB at 4.8 TB/s are 533 us.
    streaming = h200.floor(Cost(bytes=2_560_000_000, flops=2 * 10_000_000 * 128), torch.bfloat16)
    assert (streaming.microseconds, streaming.bound) == (pytest.approx(533.3, rel=1e-3), "memory")
    # 512 users of 40 MFLOP at 989.5 TFLOPS: 21 us; at the 67 TFLOPS of exact float32: 306 us.
    work = Cost(bytes=1_600_000, flops=512 * 40_000_000)
    assert h200.floor(work, torch.bfloat16).microseconds == pytest.approx(20.7, rel=1e-2)
    assert h200.floor(work, torch.float32).microseconds == pytest.approx(305.7, rel=1e-2)
    assert h200.floor(work, torch.float32).bound == "compute"


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        # Other memory, other bandwidth: no floor rather than a wrong one.
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA GB200", None),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_devices_by_the_name_that_torch_gives(device: str, name: str | None) -> None:
    gpu = gpu_of_device(device)
    assert (None if gpu is None else gpu.name) == name


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_every_kernel_says_what_it_costs(entry: Entry) -> None:
    for name, shape in entry.shapes.items():
        by_bits = {}
        for dtype in entry.dtypes:
            cost = entry.cost(shape, dtype)
            assert cost.bytes > 0, name
            assert cost.flops > 0, name
            by_bits.setdefault(dtype.itemsize, cost)
        # Fewer bits move fewer bytes, for the same arithmetic.
        sizes = [by_bits[bits].bytes for bits in sorted(by_bits)]
        assert sizes == sorted(sizes), name
    for text in (entry.summary, entry.use_when, entry.avoid_when):
        assert text.strip()


@pytest.mark.usefixtures("toys")
def test_roofline_of_a_custom_shape() -> None:
    done = invoke("--kernel", "scale", "--shape", "rows=1000,width=1000", "--dtype", "fp32", "--gpu", "L4,H100")
    assert done.exit_code == 0, done.output
    # 8 MB at 300 and at 3350 GB/s.
    for text in ("rows=1000 width=1000", "0.125", "26.7", "2.39", "memory", "NVIDIA L4 Tensor Core GPU data sheet"):
        assert text in done.output
    assert "A100" not in done.output


@pytest.mark.usefixtures("toys")
@pytest.mark.skipif(not _runtime.AVAILABLE, reason="Triton is not installed")
def test_what_records_reach(tiny_protocol: TimingProtocol, counting_clock: Clock, tmp_path: Path) -> None:
    shape = ("rows=10,width=10", "fp32")
    timer = Timer(CPU, tiny_protocol, counting_clock, "adrec bench")
    row = next(iter(KernelBench(timer, _itself).rows(choose_cases("scale", *shape), lambda *progress: None)))

    def measured(device: str, reached: float) -> KernelRecord:
        gpu = gpu_of_device(device)
        known = {} if gpu is None else {"gpu": gpu.name, "floor_fraction": reached}
        protocol = row.protocol.model_copy(update={"device_name": device})
        return row.model_copy(update={"roof": row.roof.model_copy(update=known), "protocol": protocol})

    records = tmp_path / "rows.jsonl"
    for device, reached in (("NVIDIA L4", 0.2), ("NVIDIA L4", 0.3), ("NVIDIA H200", 0.4), ("NVIDIA L40S", 0.0)):
        append_record(records, measured(device, reached))
    options = ("--kernel", "scale", "--shape", shape[0], "--dtype", shape[1], "--records", str(records))
    done = invoke(*options, "--gpu", "L4,H100")
    assert done.exit_code == 0, done.output
    # The later record of a device counts; one of a GPU without figures has no floor.
    assert "L4: 1e+03 us, 30%" in done.output
    assert "20%" not in done.output
    assert "no floor known" in done.output
    assert "H200:" not in done.output
    assert "30%" not in invoke(*options[:3], "rows=11,width=10", *options[4:]).output
    # In a graph the host's time for a launch is left out: that counts, whichever was measured last.
    for path, reached in ((GRAPH, 0.6), ("kernel", 0.5), ("eager twin", 0.1)):
        append_record(records, measured("NVIDIA L4", reached).model_copy(update={"path": path}))
    assert "L4: 1e+03 us, 60% in a graph" in invoke(*options).output


def _itself(twin: Callable[..., Any]) -> Callable[..., Any]:
    return twin


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--gpu", "H1000"), r"--gpu H1000 is not known \(did you mean 'H100'\?\); there are: A100, H100"),
        (("--kernel", "scales"), r"matches no kernel \(did you mean scale"),
        (("--records", "none.jsonl"), "no such file of records"),
    ],
)
def test_bad_options_are_refused(arguments: tuple[str, ...], message: str) -> None:
    found = invoke(*arguments).exception
    assert isinstance(found, AdrecError)
    with pytest.raises(AdrecError, match=message):
        raise found


@pytest.mark.usefixtures("toys")
def test_a_shape_of_no_kernel() -> None:
    with pytest.raises(ConfigError, match="size users is not known; there are: rows, width"):
        choose_cases(shape="users=3")


def test_intensity_is_finite_without_bytes() -> None:
    assert math.isfinite(GPUS["L4"].floor(Cost(0, 0), torch.float32).microseconds)
