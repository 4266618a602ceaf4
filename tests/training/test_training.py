"""What training does to the weights: it learns, freezes truly, keeps the best, and computes the padded model's loss."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adrec.checkpoint import Run, load_run
from adrec.config import OptimiserConfig, TrainConfig
from adrec.data.dataset import Dataset
from adrec.data.jagged import Jagged
from adrec.engines import ReferenceEngine, make_engine
from adrec.errors import ConfigError
from adrec.evaluation import evaluate, popularity_evaluation
from adrec.losses import catalogue_cross_entropy, reconstruction_loss
from adrec.models import ADRec
from adrec.models.base import SequenceModel, TokenBatch
from adrec.models.layout import Layout
from adrec.noise import TokenNoise, draw_token_noise
from adrec.training.batches import RandomBatches, derive_seed, training_loader, useful_tokens, validation_rows
from adrec.training.gradients import merge_gradients
from adrec.training.module import StageModule

DENSE = [
    {"model": "sasrec"},
    {"model": "sasrec", "positions": "learned"},
    {"model": "sasrec", "positions": "released"},
    {"lambda_uncertainty": 1.0},
    {"lambda_uncertainty": 1.0, "independent_noise": False},
    {"lambda_uncertainty": 1.0, "padding": "masked", "positions": "learned"},
    {"lambda_uncertainty": 1.0, "positions": "released"},
    {"lambda_uncertainty": 0.5, "denoiser": "mlp"},
    {"lambda_uncertainty": 0.5, "geodesic": True},
    {"lambda_uncertainty": 0.5, "condition_dropout": 0.5, "independent_noise": False},
]


def name_of(overrides: dict[str, Any]) -> str:
    return "-".join(f"{value}" for value in overrides.values()) or "paper"


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned(train_tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained until item i + 1 follows item i."""
    out = tmp_path_factory.mktemp("learned") / "run"
    model = {"dropout": 0.0, "embedding_dropout": 0.1}
    return train_tiny(out, model=model, epochs=30, main={"patience": 30}, pretrain={"patience": 30}, seed=1)


def test_a_tiny_run_learns(learned: Run, tiny_dataset: Dataset) -> None:
    examples = tiny_dataset.examples("test")
    popular = popularity_evaluation(tiny_dataset.item_counts(), examples).metrics["NDCG@5"]
    baseline = learned.baseline()
    assert baseline is not None
    for model in (learned.model, baseline.model):
        found = evaluate(make_engine("cached", model), examples).metrics["NDCG@5"]
        # Ring of 40 items, the next one is certain: chance is about 7 %, popularity little more.
        assert popular.high < 30.0 < 60.0 < found.low


def test_run_folder(learned: Run) -> None:
    names = sorted(str(path.relative_to(learned.path)) for path in learned.path.rglob("*") if path.is_file())
    for name in ("config.yaml", "model.safetensors", "items.parquet", "run.json", "metrics.json", "job.yaml"):
        assert name in names
    for name in ("config.yaml", "model.safetensors", "items.parquet", "run.json", "metrics.json"):
        assert f"baseline/{name}" in names
    for stage in ("pretrain", "main"):
        for name in ("best.ckpt", "last.ckpt"):
            assert f"checkpoints/{stage}/{name}" in names
        assert f"logs/csv/{stage}/metrics.csv" in names
        assert any(name.startswith(f"logs/tensorboard/{stage}/events.out") for name in names)
    assert not [name for name in names if name.endswith(".tmp")]
    assert (learned.info.dataset_name, learned.info.data_path) == ("tiny", "data")
    metrics = json.loads((learned.path / "metrics.json").read_text("utf-8"))
    assert metrics["epochs"] == 30
    assert metrics["epoch_seconds_median"] > 0.0
    config = yaml.safe_load((learned.path / "config.yaml").read_text("utf-8"))
    assert (config["model"]["model"], config["train"]["seed"]) == ("adrec", 1)
    baseline = learned.baseline()
    assert baseline is not None
    assert (baseline.config.model, baseline.config.positions) == ("sasrec", "learned")
    assert baseline.dataset_fingerprint == learned.dataset_fingerprint


