"""DP-SGD over a site's rows, for the client's half of the adapter (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

In each step every row joins by its own secret chance; its gradient, over all of the client's trained parameters
together, is cut to `dp-clip`; noise is added to the sum once. All that follows (the division by how many rows were to
be expected, AdamW, what is averaged) is post-processing of that one noised vector.

A row's gradient must depend on no other row. What the client's own layers do is proved before training
(clients/gradient_proof.py); that the trunk answers row by row is taken on trust unless the wire is noised too.
Opacus's optimizer is not used: its noise comes from no cryptographic source.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from clients.data import TokenRow
from clients.example_gradients import example_gradients
from clients.row_gradients import Microbatch, Vector, trained_anchors, trained_layers
from clients.sampling import RowSampler
from clients.trainer import Announce, Training, adamw, announced, schedule
from contract.architecture import unwrap
from contract.config import RunConfig
from contract.errors import ConfigError, NonFiniteError
from privacy.gaussian import GaussianSum
from privacy.stream import SecretStream


def train_privately(
    model: nn.Module, rows: Sequence[TokenRow], config: RunConfig, stream: SecretStream, announce: Announce
) -> Training:
    """Trains `model` in place by DP-SGD for one round: `local-steps` steps, each the release of one Gaussian sum.

    Everything that is left to chance comes from `stream`. `announce` is told the numbers of each microbatch's rows
    before its forward; where the wire is private, no row is sent oftener than `wire-releases` times. A step that no row
    joins is a step all the same. `loss` in the answer is 0 where no row joined at all.

    Of clients.trainer.train's settings, max-grad-norm and gradient-accumulation-steps have no part here. Raises
    ConfigError where rows' gradients cannot be proved (see clients.row_gradients), and NonFiniteError when a loss
    or a gradient is not finite.
    """
    started = time.monotonic()
    _refuse_rotations_by_the_longest_row(model, config.max_length)
    torch.manual_seed(int(stream.bits(1)[0]))  # for dropout
    anchors, weights = trained_anchors(model), [layer.weight for layer in trained_layers(model).values()]
    optimizer = adamw([*weights, *anchors], config)
    scheduler = schedule(optimizer, config, config.local_steps)
    most = config.wire_releases if config.wire == "dp" else None
    sampler = RowSampler(len(rows), config.dp_sample_rate, stream, most)
    noise = GaussianSum(config.dp_clip, config.dp_noise_multiplier, stream)
    expected_rows = config.dp_sample_rate * len(rows)
    nats, tokens = 0.0, 0
    with example_gradients(model, config.dp_gradients) as gradients:
        model.train()
        for step in range(config.local_steps):
            joined = [rows[place] for place in sampler.draw()]
            sum_d: Vector = np.zeros(sum(weight.numel() for weight in weights))
            for start in range(0, len(joined), config.per_device_train_batch_size):
                microbatch = joined[start : start + config.per_device_train_batch_size]
                batch = announced(microbatch, model, config, announce)
                nats += _add_clipped(sum_d, gradients.forward(batch), microbatch, config.dp_clip, step)
            noised, _ = noise.apply(sum_d)
            _set_gradients(weights, noised / expected_rows)
            for anchor in anchors:
                if anchor.grad is not None:
                    anchor.grad /= expected_rows
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            tokens += sum(row.targets for row in joined)
    model.eval()
    return Training(nats / max(tokens, 1), tokens, config.local_steps, time.monotonic() - started)


def _add_clipped(sum_d: Vector, microbatch: Microbatch, rows: Sequence[TokenRow], clip: float, step: int) -> float:
    """Adds the rows' clipped gradients in place; answers the sum of their tokens' losses."""
    losses = microbatch.losses_B.tolist()
    if not np.isfinite(losses).all():
        raise NonFiniteError(f"a row's loss in training step {step + 1} is not finite: lower learning-rate")
    sum_d += microbatch.clipped_sum(clip)
    if not np.isfinite(sum_d).all():
        raise NonFiniteError(f"a row's gradient in training step {step + 1} is not finite: lower learning-rate")
    return float(sum(loss * row.targets for loss, row in zip(losses, rows, strict=True)))


def _set_gradients(weights: Sequence[Tensor], gradient_d: Vector) -> None:
    start = 0
    for weight in weights:
        part = torch.from_numpy(gradient_d[start : start + weight.numel()])
        weight.grad = part.to(weight.device, weight.dtype).reshape(weight.shape)
        start += weight.numel()


def _refuse_rotations_by_the_longest_row(model: nn.Module, max_length: int) -> None:
    """Raise ConfigError where the longest row of a batch would decide how the others' positions are encoded."""
    rope = getattr(unwrap(model).config, "rope_parameters", None) or {}
    for kind in (rope, *rope.values()):
        if not isinstance(kind, Mapping) or kind.get("rope_type") != "longrope":
            continue
        limit = kind.get("original_max_position_embeddings", max_length)
        if max_length > limit:
            raise ConfigError(
                f"max-length is {max_length}; this model encodes the positions of all rows otherwise as soon as one is "
                f"longer than {limit} tokens, so that a row's gradient would tell of another: at most {limit} with "
                "dp=example"
            )
