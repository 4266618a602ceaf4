"""`encode_prefix` by value against its twin, whatever the lengths, widths, dtypes and options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import encode_prefix as module
from kernels._encode_prefix_op import block_sizes, encode_prefix_op
from kernels._runtime import UnsupportedError, record_launches
from kernels.block_weights import BlockWeights
from kernels.encode_prefix import encode_prefix, encode_prefix_twin
from tests.kernels.conftest import COMPILE_BACKEND, RMS_RATIO, assert_matches, embedded, guarded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ITEMS = 29
LENGTHS = [3, 1, 18, 2, 7, 20, 1]
OPTIONS: dict[str, dict[str, Any]] = {
    "one pad row": {},
    "masked padding": {"pads": 0},
    "pad rows, positions": {"pads": 20, "positions": True},
    "guided": {"unconditional": True, "mix_weight": 0.7},
    "guided, pad rows": {"unconditional": True, "pads": 20},
    "geodesic": {"geodesic": True, "mix_weight": 0.7},
    "no denoiser": {"denoiser_blocks": 0, "positions": True},
    "one block each": {"blocks": 1, "denoiser_blocks": 1},
    "three blocks": {"blocks": 1, "denoiser_blocks": 3, "unconditional": True},
    "wide norm epsilon": {"history_norm_epsilon": 0.1},
}


def stack(blocks: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> BlockWeights:
    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator) * scale

    def matrix(rows: int, columns: int) -> Tensor:
        return normal(blocks, rows, columns, scale=columns**-0.5).to(dtype)

    return BlockWeights(
        qkv=matrix(3 * width, width),
        qkv_bias=normal(blocks, 3 * width, scale=0.2),
        out=matrix(width, width),
        out_bias=normal(blocks, width, scale=0.2),
        attention_norm=1.0 + normal(blocks, 2, width, scale=0.2),
        up=matrix(4 * width, width),
        up_bias=normal(blocks, 4 * width, scale=0.2),
        down=matrix(width, 4 * width),
        down_bias=normal(blocks, width, scale=0.2),
        feed_forward_norm=1.0 + normal(blocks, 2, width, scale=0.2),
    )


def arguments(
    lengths: list[int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    width: int = 32,
    heads: int = 2,
    max_length: int = 20,
    pads: int = 1,
    positions: bool = False,
    blocks: int = 2,
    denoiser_blocks: int = 2,
    unconditional: bool = False,
    spare: int = 0,
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """Random arguments on a device, between margins. spare: packed tokens that belong to no user."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, kind: torch.dtype = torch.float32) -> Tensor:
        return embedded(torch.randn(*size, generator=generator).to(device, kind))

    def padding(branches: int, count: int) -> Tensor | None:
        return normal(branches, count, 2, pads, width, kind=dtype) if pads and count else None

    encoder_pads = padding(1, blocks)
    denoiser = stack(denoiser_blocks, width, dtype, generator) if denoiser_blocks else None
    encoder = stack(blocks, width, dtype, generator)
    items = torch.randint(0, ITEMS + 1, (sum(lengths) + spare,), generator=generator)
    return {
        "items": embedded(items.to(device)),
        "offsets": embedded(torch.tensor([0, *lengths], device=device).cumsum(0)),
        "table": normal(ITEMS + 1, width, kind=dtype),
        "positions": normal(max_length, width, kind=dtype) if positions else None,
        "history_norm": normal(2, width),
        "history_norm_epsilon": 1e-12,
        "encoder": BlockWeights(*(embedded(tensor.to(device)) for tensor in encoder)),
        "encoder_pads": None if encoder_pads is None else encoder_pads[0],
        "heads": heads,
        "max_length": max_length,
        "denoiser": None if denoiser is None else BlockWeights(*(embedded(tensor.to(device)) for tensor in denoiser)),
        "denoiser_pads": padding(1 + unconditional, denoiser_blocks),
        "start_time": normal(width) if denoiser_blocks else None,
        "mix_weight": 0.1,
        "unconditional": unconditional,
        **options,
    }


def in_double(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments for the twin in float64."""

    def double(value: Any) -> Any:
        if isinstance(value, BlockWeights):
            return BlockWeights(*(tensor.double() for tensor in value))
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: double(value) for name, value in given.items()}


def check(given: dict[str, Any], found: tuple[Tensor, Tensor | None] | None = None) -> None:
    """Hold `encode_prefix` (or what it found) to its twin in float64, where a user's rows are defined."""
    if found is None:
        with guarded():
            found = encode_prefix(**given)
    last, keys_values = found
    wanted_last, wanted = encode_prefix_twin(**in_double(given))
    dtype = given["table"].dtype
    assert last.dtype == torch.float32
    assert_matches(last, wanted_last, dtype)
    assert (keys_values is None) == (wanted is None)
    if keys_values is not None and wanted is not None:
        assert keys_values.dtype == dtype
        tokens = int(given["offsets"][-1])
        assert_matches(keys_values[..., :tokens, :], wanted[..., :tokens, :], dtype)
        assert not keys_values[..., given["offsets"][1:] - 1, :].any(), "a last token's row is not zero"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS, ids=lambda name: name.replace(" ", "-"))
