"""One training stage as a Lightning module, with the two losses' gradients merged by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import lightning
import torch
import torch.distributed
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from adrec.config import OptimiserConfig, TrainConfig
from adrec.data.dataset import Dataset
from adrec.engines.cached import CachedEngine
from adrec.errors import RunError
from adrec.evaluation.metrics import METRICS, point_metrics, target_ranks
from adrec.losses import catalogue_cross_entropy, reconstruction_loss
from adrec.models.adrec import ADRec
from adrec.models.base import SequenceModel, TokenBatch
from adrec.noise import SeededTokenNoise, TokenNoise, draw_token_noise, seed_token_noise
from adrec.respacing import Steps
from adrec.training.batches import derive_seed, training_loader, validation_rows
from adrec.training.gradients import merge_gradients

MONITOR = "val_NDCG@20"
VALIDATION_BATCH = 512
Tensors = tuple[Tensor, ...] | list[Tensor]


def moving_average(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Exponential moving average whose decay grows as ``(1 + n) / (4 + n)`` up to ``decay`` over the first n steps.

    A fixed decay would keep the random start in the average of a short training; this one always covers about the last
    third of the steps until it reaches its full length.
    """

    def update(averages: Tensors, weights: Tensors, steps: Tensor | int) -> None:
        count = int(steps)
        torch._foreach_lerp_(averages, weights, 1.0 - min(decay, (1 + count) / (4 + count)))

    return update


