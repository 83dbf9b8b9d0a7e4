"""transformers' Trainer with our loss, a token-weighted evaluation, and checkpoints that are whole or absent.

TRL's SFTTrainer is this same Trainer plus data preparation and a fused head; its collator and packing are used, its
head is not (see loss.py).
"""

import math
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import rotate_checkpoints
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import gradlite
from gradlite.errors import GradLiteError
from gradlite.evaluate.held_out import HeldOutLoss, held_out_loss
from gradlite.methods.method import Method
from gradlite.train.config import TrainConfig
from gradlite.train.directory import last_checkpoint
from gradlite.train.disk import failed_writes_told
from gradlite.train.files import WRITING
from gradlite.train.loss import summed_loss
from gradlite.train.method_optimizer import MethodOptimizer

NUM_CHECKPOINTS_KEPT = 2


class GradLiteTrainer(Trainer):
    """One run's loop around a method. `held_out` rows are never packed; `evaluate` returns eval_loss and eval_tokens."""

    def __init__(
        self,
        *,
        method: Method,
        held_out: datasets.Dataset,
        held_out_collator: DataCollatorForLanguageModeling,
        **options: Any,
    ) -> None:
        super().__init__(model=method.model, optimizers=(MethodOptimizer(method), None), **options)
        self.method = method
        self.held_out = held_out
        self.held_out_collator = held_out_collator
        # The loss below shifts the labels, and divides by the number of tokens of all micro-batches of a step.
        self._loss_shifts_labels = True
        self.model_accepts_loss_kwargs = True
        self._staging: str | None = None

    @property
    def _network(self) -> nn.Module:
        """What computes the loss: inside PEFT's wrapper, whose signature hides which arguments the model takes."""
        model: Any = self.method.model
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor | Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch, whose backward pass is the method's: it may update the weights."""
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.method.backward(loss)
        return loss.detach()

    def _clip_grad_norm(self, model: nn.Module) -> float:
        return self.method.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: float | None = None) -> float:
        return self.method.clip(0.0) if grad_norm is None else grad_norm

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mean cross-entropy over the labelled tokens of the whole step.

        A loss that is not finite gets gradients that are not, so that the optimizer skips the step.
        """
        if return_outputs:
            raise GradLiteError("most positions' logits are never computed; ask for the loss without return_outputs.")
        total, num_tokens = summed_loss(self._network, inputs)
        loss = total / (num_tokens if num_items_in_batch is None else num_items_in_batch)
        return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)

    def held_out_loss(self) -> HeldOutLoss:
        """The mean loss over all held-out tokens, with the model as it is now."""
        return held_out_loss(
            self._network,
            self.held_out,
            self.held_out_collator,
            summed_loss,
            self.args.per_device_eval_batch_size,
            self.args.device,
        )

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate on the held-out rows, log the result, and return it."""
        result = self.held_out_loss()
        metrics = {f"{metric_key_prefix}_loss": result.loss, f"{metric_key_prefix}_tokens": float(result.num_tokens)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _track_num_input_tokens(self, inputs: Mapping[str, Tensor]) -> None:
        """Count tokens that are not padding, in `state.num_input_tokens_seen`, which checkpoints keep."""
        mask = inputs.get("attention_mask")
        self.state.num_input_tokens_seen += int(inputs["input_ids"].numel() if mask is None else mask.sum())

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *arguments: Any, **keywords: Any) -> None:
        """The Trainer's own, which resets the running loss by subtracting it from itself: NaN would stay NaN."""
        super()._maybe_log_save_evaluate(tr_loss, *arguments, **keywords)
        if self._globalstep_last_logged == self.state.global_step:
            tr_loss.zero_()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The Trainer's own; then the learning rates that the schedule has now.

        The saved ones are those of the schedule that was saved: a finished run that goes on with more steps would make its
        first one at a rate of zero.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        scheduler: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # inside accelerate's wrapper
        if checkpoint is None or not isinstance(scheduler, LambdaLR):
            return
        rates = [base * at(scheduler.last_epoch) for base, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(self.method.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates  # what is logged

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under a temporary name and rename it. Weights that are not finite are never written."""
        if not weights_are_finite(self._network):
            return
        target = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        with failed_writes_told(target.parent, lambda: last_checkpoint(target.parent)):
            self._write_checkpoint(target, model, trial)

    def _write_checkpoint(self, target: Path, model: nn.Module, trial: Any) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=WRITING, dir=target.parent) as staging:
            self._staging = staging
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = None
            if target.exists():
                shutil.rmtree(target)
            (Path(staging) / target.name).replace(target)
        rotate_checkpoints(str(target.parent), save_total_limit=NUM_CHECKPOINTS_KEPT)


def build_trainer(
    config: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: datasets.Dataset,
    held_out: datasets.Dataset,
    callbacks: Sequence[TrainerCallback],
    checkpoint_dir: Path,
) -> GradLiteTrainer:
    """A trainer for `config` and its method, built on `model`. Raises the method's `GradLiteError`."""
    arguments = TrainingArguments(
        output_dir=str(checkpoint_dir),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,  # not more, or the peak would be the evaluation's
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=-1 if config.max_steps is None else config.max_steps,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        lr_scheduler_type="constant_with_warmup" if config.schedule == "constant" else config.schedule,
        warmup_steps=config.warmup,
        seed=config.seed,
        bf16=False,  # the weights themselves are bf16; no autocast
        logging_steps=1,
        logging_nan_inf_filter=False,  # a skipped step is shown as what it is
        eval_strategy="no" if config.eval_every is None else "steps",
        eval_steps=config.eval_every,
        save_strategy="no" if config.save_every is None else "steps",
        save_steps=config.save_every or 500,
        report_to=list(config.report_to),
        run_name=config.run_name,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
    )
    if arguments.world_size > 1:
        raise GradLiteError("GradLite trains in one process on one device; start it without torchrun or accelerate launch.")
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # as the Trainer does for models that must not be copied onto several devices
    set_seed(config.seed)  # adapters begin at random
    network: nn.Module = model
    method = gradlite.methods.build(config.method, network.to(arguments.device), **config.method_keywords())
    _check_claims(config, method)
    can_clip = 1.0 if method.claims.clipping else 0.0
    arguments.max_grad_norm = can_clip if config.max_grad_norm is None else config.max_grad_norm
    pad_token_id = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    trainer = GradLiteTrainer(
        method=method,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(pad_token_id, padding_free=config.packing),
        held_out=held_out,
        held_out_collator=DataCollatorForLanguageModeling(pad_token_id),
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _check_claims(config: TrainConfig, method: Method) -> None:
    """Raise `GradLiteError` for settings that the method cannot follow."""
    if config.max_grad_norm and not method.claims.clipping:
        raise GradLiteError(
            f"method {method.name!r} cannot clip the gradient, so --max-grad-norm must be left out or 0"
            f"{method.clipping_instead}."
        )
    if config.accumulation > 1 and not method.claims.accumulation:
        raise GradLiteError(
            f"method {method.name!r} cannot accumulate gradients, so --accumulation must be 1, not {config.accumulation}; "
            "a larger --batch-size does the same where memory allows it."
        )


def num_steps(config: TrainConfig, num_sequences: int) -> int:
    """Optimizer steps of a run, by the Trainer's own count: an incomplete last batch or step of an epoch counts."""
    if config.max_steps is not None:
        return config.max_steps
    batches = math.ceil(num_sequences / config.batch_size)
    return math.ceil(config.epochs * max(1, math.ceil(batches / config.accumulation)))


def weights_are_finite(model: nn.Module) -> bool:
    """Whether no weight is NaN or infinite."""
    return all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values() if tensor.is_floating_point())
