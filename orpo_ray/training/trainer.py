"""The Hugging Face Trainer with our data order, forward, loss and checkpoint.

One batch is one optimizer step.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bitsandbytes.optim import GlobalOptimManager
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import rewrite_logs

from orpo_ray.config import TrainingConfig, every_to_steps
from orpo_ray.config.optimizers import OPTIMIZERS
from orpo_ray.data.store import PairTable
from orpo_ray.errors import NonFiniteError, RunError
from orpo_ray.objectives import Objective
from orpo_ray.runs.console import Announce, Metrics
from orpo_ray.runs.scores import PairScores
from orpo_ray.training.checkpoint import Position
from orpo_ray.training.memory import peak_memory
from orpo_ray.training.metrics import StepMetrics, score_pairs, summarise, summarise_sums
from orpo_ray.training.optimizers import averaged_weights, galore, is_averaging, lora_plus
from orpo_ray.training.pair_model import PairModel
from orpo_ray.training.reporter import Reporter
from orpo_ray.training.sample_answers import Sampler
from orpo_ray.training.state import (
    capture_random_state,
    collect_state,
    load_optimizer,
    load_parameters,
    masters,
    restore_random_state,
    save_state,
    seed_process,
)
from orpo_ray.training.steps import PackInput, StepDataset, StepInput, Work, pack_loss
from orpo_ray.training.strategy import Strategy
from orpo_ray.training.world import current_world
from orpo_ray.training.zero import is_sharded

_SILENCE_S = 10.0
"""If an evaluation took longer than this, the next one is announced before it begins."""
MAX_SKIPPED_STEPS = 20
"""float16 steps in a row that may overflow before the run is given up."""


class PreferenceTrainer(Trainer):
    """Trains a PairModel on planned steps and reports to a Reporter; resumes exactly at a step."""

    def __init__(
        self,
        model: PairModel,
        objective: Objective,
        work: Work,
        config: TrainingConfig,
        args: TrainingArguments,
        reporter: Reporter,
        write_model: Callable[[Path, dict[str, Tensor]], None],
        resume: "tuple[Path, Position] | None",
        on_ready: Callable[[Strategy], None],
        callbacks: list[TrainerCallback],
        announce: Announce,
        sampler: Sampler | None = None,
        trl_metrics: Callable[[Metrics], Metrics] | None = None,
        scores_at_start: PairScores | None = None,
        lora_plus_ratio: float | None = None,
    ) -> None:
        super().__init__(model=model, args=args, callbacks=callbacks)
        self._world = current_world()
        assert args.world_size == self._world.size, (
            "accelerate does not see the processes that train together"
        )
        self.remove_callback(PrinterCallback)
        self.add_callback(_Flow(config, len(work.steps), self._on_start, lambda: self._stop))
        self._seed = config.seed
        self._is_galore = OPTIMIZERS[config.optimizer].is_galore
        self._max_grad_norm = config.max_grad_norm
        self._stop = False
        self._objective = objective
        self._work = work
        self._reporter = reporter
        self._write_model = write_model
        self._resume = resume
        self._on_ready = on_ready
        self._announce = announce
        self._sampler = sampler
        self._trl_metrics = trl_metrics
        self._scores_at_start = scores_at_start
        self._lora_plus_ratio = lora_plus_ratio
        self._rate_of_b = 0.0
        self._evaluation_s = 0.0
        self._start = resume[1].step if resume else 0
        self._step_metrics: dict[str, float] = {}
        self._sum_metrics: dict[str, float] = {}
        self._latest_eval: tuple[int, dict[str, float]] = (-1, {})
        self._current: StepInput | None = None
        self._skipped = 0
        self._stage_0_norm: float | None = None
        self._counting_from = time.perf_counter()

    # transformers types these as optional.

    @property
    def _inner_optimizer(self) -> Any:
        """The optimizer inside of accelerate's: torch's, bitsandbytes' or DeepSpeed's."""
        outer: Any = self.optimizer
        return outer.optimizer

    @property
    def _schedule(self) -> Any:
        return self.lr_scheduler

    @property
    def _whole_model(self) -> nn.Module:
        assert self.model is not None
        return self.model

    # Data: steps come from the plan, whole and unsharded.

    def get_train_dataloader(self) -> DataLoader[StepInput]:
        """The steps that are left, one step per item.

        Accelerate does not prepare this loader, because that would shard it again.
        """
        # The loader draws its seed from its own generator, so the global random state stays.
        return DataLoader(
            self._dataset(),
            batch_size=1,
            collate_fn=lambda items: items[0],
            generator=torch.Generator(),
        )

    def _dataset(self) -> StepDataset:
        return StepDataset(self._work, self._objective, self._start, self.args.process_index)

    def get_batch_samples(
        self, epoch_iterator: Iterator[StepInput], num_batches: int, device: torch.device
    ) -> tuple[list[StepInput], None]:
        """One step. No batches are accumulated, so there is nothing to count."""
        return [next(epoch_iterator)], None

    def floating_point_ops(self, inputs: Any) -> int:
        """Zero, because the Trainer's estimate ignores packing and selected log-probs."""
        return 0

    # One optimizer step.

    def training_step(  # type: ignore[override]  # takes a whole step, not a batch
        self, model: nn.Module, inputs: StepInput, num_items_in_batch: Any = None
    ) -> Tensor:
        """Compute the packs of a step, and synchronise gradients at the last one only.

        Returns the step's loss on this rank.
        """
        model.train()
        self._rate_of_b = self._inner_optimizer.param_groups[-1]["lr"]
        self._current = inputs
        metrics = self._new_metrics()
        total = torch.zeros((), device=self.args.device)
        for index, pack in enumerate(inputs.packs):
            last = index == len(inputs.packs) - 1
            # Otherwise DeepSpeed would step at every pack, and DDP would reduce gradients.
            self.accelerator.gradient_state._set_sync_gradients(last)
            with self._gradient_sync(model, last):
                total = total + self._run_pack(model, pack, inputs, metrics)
        asked_to_stop = metrics.sums.new_tensor([float(self._reporter.stop_requested())])
        *sums, stop = self._world.sum(torch.cat([metrics.sums, asked_to_stop])).tolist()
        self._stop = stop > 0
        if not all(map(math.isfinite, sums)):
            raise self._non_finite("loss")
        self._step_metrics = metrics.means(sums, inputs.pair_count, inputs.token_count)
        self._sum_metrics = metrics.summed_means(sums, inputs.pair_count)
        return total

    def _gradient_sync(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        if last or self.is_deepspeed_enabled:
            return nullcontext()
        return self.accelerator.no_sync(model)

    def _new_metrics(self) -> StepMetrics:
        with_sums = self._trl_metrics is not None
        return StepMetrics(self._objective, self.args.device, with_sums)

    def _run_pack(
        self, model: nn.Module, pack: PackInput[Any], step: StepInput, metrics: StepMetrics
    ) -> Tensor:
        """Forward and backward pass of one pack. Returns its share of the step's loss."""
        pairs, parts = pack_loss(model, self._objective, pack, step, self.args.device)
        metrics.add(pairs, parts, pack.weight)
        return self._backward(parts.total * pack.weight)

    def _backward(self, share: Tensor) -> Tensor:
        """Backward pass of a share of the step's loss. Returns the scaled share.

        It is scaled by the number of ranks, because gradients are averaged over them.
        """
        loss = share * self._world.size
        # DeepSpeed would otherwise divide by its own number of accumulation steps.
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **options)
        return loss.detach()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> float:
        """The gradient norm. It is checked here, before the optimizer changes any weight.

        DeepSpeed has changed the weights already, unless it found a gradient that is not finite.
        """
        if getattr(self._inner_optimizer, "overflow", False):
            raise self._non_finite("gradient")
        if self._stage_0_norm is not None:
            # Gradients are clipped by now, so the norm from before clipping is reported.
            norm = self._stage_0_norm
        else:
            norm = float(super()._get_grad_norm(model, grad_norm=grad_norm))
        if math.isfinite(norm):
            self._skipped = 0
        elif self.accelerator.scaler is None:
            raise self._non_finite("gradient")
        else:
            self._allow_skip()
        return norm

    def _allow_skip(self) -> None:
        """Count a step that overflowed in float16, and raise RunError after too many.

        A few are normal: they lower the loss scale, and the optimizer skips such a step.
        """
        self._skipped += 1
        if self._skipped >= MAX_SKIPPED_STEPS or self.accelerator.scaler.get_scale() <= 1.0:
            raise RunError(
                f"float16 overflowed in {self._skipped} steps in a row, up to step "
                f"{self.state.global_step + 1}; use model.dtype=bfloat16 or float32, or a lower "
                "training.learning_rate"
            )

    def _non_finite(self, what: str) -> NonFiniteError:
        assert self._current is not None
        names = _names(self._work.train, self._current.pair_indices)
        return NonFiniteError(
            f"the {what} of step {self.state.global_step + 1} is not finite; no weight was changed "
            f"by it. Its pairs: {names}. Look at these pairs, or lower training.learning_rate"
        )

    # Metrics, evaluation, checkpoints.

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Report the numbers of one step, but not the Trainer's summary at the end."""
        if "loss" not in logs and not any(name.startswith("eval_") for name in logs):
            return
        if "loss" in logs:
            logs |= self._rates() | self._step_metrics | self._speed()
        numbers = {name: float(value) for name, value in logs.items() if name != "epoch"}
        super().log(logs | self._in_trl_names(logs), start_time)
        self._reporter.report(self.state.global_step, len(self._work.steps), rewrite_logs(numbers))

    def _rates(self) -> dict[str, float]:
        """Learning rates that the Trainer does not log: that of B, that of an own warm-up."""
        group = self._inner_optimizer.param_groups[0]
        rates = {"learning_rate": group["scheduled_lr"]} if "scheduled_lr" in group else {}
        if self._lora_plus_ratio is not None:
            rates["learning_rate_b"] = self._rate_of_b
        return rates

    def _in_trl_names(self, logs: dict[str, float]) -> dict[str, float]:
        """The same numbers under TRL's names, for TensorBoard and trackers; empty unless asked."""
        if self._trl_metrics is None:
            return {}
        prefix = "" if "loss" in logs else "eval_"
        ours = {
            name.removeprefix(prefix): value
            for name, value in logs.items()
            if name.startswith(prefix)
        }
        found = self._trl_metrics(ours | self._sum_metrics)
        return {f"{prefix}{name}": value for name, value in found.items()}

    def _speed(self) -> dict[str, float]:
        """The step's time, its pairs per second, and the most memory of this process so far.

        The time includes loading its pairs and reporting the step before, but no evaluation and no
        checkpoint.
        """
        assert self._current is not None
        now = time.perf_counter()
        seconds, self._counting_from = now - self._counting_from, now
        return {
            "seconds": seconds,
            "pairs_per_second": self._current.pair_count / seconds,
            "memory_bytes": peak_memory(self.args.device.type),
        }

    @contextmanager
    def _not_counted(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._counting_from += time.perf_counter() - started

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Preference metrics over the held-out pairs.

        Raises NonFiniteError if a log-prob is not finite.
        """
        model = self.accelerator.unwrap_model(self.model)
        # The evaluation before the first step may be stopped, because nothing is lost. Later ones
        # are completed, because the checkpoint of their step follows them.
        stop = self._reporter.stop_requested if self.state.global_step == 0 else lambda: False
        work = self._work
        if self._evaluation_s > _SILENCE_S:
            seconds = f"about {self._evaluation_s:.0f} s"
            self._announce(f"evaluating {len(work.evaluation)} held-out pairs ({seconds})")
        began = time.perf_counter()
        with self._not_counted(), averaged_weights(self._inner_optimizer):
            scores = score_pairs(
                model,
                work.evaluation,
                pad_id=work.pad_id,
                token_budget=work.token_budget,
                stop_requested=stop,
                world=self._world,
            )
            samples = self._sampler.take(self.state.global_step) if self._sampler else []
        self._evaluation_s = time.perf_counter() - began
        bad = np.flatnonzero(~np.isfinite(scores.chosen + scores.rejected))
        if len(bad):
            raise NonFiniteError(
                f"the evaluation at step {self.state.global_step} is not finite: {len(bad)} pairs, "
                f"such as {_names(self._work.evaluation, bad[:8])}. Look at these pairs, or at the "
                "base's weights"
            )
        metrics = summarise(scores)
        self._sum_metrics = self._summarise_sums(scores)
        self._reporter.keep_scores(self.state.global_step, scores)
        self._reporter.keep_samples(samples)
        self.log({f"eval_{name}": value for name, value in metrics.items()})
        self.control.should_evaluate = False
        self._latest_eval = (
            self.state.global_step,
            {f"eval/{name}": value for name, value in metrics.items()},
        )
        return {}

    def _summarise_sums(self, scores: PairScores) -> dict[str, float]:
        """The means of summed log-probs. The reference is the model that the run started from."""
        if self._trl_metrics is None:
            return {}
        if self.state.global_step == 0:
            self._scores_at_start = scores
        if not self._objective.needs_reference:
            return summarise_sums(scores, reference=None)
        start = self._scores_at_start
        return {} if start is None else summarise_sums(scores, start)

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        """Decide nothing here: `checkpoint.steps_to_keep` finds the best checkpoint."""
        return False

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        evaluated_at, metrics = self._latest_eval
        scaler = self.accelerator.scaler
        position = Position(
            step=self.state.global_step,
            total_steps=len(self._work.steps),
            scheduler_steps=self._schedule.last_epoch,
            random_states=self._world.gather(capture_random_state()),
            loss_scale=scaler.state_dict() if scaler else None,
            metrics=metrics if evaluated_at == self.state.global_step else {},
        )
        with self._not_counted():
            tensors = self._state()
            weights = masters(tensors)
            if is_averaging(self._inner_optimizer):
                with averaged_weights(self._inner_optimizer):
                    weights = masters(self._state())

            def write(folder: Path) -> None:
                self._write_model(folder / "adapter", weights)
                save_state(tensors, folder)

            self._reporter.save(position, write)

    def _state(self) -> dict[str, Tensor]:
        return collect_state(self._whole_model, self._inner_optimizer, keep=self._world.is_first)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """The learning rate's schedule. After an extension it covers only the added steps."""
        return super().create_scheduler(
            num_training_steps - self._work.schedule_from, *args, **kwargs
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer, without what bitsandbytes remembers of other runs.

        bitsandbytes remembers which parameters have 32-bit state, by their position, until the
        process ends.
        """
        GlobalOptimManager.get_instance().initialize()
        if self._lora_plus_ratio is not None:
            chosen = self.get_optimizer_cls_and_kwargs(self.args, model)
            ratio = self._lora_plus_ratio
            self.optimizer = lora_plus(self._whole_model, self.args, chosen, ratio)
        elif self._is_galore:
            whole: Any = self._whole_model

            def make() -> torch.optim.Optimizer:
                return super(PreferenceTrainer, self).create_optimizer(model)

            self.optimizer = galore(make, self.args, whole.body, whole)
        else:
            super().create_optimizer(model)
        made: Any = self.optimizer
        if is_averaging(made):
            made.train()
        optimizer: torch.optim.Optimizer = made
        return optimizer

    # Exact resume.

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Start the step counter at the checkpoint.

        The Trainer must not skip any step, because the loader has only the steps that are left.
        """
        super()._init_training_state(max_steps, *args, **kwargs)
        self.state.global_step = self._start
        return 0, 0

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Bring weights, then optimizer and schedule, to the checkpoint's position."""
        if self._resume:
            load_parameters(self._whole_model, self._resume[0])
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self._resume:
            folder, position = self._resume
            load_optimizer(self._whole_model, self._inner_optimizer, folder, self._world)
            # Steps the schedule to its place. Its state cannot be loaded, because DeepSpeed leaves
            # out empty parameter groups. The schedule of an extension begins at its first step.
            if position.step > self._work.schedule_from:
                for _ in range(position.scheduler_steps):
                    self._schedule.step()
            if position.loss_scale and self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(position.loss_scale)
        if self.is_deepspeed_enabled and not is_sharded(self._inner_optimizer):
            self._inner_optimizer.register_step_pre_hook(lambda *_: self._before_stage_0_step())
        return prepared

    def _before_stage_0_step(self) -> None:
        """Clip and check the gradient under ZeRO stage 0.

        Stage 0 steps inside the last backward pass and checks no gradient. So it is done in this
        hook, just before that step.
        """
        limit = self._max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._whole_model.parameters(), limit).item()
        self._stage_0_norm = norm
        if not math.isfinite(norm):
            raise self._non_finite("gradient")

    @property
    def strategy(self) -> Strategy:
        """How the processes share the work; it is known once training is prepared."""
        if self.is_deepspeed_enabled:
            engine: Any = self.deepspeed
            return Strategy.zero(engine.zero_optimization_stage())
        if isinstance(self.model_wrapped, DistributedDataParallel):
            return Strategy.DDP
        return Strategy.SINGLE

    def _on_start(self) -> None:
        """Evaluate a new run, or restore the random states of a resumed one.

        This is the last thing before the first step.
        """
        self._on_ready(self.strategy)
        states = self._resume[1].random_states if self._resume else []
        if self._resume is None:
            self._evaluate(None, None)
        if self._world.rank < len(states):
            restore_random_state(states[self._world.rank])
        elif self._world.rank > 0:
            seed_process(self._seed, self._start, self._world.rank)
        self._counting_from = time.perf_counter()


class _Flow(TrainerCallback):
    """Decides when to evaluate, save and stop."""

    def __init__(
        self,
        config: TrainingConfig,
        total: int,
        on_start: Callable[[], None],
        stop_agreed: Callable[[], bool],
    ) -> None:
        self._eval_every = every_to_steps(config.eval_every, total)
        self._save_every = every_to_steps(config.checkpoint_every, total)
        self._total = total
        self._on_start = on_start
        self._stop_agreed = stop_agreed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, or restore the random state."""
        self._on_start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide what follows this step. After the last one the run is evaluated and saved."""
        step, last = state.global_step, state.global_step >= self._total
        stop = self._stop_agreed()
        control.should_evaluate = last or step % self._eval_every == 0
        control.should_save = last or stop or step % self._save_every == 0
        control.should_training_stop = last or stop


def _names(table: PairTable, indices: np.ndarray) -> str:
    ids = table.pair_ids
    return ", ".join(ids[i] for i in indices)