class StageModule(lightning.LightningModule):
    """Trains one model on one data set.

    Every step seeds torch from (seed, stage, step, process), so a resumed run repeats an uninterrupted one bit for bit
    on a CPU without storing generator states. Gradients are averaged over processes by token, so N processes compute
    the gradient of one process with the whole batch.
    """

    def __init__(
        self,
        model: SequenceModel,
        dataset: Dataset,
        train: TrainConfig,
        optimiser: OptimiserConfig,
        stage: str,
        *,
        frozen_epochs: int = 0,
        validation_steps: Steps = 1,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        # Evaluated and kept instead of the last weights, where the optimiser's settings ask for it.
        self.average: AveragedModel | None = None
        if optimiser.average_decay > 0.0:
            self.average = AveragedModel(model, multi_avg_fn=moving_average(optimiser.average_decay))
        self.train_config, self.optimiser_config, self.stage = train, optimiser, stage
        self.frozen_epochs, self.validation_steps = frozen_epochs, validation_steps
        self.sequences = dataset.training_sequences()
        self.validation = dataset.examples("validation")
        # Whether `kernels.token_noise` draws and mixes the noise of training; None: on a GPU with Triton.
        self.fused_noise: bool | None = None
        self.validation_ranks: list[Tensor] = []
        self.losses: list[Tensor] = []

    @property
    def kept_model(self) -> SequenceModel:
        """The network whose weights are validated and end in the run."""
        return self.model if self.average is None else cast(SequenceModel, self.average.module)

    @property
    def table_frozen(self) -> bool:
        return self.current_epoch < self.frozen_epochs

    def configure_optimizers(self) -> Any:
        settings = self.optimiser_config
        optimiser = torch.optim.Adam(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

        def cosine(epoch: int) -> float:
            # Held at the end of the annealing instead of rising again.
            return 0.5 * (1.0 + math.cos(math.pi * min(epoch / settings.cosine_epochs, 1.0)))

        return [optimiser], [torch.optim.lr_scheduler.LambdaLR(optimiser, cosine)]

    def train_dataloader(self) -> Any:
        return training_loader(
            self.sequences,
            self.model.config.max_length,
            self.train_config.batch_size,
            derive_seed(self.train_config.seed, self.stage),
            self.current_epoch,
            self.global_rank,
            self.trainer.world_size,
        )

    def val_dataloader(self) -> Any:
        rows = validation_rows(len(self.validation), self.global_rank, self.trainer.world_size)
        return torch.utils.data.DataLoader(rows, batch_size=VALIDATION_BATCH)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device)

    def training_step(self, batch: TokenBatch, index: int) -> None:
        torch.manual_seed(derive_seed(self.train_config.seed, self.stage, self.global_step, self.global_rank))
        losses = self._losses(batch)
        parameters = [p for p in self.model.parameters() if not (self.table_frozen and p is self.model.table)]
        gradients = self._gradients(losses, parameters)
        optimiser: Any = self.optimizers()
        for parameter in self.model.parameters():
            parameter.grad = None
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        if self.table_frozen and self.train_config.frozen_decay:
            self.model.table.grad = torch.zeros_like(self.model.table)
        if self.model.table.grad is not None:
            self.model.table.grad[0] = 0.0
        optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        loss = torch.stack([part.detach() for part in losses]).sum()
        self.losses.append(loss)
        self.log("loss", loss, prog_bar=True, rank_zero_only=True)

    def on_train_epoch_end(self) -> None:
        scheduler: Any = self.lr_schedulers()
        self.log("learning_rate", scheduler.get_last_lr()[0], rank_zero_only=True)
        mean = torch.stack(self.losses).mean()
        # Half precision skips a step that overflows; elsewhere nothing recovers from it.
        if not bool(mean.isfinite()) and self.train_config.precision != "16-mixed":
            section = "pretrain" if self.stage == "pretrain" else "main"
            raise RunError(
                f"{self.stage}: the loss is {float(mean)} in epoch {self.current_epoch}; lower"
                f" train.{section}.learning_rate ({self.optimiser_config.learning_rate})"
            )
        self.log("train_loss", mean, sync_dist=True)
        self.losses.clear()
        scheduler.step()

    def validation_step(self, rows: Tensor, index: int) -> None:
        histories = self.validation.histories.select(rows.cpu())
        steps = self.validation_steps if isinstance(self.model, ADRec) else None
        targets = self.validation.targets[rows.cpu()].to(self.device)
        # Rankings are computed in full precision, whatever training uses.
        with torch.autocast(self.device.type, enabled=False):
            represented = self.engine.represent(histories, steps, row_keys=self.validation.users[rows.cpu()])
            self.validation_ranks.append(target_ranks(represented, self.engine.model.table.detach(), targets))

    def on_validation_epoch_start(self) -> None:
        self.engine = CachedEngine(self.kept_model)

    def on_validation_epoch_end(self) -> None:
        ranks = torch.cat(self.validation_ranks) if self.validation_ranks else torch.zeros(0, dtype=torch.int64)
        self.validation_ranks.clear()
        # Every metric is a mean over users, so a weighted mean over processes is exact.
        share = float(ranks.numel())
        metrics = point_metrics(ranks)
        values = torch.tensor([metrics[name] * share if share else 0.0 for name in METRICS] + [share]).double()
        values = self._sum_over_processes(values.to(self.device))
        for name, value in zip(METRICS, (values[:-1] / values[-1]).tolist(), strict=True):
            self.log(f"val_{name}", value, prog_bar=f"val_{name}" == MONITOR, sync_dist=True)

    def _losses(self, batch: TokenBatch) -> list[Tensor]:
        budget, model = self.train_config.logits_budget, self.model
        token_share, user_share = self._shares(batch)
        if not isinstance(model, ADRec):
            rows = model(batch)
            return [catalogue_cross_entropy(rows, model.table, batch.targets, budget) * token_share]
        x0_hat = model(batch, self._draw_noise(batch, model))
        ranking = catalogue_cross_entropy(x0_hat, model.table, batch.targets, budget)
        reconstruction = reconstruction_loss(x0_hat, model.clean_target(batch.targets), batch.layout)
        return [ranking * token_share, self.train_config.loss_scale * reconstruction * user_share]

    def _draw_noise(self, batch: TokenBatch, model: ADRec) -> TokenNoise | SeededTokenNoise:
        config, layout = model.config, batch.layout
        options: dict[str, Any] = {
            "independent": config.independent_noise,
            "condition_dropout": config.condition_dropout,
        }
        fused = self.fused_noise
        if fused is None and (fused := batch.targets.is_cuda):
            # Triton is imported where it is used. Without it, torch's own noise is the fastest.
            from kernels._runtime import AVAILABLE

            fused = AVAILABLE
        if fused:
            return seed_token_noise(layout, **options)
        return draw_token_noise(layout, config.width, config.timesteps, **options)

    def _gradients(self, losses: list[Tensor], parameters: Sequence[Tensor]) -> list[Tensor | None]:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            losses = [scaler.scale(loss) for loss in losses]
        if len(losses) == 1 or not self.train_config.pcgrad:
            # Without projection the merge is linear and both losses reach every parameter: one backward pass does.
            joint = torch.stack(losses).mean()
            return self._average(list(torch.autograd.grad(joint, parameters, allow_unused=True)))
        per_loss = [
            self._average(list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)))
            for loss in losses
        ]
        return merge_gradients(per_loss, pcgrad=True)

    def _shares(self, batch: TokenBatch) -> tuple[float, float]:
        """Weights that turn this process's means over tokens and over users into its part of the global means."""
        if self.trainer.world_size == 1:
            return 1.0, 1.0
        own = torch.tensor([batch.layout.tokens, batch.layout.lengths.numel()], device=self.device).double()
        share = own * self.trainer.world_size / self._sum_over_processes(own.clone())
        return float(share[0]), float(share[1])

    def _average(self, gradients: list[Tensor | None]) -> list[Tensor | None]:
        if self.trainer.world_size > 1:
            present = [gradient for gradient in gradients if gradient is not None]
            flat = torch.cat([gradient.reshape(-1) for gradient in present])
            flat = self._sum_over_processes(flat) / self.trainer.world_size
            for gradient, part in zip(present, flat.split([g.numel() for g in present]), strict=True):
                gradient.copy_(part.view_as(gradient))
        return gradients

    def _sum_over_processes(self, values: Tensor) -> Tensor:
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(values)
        return values