def test_it_matches_the_twin(kernel_device: torch.device, option: str, dtype: torch.dtype) -> None:
    lengths = LENGTHS if dtype != torch.float32 else [3, 1, 13]
    check(arguments(lengths, kernel_device, dtype, **OPTIONS[option]))


@pytest.mark.parametrize(
    ("width", "heads"), [(8, 1), (16, 2), (24, 3), (64, 2), (96, 3), (128, 1), (128, 4), (192, 6), (256, 4)], ids=str
)
def test_any_width_and_number_of_heads(kernel_device: torch.device, width: int, heads: int) -> None:
    small = {"blocks": 1, "denoiser_blocks": 2, "width": width, "heads": heads}
    check(arguments([2, 5], kernel_device, torch.float16, **small))
    if width <= 128:
        check(arguments([2, 5], kernel_device, **small))


@pytest.mark.parametrize(("width", "heads"), [(192, 6), (256, 8)], ids=str)
def test_wide_models_in_float32(kernel_device: torch.device, width: int, heads: int) -> None:
    check(arguments([2, 5], kernel_device, blocks=1, denoiser_blocks=1, width=width, heads=heads))


def test_histories_of_200_items_with_a_pad_row_each(kernel_device: torch.device) -> None:
    size = {"max_length": 200, "width": 16, "heads": 1, "blocks": 1, "denoiser_blocks": 2}
    check(arguments([200, 1, 77], kernel_device, torch.float16, pads=200, positions=True, **size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pads", [0, 1, 130], ids=lambda count: f"{count}-pads")
def test_histories_longer_than_a_chunk_between_short_ones(
    kernel_device: torch.device, dtype: torch.dtype, pads: int
) -> None:
    lengths = [1, 40, 3, 17] if dtype == torch.float32 else [1, 100, 3, 130]
    options = {"max_length": 130, "width": 16, "heads": 1, "pads": pads, "positions": pads > 1, "blocks": 1}
    check(arguments(lengths, kernel_device, dtype, **options))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32, 33, 48, 49, 64, 65])
def test_every_chunk_size_at_its_edges(kernel_device: torch.device, tokens: int) -> None:
    size = {"max_length": 70, "width": 16, "heads": 2, "blocks": 1, "denoiser_blocks": 2}
    check(arguments([tokens], kernel_device, torch.float16, **size))
    check(arguments([1] * tokens, kernel_device, torch.float16, **size))


def test_more_users_than_one_round_of_the_search_reads(kernel_device: torch.device) -> None:
    size = {"width": 8, "heads": 1, "blocks": 1, "denoiser_blocks": 1}
    lengths = [1 + index % 3 for index in range(300)]
    check(arguments(lengths, kernel_device, torch.float16, **size))


def test_item_rows_beyond_31_bits(kernel_device: torch.device) -> None:
    """The last rows of a table of more than 2^31 elements, whose other pages are never touched."""
    if kernel_device.type != "cpu":
        pytest.skip("allocates 4 GiB")
    small = arguments([2, 5], kernel_device, torch.float16, blocks=1)
    first = 2**31 // 32
    table = torch.empty(first + ITEMS + 1, 32, dtype=torch.float16)
    table[first:] = small["table"]
    expected = encode_prefix(**small)
    found = encode_prefix(**{**small, "table": table, "items": small["items"] + first})
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_histories_as_long_as_allowed_have_no_padding(kernel_device: torch.device) -> None:
    for pads in (1, 6):
        full = arguments([6, 6, 2], kernel_device, torch.float16, max_length=6, pads=pads)
        check(full)
        changed = dict(full, encoder_pads=full["encoder_pads"] + 1, denoiser_pads=full["denoiser_pads"] - 1)
        assert torch.equal(encode_prefix(**full)[0][:2], encode_prefix(**changed)[0][:2])
        assert not torch.equal(encode_prefix(**full)[0][2], encode_prefix(**changed)[0][2])


@pytest.mark.parametrize("unconditional", [False, True])
def test_no_users(kernel_device: torch.device, unconditional: bool) -> None:
    given = arguments([], kernel_device, unconditional=unconditional)
    last, keys_values = encode_prefix(**given)
    assert last.shape == (0, 32)
    assert keys_values is not None
    assert keys_values.shape == (1 + unconditional, 2, 2, 0, 32)
    check(given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tokens_that_belong_to_no_user(kernel_device: torch.device, dtype: torch.dtype) -> None:
    check(arguments([2, 9, 1], kernel_device, dtype, spare=70))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [24, 32])
