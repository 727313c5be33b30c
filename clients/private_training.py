"""DP-SGD over a site's rows, for the client's half of the adapter (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

In each step every row joins by its own secret chance; its gradient, over all of the client's trained parameters
together, is cut to `dp-clip`; noise is added to the sum once. All that follows (the division by how many rows were to
be expected, AdamW, what is averaged) is post-processing of that one noised vector.

A row's gradient must depend on no other row. What the client's own layers do is proved before training
(clients/gradient_proof.py); that the trunk answers row by row is taken on trust (privacy/coverage.py says when).
Opacus's optimizer is not used: its noise comes from no cryptographic source.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from contract.errors import ConfigError
from privacy.gaussian import GaussianSum
from privacy.stream import SecretStream

logger = logging.getLogger("trunkline.clients")


def train_privately(
    model: nn.Module, rows: Sequence[TokenRow], config: RunConfig, stream: SecretStream, announce: Announce
) -> Training:
    """Trains `model` in place by DP-SGD for one round: `local-steps` steps, each the release of one Gaussian sum.

    Everything that is left to chance comes from `stream`. `announce` is told the numbers of each microbatch's rows
    before its forward; where the wire is private, no row is sent oftener than `wire-releases` times. A step that no row
    joins is a step all the same. `loss` and `trained_tokens` in the answer are over the rows whose loss is finite, 0
    where there is none.

    Of clients.trainer.train's settings, max-grad-norm and gradient-accumulation-steps have no part here. Raises
    ConfigError where rows' gradients cannot be proved (see clients.row_gradients). A row whose loss or gradient is not
    finite is left out of its step's sum, and the site's log says how often that was.
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
    seen = _Seen()
    with example_gradients(model, config.dp_gradients) as gradients:
        model.train()
        for _ in range(config.local_steps):
            joined = [rows[place] for place in sampler.draw()]
            sum_d: Vector = np.zeros(sum(weight.numel() for weight in weights))
            for start in range(0, len(joined), config.per_device_train_batch_size):
                microbatch = joined[start : start + config.per_device_train_batch_size]
                batch = announced(microbatch, model, config, announce)
                seen.add(sum_d, gradients.forward(batch), microbatch, config.dp_clip)
            noised, _ = noise.apply(sum_d)
            _set_gradients(weights, noised / expected_rows)
            for anchor in anchors:
                if anchor.grad is not None:
                    anchor.grad /= expected_rows
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    model.eval()
    seen.tell_left_out()
    return Training(seen.nats / max(seen.tokens, 1), seen.tokens, config.local_steps, time.monotonic() - started)


@dataclass(slots=True)
class _Seen:
    """What became of the rows that joined: the losses that are finite, over their tokens, and how many were left out.

    None of it leaves this site where the run tells no metrics.
    """

    nats: float = 0.0
    tokens: int = 0
    left_out: int = 0

    def add(self, sum_d: Vector, microbatch: Microbatch, rows: Sequence[TokenRow], clip: float) -> None:
        """Adds the rows' clipped gradients to `sum_d` in place."""
        sum_d += microbatch.clipped_sum(clip)
        self.left_out += microbatch.left_out
        for loss, row in zip(microbatch.losses_B.tolist(), rows, strict=True):
            if math.isfinite(loss):
                self.nats += loss * row.targets
                self.tokens += row.targets

    def tell_left_out(self) -> None:
        if self.left_out:
            logger.warning(
                "%d times in this round a row's loss or gradient was not finite, and the row was left out of its step; "
                "where that goes on, the model has diverged: lower learning-rate, or clip and noise",
                self.left_out,
            )


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
