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
from kestrel.runtime.disk_space import disk_full_as_oserror
from kestrel.training import objective
from kestrel.training.checkpoints import read_sealed, seal
from kestrel.training.sharding import is_sharded

_DIVERGED = 500.0  # nats a token; guessing among 65,024 words costs 11


class DialogueTrainer(Trainer):
    """A Trainer whose unit of data is the optimizer step.

    The loader yields one item a step: this process's share of the step's dialogues, cut into forward passes, and the
    weight of the whole step over all processes, by which the summed loss is divided (`objective.py`). To the
    Trainer the run is one epoch of such items, so that resuming is skipping items.

    Args:
        settings: of the run.
        steps: row numbers of each optimizer step.
        meaning: what a checkpoint must agree with to be resumed.
        chosen: how passes are made; smaller ones are made where memory runs out.
        extra: further arguments of the Trainer: model, args, datasets, callbacks.
    """

    def __init__(
        self, settings: Settings, steps: list[np.ndarray], meaning: dict[str, Any], chosen: Plan, **extra: Any
    ):
        super().__init__(**extra)
        torch.manual_seed(self.args.seed + self.args.process_index)  # each process drops out something else
        self._settings = settings
        self._steps = steps
        self._meaning = meaning
        self._chosen = chosen
        self._sharded = is_sharded(self.model)
        self._rows = self.train_dataset.select_columns(objective.COLUMNS).with_format("numpy")
        self._lengths = lengths_of(self.train_dataset)
        self.tokens_until = np.cumsum([int(self._lengths[rows].sum()) for rows in steps])
        self.last_gradient_norm: torch.Tensor | None = None

    # -- data ------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        # Nothing in a step waits for the GPU, so the next step is put together while the GPU computes this one.
        return DataLoader(
            self._rows,
            batch_sampler=self._steps,  # type: ignore[arg-type]
            collate_fn=self._step_of,
            pin_memory=self.args.device.type == "cuda",
        )

    def _step_of(self, rows: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        budget = self._chosen.tokens_per_step
        lengths = np.asarray([len(row["input_ids"]) for row in rows])
        cuts = self._cuts(lengths, self.args.process_index)
        # The others need this process's part of a sharded base in each pass. Where it has less to do than they, it makes
        # passes of any dialogue that count nothing.
        wanted = max(len(self._cuts(lengths, each)) for each in range(self.args.world_size)) if self._sharded else 0
        idle = [lengths.argsort()[:1]] * (wanted - len(cuts))
        return {
            "forward_passes": [objective.collate([rows[i] for i in cut], self._pad_id) for cut in (*cuts, *idle)],
            "counting": len(cuts),
            "step_weight": objective.step_weight(rows),
            "tokens_per_step": budget,
        }

    def _cuts(self, lengths: np.ndarray, process: int) -> list[np.ndarray]:
        """The rows of each forward pass of one process; none where there are more processes than rows."""
        mine = share_of(lengths, process, self.args.world_size)
        return [mine[cut] for cut in even_batches_within(lengths[mine], self._chosen.tokens_per_step)]

    @property
    def _pad_id(self) -> int:
        return int(self.processing_class.eos_token_id)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the library's estimate needs one batch of ids; nothing of ours reads it

    # -- loss ------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Backward over one optimizer step. Returns this process's part of the loss times the number of processes.

        Where memory runs out, the step is done again with smaller passes, from the same random state: the result is
        the same up to rounding. The other processes know nothing of it and wait; only with a sharded base, where they
        take part in each pass, it ends the run.

        Raises:
            KestrelError: one dialogue at a time is too much.
        """
        if not self.model.training:  # `model` may be a wrapper, which no evaluation turns off
            self.model.train()
        while True:
            if inputs["tokens_per_step"] != self._chosen.tokens_per_step:
                inputs = self._step_of(self._rows_of(self.state.global_step))
            random = _random_state()
            try:
                total = self._backward(self.model, inputs)
                break
            except torch.OutOfMemoryError:
                too_large = self._largest_of(inputs)
            # Not while the exception is there, whose frames hold what is to be freed.
            self._step_down(too_large)
            self.model.zero_grad()
            _restore(random)
        distributed.average_gradients([p for p in self.model.parameters() if p.requires_grad])
        return total

    def _backward(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Makes this process's gradients, of the model that DistributedDataParallel wraps and not through the wrapper: it
        exchanges gradients while the last pass computes them, so that this pass could not be made again. They are small,
        and `training_step` exchanges them when all passes are done."""
        total = torch.zeros((), device=self.args.device)
        for index, batch in enumerate(inputs["forward_passes"]):
            summed = objective.summed_loss(model, self._on_device(batch))
            weight = self.args.world_size / inputs["step_weight"] if index < inputs["counting"] else 0.0
            loss = summed * weight
            self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _on_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch without its mask, which our loss does not need."""
        wanted = ((name, tensor) for name, tensor in batch.items() if name != "attention_mask")
        return {name: tensor.to(self.args.device, non_blocking=True) for name, tensor in wanted}

    def _rows_of(self, step: int) -> list[dict[str, np.ndarray]]:
        return [self._rows[int(row)] for row in self._steps[step]]

    # -- memory ----------------------------------------------------------------------------------------------------

    @staticmethod
    def _largest_of(inputs: dict[str, Any]) -> torch.Size:
        return max((batch["input_ids"].shape for batch in inputs["forward_passes"]), key=math.prod)

    def rehearse(self) -> None:
        """Runs the pass that needs most, before training does, with smaller ones where memory runs out.

        Gradients and the random state are left as they were.

        Raises:
            KestrelError: one dialogue at a time is too much.
        """
        if self._sharded:  # a process alone can compute nothing
            return
        random, budget = _random_state(), None
        while budget != self._chosen.tokens_per_step:
            budget = self._chosen.tokens_per_step
            inputs = self._step_of(self._rows_of(self._heaviest_step(budget)))
            heaviest = max(inputs["forward_passes"], key=lambda batch: batch["input_ids"].numel())
            self.model.train()
            try:
                objective.summed_loss(self.model, self._on_device(heaviest)).backward()
            except torch.OutOfMemoryError:
                too_large = heaviest["input_ids"].shape
            else:
                too_large = None
            if too_large is not None:
                self._step_down(too_large)
            self.model.zero_grad()
        self._agree_on_passes()
        _restore(random)

    def _heaviest_step(self, budget: int) -> int:
        def tokens(rows: np.ndarray) -> int:
            lengths = self._lengths[rows]
            mine = lengths[share_of(lengths, self.args.process_index, self.args.world_size)]
            return max((len(cut) * int(mine[cut].max()) for cut in even_batches_within(mine, budget)), default=0)

        return max(range(len(self._steps)), key=lambda step: tokens(self._steps[step]))

    def _agree_on_passes(self) -> None:
        """The passes of the process with least memory, for all: a checkpoint records one size, from which all go on."""
        least = distributed.all_reduce_min(self._chosen.tokens_per_step)
        if least < self._chosen.tokens_per_step:
            self._chosen = dataclasses.replace(self._chosen, tokens_per_step=least)
            tqdm.write(
                f"another process was out of memory: from now on a pass holds at most {least:,} tokens "
                "(training.tokens_per_step) in all of them; the steps stay what they are"
            )

    def _step_down(self, too_large: torch.Size) -> None:
        """Makes passes smaller than one that did not fit, where that is possible and no other process takes part in it."""
        rows, length = too_large
        if rows == 1 or self._sharded:
            raise KestrelError(
                f"out of memory in a pass of {rows} x {length:,} tokens; "
                + remedies(self._settings, self._chosen.recompute, smaller_passes=rows > 1)
            )
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        self._chosen = dataclasses.replace(self._chosen, tokens_per_step=rows * length * 3 // 4)
        tqdm.write(
            f"out of memory in a pass of {rows} x {length:,} tokens: from now on a pass holds at most "
            f"{self._chosen.tokens_per_step:,} (training.tokens_per_step); the steps stay what they are"
        )

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean negative log-likelihood a supervised token of validation, and its exponential.

        Sums and counts are kept apart until the end: a mean of batch means depends on the batch size.
        """
        rows = self.eval_dataset.select_columns(objective.COLUMNS).with_format("numpy")
        self.model.eval()
        nll, tokens = torch.zeros((), dtype=torch.float64, device=self.args.device), 0
        mine = np.arange(self.args.process_index, len(rows), self.args.world_size)
        lengths = lengths_of(self.eval_dataset)[mine]
        cuts = list(batches_within(lengths, self._chosen.tokens_per_step))
        idle = distributed.all_reduce_max(len(cuts)) - len(cuts) if self._sharded else 0  # as in a training step
        for cut in cuts:
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
            )
        metrics = {f"{metric_key_prefix}_loss": loss, f"{metric_key_prefix}_perplexity": math.exp(loss)}
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        """As the Trainer does; the norm before clipping is left where the guard finds it."""
        self.last_gradient_norm = super()._clip_grad_norm(model)
        return self.last_gradient_norm

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves as the Trainer does, never anything that is not finite, and seals the result."""
        bad = [name for name, p in self.model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
        if bad:
            raise ProofError(
                f"step {self.state.global_step}: {bad[0]} is not finite; lower training.learning_rate. The checkpoints "
                "before this step are kept"
            )
        self._agree_on_passes()
        checkpoint = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with disk_full_as_oserror(Path(self.args.output_dir)):
                super()._save_checkpoint(model, trial)
                if self.args.world_size > 1:
                    torch.distributed.barrier()
                if self.is_world_process_zero():
                    write_passes(checkpoint, self._settings, self._chosen)
                    seal(checkpoint, self._meaning, Path(self._settings.run_dir) / "samples.jsonl")
        except Exception:
            # Another process may fail, for want of this one, when the first has just completed it.
            if self.is_world_process_zero():
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise

    def _load_best_model(self) -> None:
        """Loads the best checkpoint as the Trainer does, if it is whole.

        Raises:
            KestrelError: it is damaged.
        """
        best = Path(self.state.best_model_checkpoint)
        read_sealed(best, "the best adapter is in it: run the same command again, or with --training.resume never")
        super()._load_best_model()

    def dialogues_of_step(self, step: int) -> list[str]:
        """Ids of the dialogues of an optimizer step (1-based)."""
        return [str(name) for name in self.train_dataset.select(self._steps[step - 1])["dialogue_id"]]


def _random_state() -> list[torch.Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]


def _restore(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