@pytest.mark.parametrize("pads", [0, 1, 20])
def test_no_access_outside_the_tensors(kernel_device: torch.device, pads: int, width: int, dtype: torch.dtype) -> None:
    check(arguments([2, 19, 1], kernel_device, dtype, pads=pads, width=width, positions=True, unconditional=True))


def test_a_user_depends_on_no_other_user(kernel_device: torch.device) -> None:
    given = arguments([5, 18, 1, 7], kernel_device, width=16, blocks=1)
    last, keys_values = encode_prefix(**given)
    assert keys_values is not None
    offsets = given["offsets"].tolist()
    for user in range(4):
        part = slice(offsets[user], offsets[user + 1])
        ends = torch.tensor([0, part.stop - part.start], device=kernel_device)
        alone = {**given, "items": given["items"][part].clone(), "offsets": ends}
        one_last, one = encode_prefix(**alone)
        assert one is not None
        assert_matches(one_last[0], last[user])
        assert_matches(one, keys_values[..., part, :])


@settings(max_examples=5, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=6),
    heads=st.integers(1, 3),
    head_width=st.sampled_from([8, 12, 16]),
    pads=st.sampled_from([0, 1, 24]),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    kernel_device: torch.device, lengths: list[int], heads: int, head_width: int, pads: int, seed: int
) -> None:
    size = {"width": heads * head_width, "heads": heads, "pads": pads, "max_length": 24, "blocks": 1}
    check(arguments(lengths, kernel_device, torch.float16, seed=seed, **size))


def test_the_twin_in_float64_and_float32_agree() -> None:
    given = arguments(LENGTHS, torch.device("cpu"), unconditional=True, geodesic=True)
    last, keys_values = encode_prefix_twin(**given)
    exact_last, exact = encode_prefix_twin(**in_double(given))
    assert keys_values is not None
    assert exact is not None
    assert exact_last.dtype == exact.dtype == torch.float64
    assert_matches(last, exact_last, torch.float32)
    assert_matches(keys_values, exact, torch.float32)
    assert RMS_RATIO[torch.float32] == 1e-5


def op_arguments(given: dict[str, Any]) -> tuple[Any, ...]:
    return (
        given["items"], given["offsets"], given["table"], given["positions"], given["history_norm"],
        list(given["encoder"]), given["encoder_pads"], list(given["denoiser"] or ()), given["denoiser_pads"],
        given["start_time"], given["history_norm_epsilon"], given["heads"], given["max_length"],
        0 if given["denoiser"] is None else 1 + given["unconditional"], given["mix_weight"], False,
    )  # fmt: skip


@pytest.mark.parametrize("option", ["no denoiser", "guided, pad rows"])
def test_the_operator_is_registered_well(kernel_device: torch.device, option: str) -> None:
    size = {"width": 8, "heads": 1, "blocks": 1}
    given = arguments([2, 3], kernel_device, **{**size, **OPTIONS[option]})
    torch.library.opcheck(encode_prefix_op.op, op_arguments(given))  # type: ignore[attr-defined]


def test_it_compiles_without_graph_breaks(kernel_device: torch.device) -> None:
    given = arguments([2, 3], kernel_device, width=8, heads=1, blocks=1)
    compiled = torch.compile(
        lambda items: encode_prefix(**{**given, "items": items}), fullgraph=True, backend=COMPILE_BACKEND
    )
    check(given, compiled(given["items"]))