def logged(run: Run, stage: str, name: str) -> list[float]:
    with (run.path / "logs" / "csv" / stage / "metrics.csv").open(encoding="utf-8") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.parametrize("stage", ["pretrain", "main"])
def test_the_run_holds_the_best_weights_not_the_last(
    train_tiny: Any, tmp_path: Path, tiny_dataset: Dataset, stage: str
) -> None:
    # So large a rate that accuracy falls again: the last epoch is not the best.
    rough = {stage: {"learning_rate": 0.3, "epochs": 6, "patience": 6}}
    run = train_tiny(tmp_path / "run", epochs=2, warmup_epochs=0, **rough)
    values = logged(run, stage, "val_NDCG@20")
    assert len(values) == 6
    # Logged in single precision, hence the relative 1e-6 below.
    best = max(values)
    assert values[-1] < best, "the test needs a run that gets worse"
    kept = run.baseline() if stage == "pretrain" else run
    assert kept is not None
    assert kept.metrics["validation"]["NDCG@20"] == pytest.approx(best, rel=1e-6)
    found = evaluate(make_engine("cached", kept.model), tiny_dataset.examples("validation"))
    assert found.metrics["NDCG@20"].value == pytest.approx(best, rel=1e-6)
    weights = {
        name: torch.load(run.path / "checkpoints" / stage / f"{name}.ckpt", weights_only=True)["state_dict"]
        for name in ("best", "last")
    }
    state = kept.model.state_dict()
    assert all(torch.equal(value, weights["best"][f"average.module.{name}"]) for name, value in state.items())
    assert not all(torch.equal(value, weights["last"][f"average.module.{name}"]) for name, value in state.items())


def test_training_stops_early(train_tiny: Any, tmp_path: Path) -> None:
    # Weights that do not move never improve: validations at epochs 2, 4 and 6, then the patience of 2 is used up.
    still = {"learning_rate": 1e-30, "validate_every": 2, "patience": 2, "epochs": 50}
    run = train_tiny(tmp_path / "run", main=still)
    assert run.metrics["epochs"] == 6
    assert len(logged(run, "main", "val_NDCG@20")) == 3


def test_same_seed_same_weights(train_tiny: Any, tmp_path: Path) -> None:
    first, second, other = (train_tiny(tmp_path / str(i), seed=seed) for i, seed in enumerate((4, 4, 5)))
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != other.fingerprint
    # What was drawn before from the global generator must not matter.
    torch.manual_seed(99)
    assert train_tiny(tmp_path / "again", seed=4).fingerprint == first.fingerprint


def tables(run: Run) -> tuple[Tensor, Tensor]:
    baseline = run.baseline()
    assert baseline is not None
    return baseline.model.table.detach(), run.model.table.detach()


@pytest.mark.parametrize("pcgrad", [False, True])
def test_the_table_is_frozen_in_warm_up_and_moves_after(train_tiny: Any, tmp_path: Path, pcgrad: bool) -> None:
    # One validation at the end, so that the best weights are those of the last epoch.
    main = {"epochs": 2, "validate_every": 2, "weight_decay": 0.1}
    before, after = tables(train_tiny(tmp_path / "frozen", main=main, warmup_epochs=2, pcgrad=pcgrad))
    assert torch.equal(before, after)
    main |= {"epochs": 3, "validate_every": 3}
    before, after = tables(train_tiny(tmp_path / "moved", main=main, warmup_epochs=2, pcgrad=pcgrad))
    assert bool((before[1:] != after[1:]).any(1).all())
    assert bool((after[0] == 0.0).all())


def test_frozen_decay_is_what_adam_does_to_zero_gradients(train_tiny: Any, tmp_path: Path) -> None:
    # Without averaging, so that what is kept is what the optimiser left.
    main = {"epochs": 2, "validate_every": 2, "weight_decay": 0.01, "average_decay": 0.0}
    before, after = tables(train_tiny(tmp_path / "run", main=main, warmup_epochs=2, frozen_decay=True))
    assert float(after.std()) < float(before.std())
    twin = torch.nn.Parameter(before.clone())
    optimiser = torch.optim.Adam([twin], lr=0.01, weight_decay=0.01)
    steps = math.ceil(60 / 16)
    for epoch in range(2):
        optimiser.param_groups[0]["lr"] = 0.01 * 0.5 * (1.0 + math.cos(math.pi * epoch / 500))
        for _ in range(steps):
            twin.grad = torch.zeros_like(twin)
            optimiser.step()
    torch.testing.assert_close(after, twin.detach(), rtol=1e-6, atol=1e-7)


