"""transformers' Trainer with our batches, our loss, and proofs that training does what it says."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import Trainer

from kestrel.batching import batches_within, even_batches_within, share_of
from kestrel.config.settings import Settings
from kestrel.data.dataset import lengths_of
from kestrel.errors import KestrelError, ProofError
from kestrel.planning.passes import Plan, remedies, write_passes
from kestrel.runtime import distributed
from kestrel.runtime.machine import release_free_memory
from kestrel.runtime.manifest import read_manifest, write_manifest
from kestrel.training import objective
from kestrel.training.checkpoints import KIND
from kestrel.training.schedule import learning_rate_factor
from kestrel.training.sharding import is_sharded

_DIVERGED = 500.0  # nats per token; guessing among 65,024 words costs 11


class DialogueTrainer(Trainer):
    """A Trainer whose unit of data is the optimizer step.

    The loader yields one item per step: this process's share of the step's dialogues, cut into forward passes, and the
    weight of the whole step, by which the summed loss is divided. Resuming means skipping items.

    Args:
        steps: row numbers of each optimizer step.
        fingerprint: what a checkpoint must agree with to be resumed.
        plan: size of the passes; where memory runs out they become smaller.
    """

    def __init__(
        self, settings: Settings, steps: list[np.ndarray], fingerprint: dict[str, Any], plan: Plan, **extra: Any
    ):
        super().__init__(**extra)
        torch.manual_seed(self.args.seed + self.args.process_index)  # each process has dropout of its own
        self._settings = settings
        self._steps = steps
        self._fingerprint = fingerprint
        self._plan = plan
        self._sharded = is_sharded(self.model)
        self._rows = self.train_dataset.select_columns(objective.COLUMNS).with_format("numpy")
        self._lengths = lengths_of(self.train_dataset)
        self.tokens_until = np.cumsum([int(self._lengths[rows].sum()) for rows in steps])
        self._pad_id = int(self.processing_class.eos_token_id)
        self.last_loss: torch.Tensor | None = None
        self.last_gradient_norm: torch.Tensor | None = None

    # -- data ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        # Nothing in a step waits for the GPU, so the next step is collated while the GPU computes this one.
        return DataLoader(
            self._rows,
            batch_sampler=self._steps,  # type: ignore[arg-type]
            collate_fn=self.inputs_of,
            pin_memory=self.args.device.type == "cuda",
        )

    def inputs_of(self, rows: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        """What `training_step` needs of an optimizer step, from all rows of the step."""
        lengths = np.asarray([len(row["input_ids"]) for row in rows])
        cuts = self._cuts(lengths, self.args.process_index)
        # The other processes need this one's part of a sharded base in each pass. Where it has fewer passes than they, it
        # adds passes of the shortest dialogue, with weight 0.
        most = max(len(self._cuts(lengths, rank)) for rank in range(self.args.world_size)) if self._sharded else 0
        idle = [lengths.argsort()[:1]] * (most - len(cuts))
        return {
            "forward_passes": [objective.collate([rows[i] for i in cut], self._pad_id) for cut in (*cuts, *idle)],
            "counting": len(cuts),
            "step_weight": objective.step_weight(rows),
            "tokens_per_step": self._plan.tokens_per_step,
        }

    def _cuts(self, lengths: np.ndarray, rank: int) -> list[np.ndarray]:
        """The rows of each forward pass of one process; none where processes outnumber rows."""
        mine = share_of(lengths, rank, self.args.world_size)
        return [mine[cut] for cut in even_batches_within(lengths[mine], self._plan.tokens_per_step)]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        stretches = [*self._fingerprint.get("history", []), self._fingerprint["training"]]
        # Of a function, checkpoints hold nothing; of a method or a partial, they would.
        factor = lambda step: learning_rate_factor(step, stretches)
        self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        """As the Trainer does; the next step's learning rate, which a finished run has brought to zero, is computed again."""
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = self.lr_scheduler
        schedule._last_lr = [base * schedule.lr_lambdas[0](schedule.last_epoch) for base in schedule.base_lrs]
        for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
            group["lr"] = rate

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the library's estimate needs one batch of ids, and nothing here reads it

    # -- loss ------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Backward over one optimizer step. Returns this process's part of the loss times the number of processes.

        Where memory runs out, the step is repeated with smaller passes from the same random state, while the other
        processes wait; the result is the same up to rounding. With a sharded base the run ends.

        Raises:
            KestrelError: a pass of one dialogue does not fit.
        """
        total = None
        while total is None:
            if inputs["tokens_per_step"] != self._plan.tokens_per_step:
                inputs = self.inputs_of(self.rows_of_step(self.state.global_step))
            total = self._backward_if_it_fits(inputs)
        distributed.average_gradients([p for p in self.model.parameters() if p.requires_grad])
        self.last_loss = total
        if self.args.device.type == "cpu":
            release_free_memory()
        return total

    def _backward_if_it_fits(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """As `_backward`; None, with all as before but smaller passes planned, where memory runs out."""
        if not self.model.training:
            self.model.train()
        random = _random_states()
        try:
            return self._backward(inputs)
        except torch.OutOfMemoryError:
            too_large = max((b["input_ids"].shape for b in inputs["forward_passes"]), key=math.prod)
        # After the exception is gone: its frames hold the memory to be freed.
        self._use_smaller_passes(too_large)
        self.model.zero_grad()
        _restore_random_states(random)
        return None

    def _backward(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Computes this process's gradients.

        DistributedDataParallel, which the Trainer puts around the model, would exchange them during the last pass, which
        could then not be repeated.
        """
        total = torch.zeros((), device=self.args.device)
        for index, batch in enumerate(inputs["forward_passes"]):
            weight = self.args.world_size / inputs["step_weight"] if index < inputs["counting"] else 0.0
            loss = objective.summed_loss(self.model, self._on_device(batch)) * weight
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch without its mask, which the loss does not need."""
        needed = ((name, tensor) for name, tensor in batch.items() if name != "attention_mask")
        return {name: tensor.to(self.args.device, non_blocking=True) for name, tensor in needed}

    def rows_of_step(self, step: int) -> list[dict[str, np.ndarray]]:
        """All rows of an optimizer step (0-based)."""
        return [self._rows[int(row)] for row in self._steps[step]]

    # -- memory ----------------------------------------------------------------------------------------------------

    def try_largest_pass(self) -> None:
        """Runs the step with the largest pass before training does, and makes passes smaller where memory runs out.

        Raises:
            KestrelError: a pass of one dialogue does not fit.
        """
        if self._sharded:  # no process can compute a pass alone
            return
        random, total = _random_states(), None
        while total is None:
            step = max(range(len(self._steps)), key=lambda step: self._largest_pass(self._steps[step]))
            total = self._backward_if_it_fits(self.inputs_of(self.rows_of_step(step)))
        self.model.zero_grad()
        self._agree_on_passes()
        _restore_random_states(random)

    def _largest_pass(self, rows: np.ndarray) -> int:
        """Tokens of this process's largest pass in a step of these rows."""
        lengths = self._lengths[rows]
        cuts = self._cuts(lengths, self.args.process_index)
        return max((len(cut) * int(lengths[cut].max()) for cut in cuts), default=0)

    def _agree_on_passes(self) -> None:
        """Takes the smallest passes of any process for all: a checkpoint records one size, with which all resume."""
        smallest = distributed.all_reduce_min(self._plan.tokens_per_step)
        if smallest < self._plan.tokens_per_step:
            self._plan = dataclasses.replace(self._plan, tokens_per_step=smallest)
            tqdm.write(
                f"another process was out of memory: from now on passes hold at most {smallest:,} tokens "
                "(training.tokens_per_step) in every process; the optimizer steps do not change"
            )

    def _use_smaller_passes(self, too_large: torch.Size) -> None:
        """Makes passes smaller than one that did not fit.

        Raises:
            KestrelError: it holds one dialogue, or other processes take part in it.
        """
        rows, length = too_large
        if rows == 1 or self._sharded:
            raise KestrelError(
                f"out of memory in a pass of {rows} x {length:,} tokens; "
                + remedies(self._settings, self._plan.recompute, smaller_passes=rows > 1)
            )
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        self._plan = dataclasses.replace(self._plan, tokens_per_step=rows * length * 3 // 4)
        tqdm.write(
            f"out of memory in a pass of {rows} x {length:,} tokens: from now on passes hold at most "
            f"{self._plan.tokens_per_step:,} (training.tokens_per_step); the optimizer steps do not change"
        )

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean negative log-likelihood per supervised token of validation, and its exponential."""
        rows = self.eval_dataset.select_columns(objective.COLUMNS).with_format("numpy")
        self.model.eval()
        # A mean of batch means would depend on the batch size.
        nll, tokens = torch.zeros((), dtype=torch.float64, device=self.args.device), 0
        mine = np.arange(self.args.process_index, len(rows), self.args.world_size)
        lengths = lengths_of(self.eval_dataset)[mine]
        cuts = list(batches_within(lengths, self._plan.tokens_per_step))
        idle = distributed.all_reduce_max(len(cuts)) - len(cuts) if self._sharded else 0  # as in a training step
        for cut in tqdm(cuts, "validation", unit=" passes", disable=None, leave=False):
            batch = objective.collate([rows[int(mine[i])] for i in cut], self._pad_id)
            sum_of_batch, tokens_of_batch = objective.validation_nll(self.model, self._on_device(batch))
            nll += sum_of_batch
            tokens += tokens_of_batch
        for _ in range(idle):
            objective.validation_nll(self.model, self._on_device(objective.collate([rows[0]], self._pad_id)))
        if self.args.world_size > 1:
            both = torch.stack((nll, nll.new_tensor(tokens)))
            torch.distributed.all_reduce(both)
            nll, tokens = both[0], int(both[1])
        loss = nll.item() / tokens
        if not loss < _DIVERGED:
            raise ProofError(
                f"the validation loss at step {self.state.global_step} is {loss}: training has diverged; lower "
                "training.learning_rate. The checkpoints before this step are kept"
                if self.state.global_step
                else f"the validation loss before the first step is {loss}: the base does not work with these settings; "
                "try quantization.compute_dtype: float32"
            )
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(loss)}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """As the Trainer does, and keeps the norm before clipping for `callbacks.Guard`."""
        self.last_gradient_norm = super()._clip_grad_norm(model)
        return self.last_gradient_norm

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves as the Trainer does, and completes the checkpoint."""
        self._agree_on_passes()
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            if self.args.world_size > 1:
                torch.distributed.barrier()
            if self.is_world_process_zero():
                write_passes(checkpoint, self._settings, self._plan)
                if (samples := Path(self._settings.run_dir) / "samples.jsonl").exists():
                    shutil.copyfile(samples, checkpoint / samples.name)
                write_manifest(checkpoint, KIND, self._fingerprint, made_from={})
        except Exception:
            # Another process may fail, for lack of this one, when the first has just completed it.
            if self.is_world_process_zero():
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise

    def _load_best_model(self) -> None:
        """Loads the best checkpoint as the Trainer does, if it is undamaged."""
        remedy = "it holds the best adapter: run the same command again, or with --training.resume never"
        read_manifest(Path(self.state.best_model_checkpoint), KIND, remedy)
        super()._load_best_model()

    def dialogues_of_step(self, step: int) -> list[str]:
        """Ids of the dialogues of an optimizer step (1-based)."""
        return [str(name) for name in self.train_dataset.select(self._steps[step - 1])["dialogue_id"]]


def _random_states() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def _restore_random_states(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