@pytest.mark.parametrize("name", [entry.name for entry in module.ENTRIES])
def test_entries_record_one_launch_and_cost_something(name: str) -> None:
    (entry,) = (entry for entry in module.ENTRIES if entry.name == name)
    meta = torch.device("meta")
    for shape in entry.shapes.values():
        for dtype in entry.dtypes:
            with record_launches() as launches:
                entry.run(**entry.inputs(shape, dtype, meta))
            assert len(launches) == 1
            cost = entry.cost(shape, dtype)
            assert cost.bytes > 0
            assert cost.flops > 0
    small = {**entry.shapes["paper"], "users": 3, "width": 16, "length": 5, "heads": 2}
    values = entry.inputs(small, torch.float32, torch.device("cpu"))
    check(values, entry.twin(**values))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scratch_memory_is_what_it_says(dtype: torch.dtype) -> None:
    for shape in module.ENTRIES[0].shapes.values():
        given = module.ENTRIES[0].inputs(shape, dtype, torch.device("meta"))
        with record_launches() as launches:
            encode_prefix(**given)
        cache, *others = (launches[0].arguments[place] for place in (28, 31, 32))
        rows, width, tokens = (launches[0].options["TILE"], launches[0].options["WIDTH"], len(given["items"]))
        programs, size = -(-tokens // (rows * 3 // 4)), dtype.itemsize
        assert cache.nbytes == 2 * shape["blocks"] * tokens * shape["width"] * size
        assert sum(each.nbytes for each in others) == programs * rows * width * (3 * size + 8)


def test_the_cost_of_the_paper_is_what_it_says() -> None:
    paper = dict(module.ENTRIES[0].shapes["paper"], users=1, length=1, pads=0)
    # One token: two encoder blocks, and of the denoiser nothing, for it has no prefix.
    attention = 2 * 4 * 128
    assert module.ENTRIES[0].cost(paper, torch.float32).flops == 2 * 24 * 128**2 + attention


def test_chunks_shrink_with_the_number_of_tokens() -> None:
    sizes = [block_sizes(128, 32, torch.float16, tokens).tile for tokens in (1, 16, 17, 32, 33, 10**6)]
    assert sizes == [16, 16, 32, 32, 64, 64]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"table": torch.zeros(3, 32, dtype=torch.float64)}, "table is torch.float64; allowed: float32, float16"),
    "table": ({"table": torch.zeros(32)}, r"table has shape \[32\]; expected \[N \+ 1, D\]"),
    "width": ({"table": torch.zeros(3, 512)}, "width is 512; allowed: 8 to 256; use engine 'cached' otherwise"),
    "heads": ({"heads": 5}, "heads is 5; allowed: divisors of the width 32"),
    "head width": ({"heads": 8}, r"heads are 4 wide \(32 / 8\); allowed: 8 to 128; change heads"),
    "max_length": ({"max_length": 0}, "max_length is 0; allowed: 1 or more"),
    "items": ({"items": torch.zeros(2, 3, dtype=torch.int64)}, r"items has shape \[2, 3\]; expected \[M\], packed"),
    "items dtype": ({"items": torch.zeros(5, dtype=torch.int32)}, "items is torch.int32; allowed: int64"),
    "offsets": ({"offsets": torch.zeros(0, dtype=torch.int64)}, r"offsets has shape \[0\]; expected \[B \+ 1\]"),
    "no tokens of a user": (
        {"offsets": torch.tensor([0, 5, 5])},
        r"\[0, 5, 5\]; expected to rise from 0 to 5 or less, ea",
    ),
    "not from 0": ({"offsets": torch.tensor([1, 2, 5])}, r"offsets is \[1, 2, 5\]; expected to rise from 0 to 5"),
    "positions": ({"positions": torch.zeros(19, 32)}, r"positions has shape \[19, 32\]; expected \[20, 32\]"),
    "mixed dtypes": ({"positions": torch.zeros(20, 32).half()}, "positions is torch.float16; allowed: float32"),
    "norm": ({"history_norm": torch.zeros(2, 32).half()}, "history_norm is torch.float16; allowed: float32"),
    "pads": ({"encoder_pads": torch.zeros(2, 2, 3, 32)}, r"encoder_pads has shape \[2, 2, 3, 32\]; expected"),
    "half of the pads": ({"denoiser_pads": None}, "only one of encoder_pads and denoiser_pads is given; allowed: both"),
    "start": ({"start_time": None}, "start_time is None; a denoiser needs the time embedding of step 0"),
    "branches": ({"unconditional": True}, r"denoiser_pads has shape \[1, 2, 2, 1, 32\]; expected \[2, 2, 2, 1, 32\]"),
    "no denoiser": (
        {"denoiser": None, "denoiser_pads": None, "unconditional": True},
        "unconditional is True; allowed: only with a denoiser",
    ),
    "strides": ({"table": torch.zeros(32, 3).t()}, r"table is not contiguous; keep table.contiguous\(\) between calls"),
    "devices": ({"items": torch.zeros(5, dtype=torch.int64, device="meta")}, "tensors are on cpu, meta; expected one"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_says_what_is_wrong(mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    with pytest.raises(UnsupportedError, match=message):
        encode_prefix(**{**arguments([2, 3], torch.device("cpu")), **changes})


def test_it_says_which_weight_is_wrong() -> None:
    given = arguments([2, 3], torch.device("cpu"))
    for name, change, message in (
        ("encoder", {"down": given["encoder"].up}, r"encoder.down has shape \[2, 128, 32\]; expected \[2, 32, 128\]"),
        ("denoiser", {"up": given["denoiser"].up.half()}, "denoiser.up is torch.float16; allowed: float32"),
        ("denoiser", {"qkv_bias": given["denoiser"].qkv_bias.half()}, "denoiser.qkv_bias is torch.float16"),
        ("encoder", {"qkv": given["encoder"].qkv[:0]}, "encoder holds no block; expected 1 or more"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            encode_prefix(**{**given, name: given[name]._replace(**change)})
