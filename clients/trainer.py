"""Local training and judging of a causal LM on a site's rows. Any PEFT model will do, split or whole."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from clients.data import IGNORED, LengthBucket, TokenRow, collate, row_batches
from clients.pipeline import backward_all, random_seed
from contract.config import RunConfig
from contract.errors import NonFiniteError

Batch = dict[str, Tensor]
Announce = Callable[[Sequence[int]], None]
"""Is told the numbers of a batch's rows, in its order, before the model is called with them."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """Mean loss per predicted token over held-out text; NaN over none."""

    loss: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Training:
    """What a client did in one round. `loss` is the mean per predicted token over all steps, each before its update."""

    loss: float
    trained_tokens: int
    steps: int
    seconds: float


def tell_nobody(rows: Sequence[int]) -> None:
    """An un-split model's rows go nowhere."""


def judge(model: nn.Module, rows: Sequence[TokenRow], config: RunConfig, announce: Announce = tell_nobody) -> Judgement:
    """The loss of `model` on `rows`, or on the first `eval-batches` batches of them."""
    model.eval()
    total, tokens = 0.0, 0
    held_out = row_batches(rows, config.per_device_train_batch_size)
    with torch.no_grad():
        for batch_rows in itertools.islice(held_out, config.eval_batches or None):
            batch = announced(batch_rows, model, config, announce)
            count = predicted_tokens(batch)
            total += float(model(**batch).loss) * count
            tokens += count
    return Judgement(total / tokens if tokens else math.nan, tokens)


def train(
    model: nn.Module, rows: Sequence[TokenRow], config: RunConfig, key: str, announce: Announce = tell_nobody
) -> Training:
    """Trains `model` in place by `config` for one round: a new AdamW and a learning-rate schedule of their own.

    The order of the rows, and what dropout draws, depend on `key` alone. A step's gradient is that of the mean loss
    over all predicted tokens of its microbatches, several of which a split model has under way at once. Raises
    NonFiniteError when a loss or a gradient is not finite.
    """
    started = time.monotonic()
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = planned_steps(len(rows), config)
    optimizer = adamw(parameters, config)
    scheduler = schedule(optimizer, config, steps)
    total, tokens = 0.0, 0
    for step, microbatches in enumerate(_steps(rows, config, key)):
        count = sum(row.targets for batch_rows in microbatches for row in batch_rows)
        shares = [partial(_share, model, batch_rows, config, announce, count, step) for batch_rows in microbatches]
        seeds = [random_seed(key, step, index) for index in range(len(microbatches))]
        loss = sum(backward_all(model, shares, seeds, config.pipeline_depth), 0.0)
        _clip(parameters, config.max_grad_norm, step)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        total, tokens = total + loss * count, tokens + count
    model.eval()
    return Training(total / tokens, tokens, steps, time.monotonic() - started)


def adamw(parameters: Sequence[Tensor], config: RunConfig) -> torch.optim.AdamW:
    """A new optimiser, as `config` says; its learning rate is then moved by `schedule`."""
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def schedule(optimizer: torch.optim.Optimizer, config: RunConfig, steps: int) -> LRScheduler:
    """Hugging Face's schedule over the steps of one round, begun a step later: its first step has no learning rate."""
    # Its own "constant" would leave the warm-up out without a word.
    kind = "constant_with_warmup" if config.lr_scheduler_type == "constant" else config.lr_scheduler_type
    warmup_steps = math.ceil(config.warmup_ratio * steps)
    late = 1 if warmup_steps else 0
    scheduler: LRScheduler = get_scheduler(kind, optimizer, warmup_steps + late, steps + late)
    if not late:
        return scheduler
    with warnings.catch_warnings():
        # Torch takes a schedule that moves before the optimizer for a mistake.
        warnings.simplefilter("ignore")
        scheduler.step()
    return scheduler


def planned_steps(rows: int, config: RunConfig) -> int:
    """Optimiser steps that a client with `rows` rows takes in a round."""
    if config.local_steps:
        return config.local_steps
    batches_in_all = math.ceil(rows / config.per_device_train_batch_size) * config.local_epochs
    return math.ceil(batches_in_all / config.gradient_accumulation_steps)


def predicted_tokens(batch: Batch) -> int:
    """Tokens that the loss of `batch` is a mean over: every row's first label is predicted by nothing."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def _steps(rows: Sequence[TokenRow], config: RunConfig, key: str) -> Iterator[list[list[TokenRow]]]:
    """The rows of the microbatches of each optimiser step; the last step of a round in epochs may have fewer."""
    epochs = None if config.local_steps else config.local_epochs
    stream = row_batches(rows, config.per_device_train_batch_size, key, epochs)
    for _ in range(planned_steps(len(rows), config)):
        yield list(itertools.islice(stream, config.gradient_accumulation_steps))


def _share(
    model: nn.Module, rows: Sequence[TokenRow], config: RunConfig, announce: Announce, tokens: int, step: int
) -> Tensor:
    """One microbatch's share of the mean loss over the step's `tokens`."""
    batch = announced(rows, model, config, announce)
    loss: Tensor = model(**batch).loss
    if not torch.isfinite(loss):
        raise NonFiniteError(f"the loss of training step {step + 1} is {float(loss.detach())}: lower learning-rate")
    return loss * (predicted_tokens(batch) / tokens)


def _clip(parameters: Sequence[Tensor], max_grad_norm: float, step: int) -> None:
    """The trunk's half counts by its anchor, so this is the norm over client and trunk together."""
    if max_grad_norm > 0:
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        if not torch.isfinite(norm):
            raise NonFiniteError(f"the gradient norm of training step {step + 1} is {float(norm)}: lower learning-rate")


def announced(rows: Sequence[TokenRow], model: nn.Module, config: RunConfig, announce: Announce) -> Batch:
    """`rows` as the batch that `model` is to be called with next, their lengths shown as `config` says."""
    announce([row.number for row in rows])
    device = next(model.parameters()).device
    bucket = LengthBucket(config.wire_length_bucket, config.max_length)
    return {name: tensor.to(device) for name, tensor in collate(rows, bucket).items()}