def test_pcgrad_runs_and_differs(train_tiny: Any, tmp_path: Path) -> None:
    plain, projected = (train_tiny(tmp_path / str(pcgrad), pcgrad=pcgrad) for pcgrad in (False, True))
    assert plain.baseline().fingerprint == projected.baseline().fingerprint
    assert plain.fingerprint != projected.fingerprint


@pytest.mark.parametrize(
    "options",
    [
        {"model": {"positions": "learned"}, "pretrain_positions": "released"},
        {"model": {"padding": "masked"}, "pcgrad": True},
        {"model": {"independent_noise": False, "condition_dropout": 0.3, "guidance_scale": 2.0}},
        {"model": {"geodesic": True, "denoiser": "mlp"}, "frozen_decay": True},
        {"model": {"model": "sasrec"}},
        {"precision": "bf16-mixed"},
        {"logits_budget": 100},
        {"loss_scale": 0.0},
    ],
    ids=lambda options: name_of(options.get("model", options)),
)
def test_the_padding_row_stays_exactly_zero(train_tiny: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    run = train_tiny(tmp_path / "run", pretrain={"weight_decay": 0.1}, main={"weight_decay": 0.1}, **options)
    for each in filter(None, (run, run.baseline())):
        assert bool((each.model.table[0] == 0.0).all())
        assert bool(torch.isfinite(each.model.table).all())
        assert bool((each.model.table[1:] != 0.0).all())


def test_items_must_fit_the_data(train_tiny: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.items is 41, but data set 'tiny' has 40 items"):
        train_tiny(tmp_path / "run", model={"items": 41})


# --- batches ----------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 40), st.integers(0, 5), st.integers(0, 50), st.integers(1, 4))
def test_every_user_is_met_once_an_epoch(users: int, size: int, seed: int, epoch: int, processes: int) -> None:
    shares = [list(RandomBatches(users, size, seed, epoch, rank, processes)) for rank in range(processes)]
    whole = list(RandomBatches(users, size, seed, epoch))
    assert sorted(user for batch in whole for user in batch) == list(range(users))
    assert all(len(batch) == size for batch in whole[:-1])
    assert list(RandomBatches(users, size, seed, epoch)) == whole
    assert [len(share) for share in shares] == [len(RandomBatches(users, size, seed, epoch, 0, processes))] * processes
    # The processes partition each batch, as evenly as it goes; only a last batch with too few users is left out.
    for index, batch in enumerate(whole[: len(shares[0])]):
        assert Counter(user for share in shares for user in share[index]) == Counter(batch)
        sizes = [len(share[index]) for share in shares]
        if size >= processes:
            assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1
    left_out = whole[len(shares[0]) :]
    assert len(left_out) <= 1
    assert all(len(batch) < processes for batch in left_out)


def test_epochs_and_seeds_shuffle_anew() -> None:
    orders = {str(list(RandomBatches(50, 8, seed, epoch))) for seed in range(3) for epoch in range(10)}
    assert len(orders) == 30
    # A batch is a random sample: over epochs a user's neighbours change.
    firsts = [set(next(iter(RandomBatches(50, 8, 0, epoch)))) for epoch in range(40)]
    met = Counter(user for batch in firsts for user in batch)
    assert len(met) == 50


def test_seeds_derived_for_different_uses_differ() -> None:
    parts: list[tuple[int | str, ...]] = [(0,), (1,), (0, 0), (0, "a"), ("a", 0), (0, "a", 0), ("0", "a")]
    seeds = {derive_seed(*part) for part in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Fixed for good: another value would silently change every run that is resumed after an update.
    assert derive_seed(0, "main") == derive_seed(0, "main")


def test_loader_skips_users_without_a_target_and_cuts_long_ones() -> None:
    sequences = Jagged.from_lists([[1], [2, 3], [], [4, 5, 6, 7, 8, 9], [10, 11, 12]])
    batches = list(training_loader(sequences, 3, 2, seed=0, epoch=0))
    assert [batch.layout.lengths.numel() for batch in batches] == [2, 1]
    found = sorted(
        (tuple(batch.inputs[start:end].tolist()), tuple(batch.targets[start:end].tolist()))
        for batch in batches
        for start, end in zip(batch.layout.offsets, batch.layout.offsets[1:], strict=False)
    )
    # Three inputs at most, and the most recent ones.
    assert found == [((2,), (3,)), ((6, 7, 8), (7, 8, 9)), ((10, 11), (11, 12))]


def test_validation_rows_partition() -> None:
    parts = [validation_rows(11, rank, 3).tolist() for rank in range(3)]
    assert sorted(row for part in parts for row in part) == list(range(11))
    assert parts[1] == [1, 4, 7, 10]


def test_useful_tokens_by_hand() -> None:
    # Tokens are interactions less one: 5 and 6 share a rectangle of 2 x 6, both 2s fill theirs, 1 cannot be trained on.
    sequences = Jagged.from_lists([[1] * 6, [1] * 7, [1] * 3, [1] * 3, [1]])
    found = useful_tokens(sequences, max_length=10, batch_size=8, seed=0)
    assert found == {
        "linear": 100.0,
        "attention": pytest.approx(100.0 * 15 / 16),
        "padded": pytest.approx(100.0 * 15 / 40),
    }
    one = useful_tokens(sequences, max_length=10, batch_size=1, seed=0)
    assert one["attention"] == 100.0
    # Cut to 4 inputs: 4, 4, 2, 2.
    assert useful_tokens(sequences, max_length=4, batch_size=8, seed=0)["padded"] == pytest.approx(75.0)
    nobody = useful_tokens(Jagged.from_lists([[1]]), max_length=4, batch_size=8, seed=0)
    assert nobody["padded"] == 0.0


# --- the loss of a batch ----------------------------------------------------------------------------------------------

SEQUENCES = [[3, 9, 4], [1, 2], [7, 8, 9, 10, 11, 12, 13, 14], [40, 1, 40, 1, 40], [5, 6], list(range(20, 31))]


class OneProcess:
    """As much of a trainer as the losses look at."""

    world_size = 1
    precision_plugin = None


def stage_module(model: SequenceModel, dataset: Dataset, **train: Any) -> StageModule:
    module = StageModule(model, dataset, TrainConfig(**train), OptimiserConfig(), "main")
    module._trainer = OneProcess()  # type: ignore[assignment]
    return module


def batch_of(sequences: Sequence[Sequence[int]], model: SequenceModel) -> TokenBatch:
    return TokenBatch.from_sequences(Jagged.from_lists(sequences), model.config.max_length)


def dropless(tiny_model: Any, **overrides: Any) -> SequenceModel:
    body = {"timesteps": 8, "schedule": "sqrt", "max_length": 12, "dropout": 0.0, "embedding_dropout": 0.0}
    model = tiny_model(**body, **overrides)
    return model.train()


def padded(values: Tensor, layout: Layout, length: int) -> Tensor:
    """Packed `[M, ...]` to left-padded `[B, length, ...]`, row by row."""
    out = values.new_zeros(layout.lengths.numel(), length, *values.shape[1:])
    for user, (start, end) in enumerate(zip(layout.offsets.tolist(), layout.offsets[1:].tolist(), strict=False)):
        out[user, length - (end - start) :] = values[start:end]
    return out


def dense_losses(model: SequenceModel, batch: TokenBatch, noise: TokenNoise | None) -> list[Tensor]:
    """The two losses as the released code computes them: everything padded, all logits at once."""
    length = model.config.max_length
    inputs, targets = (padded(ids, batch.layout, length) for ids in (batch.inputs, batch.targets))
    real = inputs != 0
    engine = ReferenceEngine(model)
    model.train()
    rows = model.item_embedding(inputs)
    if model.position_embedding is not None:
        # Positions belong to items; the released SASRec+ gives them to the padding as well.
        carries = real | torch.tensor(model.config.positions == "released")
        rows = rows + torch.where(carries[..., None], model.position_embedding.weight, 0.0)
    out = engine._transformer(model.encoder, model.history_norm(rows), real)
    if isinstance(model, ADRec):
        assert noise is not None
        config = model.config
        if noise.keep_condition is not None:
            out = out * noise.keep_condition[:, None, None]
        clean = model.item_embedding(targets)
        if config.geodesic:
            clean = torch.where(real[..., None], clean / clean.norm(dim=-1, keepdim=True).clamp(min=1e-12), 0.0)
        steps = padded(noise.steps, batch.layout, length)
        steps = torch.where(real, steps, noise.padding_steps[:, None].expand(len(inputs), length))
        gaussian = padded(noise.gaussian, batch.layout, length)
        x_t = model.schedule.signal[steps][..., None] * clean + model.schedule.noise[steps][..., None] * gaussian
        if config.geodesic:
            angle = x_t.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            x_t = angle.cos() * clean + angle.sin() * x_t / angle
        # Padding keeps its x_0, which is zero.
        x_t = torch.where(real[..., None], x_t, 0.0)
        mixed = out + config.lambda_uncertainty * (x_t + model.time_embedding(steps))
        out = model.denoiser(mixed) if config.denoiser == "mlp" else engine._transformer(model.denoiser, mixed, real)
    logits = out @ model.table.T
    losses = [F.cross_entropy(logits[real], targets[real])]
    if isinstance(model, ADRec):
        per_user = [(out[u][real[u]] - clean[u][real[u]]).square().mean() for u in range(len(inputs))]
        losses.append(torch.stack(per_user).mean())
    return losses


def noise_of(model: SequenceModel, batch: TokenBatch, seed: int) -> TokenNoise | None:
    if not isinstance(model, ADRec):
        return None
    config = model.config
    torch.manual_seed(seed)
    return draw_token_noise(
        batch.layout,
        config.width,
        config.timesteps,
        independent=config.independent_noise,
        condition_dropout=config.condition_dropout,
    )


@pytest.mark.parametrize("overrides", DENSE, ids=name_of)
def test_loss_and_gradient_of_a_batch_equal_the_padded_dense_ones(
    tiny_model: Any, tiny_dataset: Dataset, overrides: dict[str, Any]
) -> None:
    model = dropless(tiny_model, **overrides)
    module, batch = stage_module(model, tiny_dataset, loss_scale=0.7), batch_of(SEQUENCES, model)
    torch.manual_seed(11)
    losses = module._losses(batch)
    expected = dense_losses(model, batch, noise_of(model, batch, 11))
    for part, (loss, twin) in enumerate(zip(losses, expected, strict=True)):
        torch.testing.assert_close(loss, twin * (0.7 if part else 1.0), rtol=1e-5, atol=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(torch.stack(losses).sum(), parameters, allow_unused=True)
    total = expected[0] + (0.7 * expected[1] if len(expected) > 1 else 0.0)
    twins = torch.autograd.grad(total, parameters, allow_unused=True)
    for (name, _), gradient, twin in zip(model.named_parameters(), found, twins, strict=True):
        if name == "item_embedding.weight":
            # Row 0 is zeroed by the training step; here the padded twin sends gradient through the padding.
            gradient, twin = gradient[1:], twin[1:]
        if twin is None:
            assert gradient is None, name
            continue
        assert float((gradient - twin).abs().max()) <= 1e-4 * float(twin.abs().max()) + 1e-7, name


@pytest.mark.parametrize("overrides", DENSE, ids=name_of)
def test_the_joint_backward_pass_equals_merging(
    tiny_model: Any, tiny_dataset: Dataset, overrides: dict[str, Any]
) -> None:
    model = dropless(tiny_model, **overrides)
    module, batch = stage_module(model, tiny_dataset), batch_of(SEQUENCES, model)
    parameters = list(model.parameters())
    torch.manual_seed(3)
    joint = module._gradients(module._losses(batch), parameters)
    torch.manual_seed(3)
    losses = module._losses(batch)
    per_loss = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    for (name, _), gradient, twin in zip(
        model.named_parameters(), joint, merge_gradients(per_loss, pcgrad=False), strict=True
    ):
        assert (gradient is None) == (twin is None), name
        if gradient is not None and twin is not None:
            torch.testing.assert_close(gradient, twin, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("overrides", [{"model": "sasrec"}, {"lambda_uncertainty": 1.0}], ids=name_of)
def test_two_processes_compute_the_gradient_of_one(
    tiny_model: Any, tiny_dataset: Dataset, overrides: dict[str, Any]
) -> None:
    model = dropless(tiny_model, **overrides)
    # Ascending lengths, so that every part keeps the order of the whole and noise can be cut along.
    rows = sorted(SEQUENCES, key=len)
    parts = [rows[:2], rows[2:]]
    whole = batch_of(rows, model)
    noise = noise_of(model, whole, 5)
    totals = torch.tensor([whole.layout.tokens, whole.layout.lengths.numel()]).double()
    parameters = list(model.parameters())

    def losses(batch: TokenBatch, first: int, shares: tuple[float, float]) -> list[Tensor]:
        if noise is None:
            rows = model(batch)
            return [catalogue_cross_entropy(rows, model.table, batch.targets) * shares[0]]
        end = first + batch.layout.tokens
        own = TokenNoise(noise.steps[first:end], noise.gaussian[first:end], noise.padding_steps)
        out = model(batch, own)
        ranking = catalogue_cross_entropy(out, model.table, batch.targets)
        near = reconstruction_loss(out, model.clean_target(batch.targets), batch.layout)
        return [ranking * shares[0], near * shares[1]]

    expected = torch.autograd.grad(torch.stack(losses(whole, 0, (1.0, 1.0))).sum(), parameters, allow_unused=True)
    module = stage_module(model, tiny_dataset)
    assert module._shares(whole) == (1.0, 1.0)
    module._trainer.world_size = 2
    module._sum_over_processes = lambda values: totals.clone()  # type: ignore[method-assign]
    gradients, first = [], 0
    for part in parts:
        batch = batch_of(part, model)
        own = losses(batch, first, module._shares(batch))
        gradients.append(torch.autograd.grad(torch.stack(own).sum(), parameters, allow_unused=True))
        first += batch.layout.tokens
    for (name, _), twin, *halves in zip(model.named_parameters(), expected, *gradients, strict=True):
        if twin is not None:
            mean = torch.stack(halves).mean(0)
            assert float((mean - twin).abs().max()) <= 1e-5 * float(twin.abs().max()) + 1e-7, name


# --- the optimiser ----------------------------------------------------------------------------------------------------


@pytest.fixture
def schedule(tiny_dataset: Dataset, tiny_model: Any) -> Iterator[float]:
    optimiser_config = OptimiserConfig(learning_rate=0.02, cosine_epochs=8, weight_decay=0.3)
    module = StageModule(tiny_model(model="sasrec"), tiny_dataset, TrainConfig(), optimiser_config, "pretrain")
    (optimiser,), (scheduler,) = module.configure_optimizers()
    assert isinstance(optimiser, torch.optim.Adam)
    assert optimiser.param_groups[0]["weight_decay"] == 0.3
    assert sum(p.numel() for p in optimiser.param_groups[0]["params"]) == sum(
        p.numel() for p in module.model.parameters()
    )

    def rates() -> Iterator[float]:
        while True:
            yield scheduler.get_last_lr()[0]
            optimiser.step()
            scheduler.step()

    return rates()


def test_cosine_schedule_by_value(schedule: Iterator[float]) -> None:
    found = [next(schedule) for _ in range(12)]
    half = math.sqrt(0.5)
    expected = {0: 0.02, 2: 0.01 * (1 + half), 4: 0.01, 6: 0.01 * (1 - half), 8: 0.0, 9: 0.0, 11: 0.0}
    for epoch, value in expected.items():
        assert found[epoch] == pytest.approx(value, abs=1e-15), f"epoch {epoch}"


def test_learning_rate_is_logged_an_epoch(train_tiny: Any, tmp_path: Path) -> None:
    run = train_tiny(tmp_path / "run", main={"epochs": 4, "cosine_epochs": 4, "patience": 9})
    rates = logged(run, "main", "learning_rate")
    assert rates == pytest.approx([0.01 * 0.5 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)], rel=1e-6)
    assert load_run(run.path).fingerprint == run.fingerprint
