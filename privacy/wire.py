"""The seam through which every value passes on its way from a client's model to the wire.

Nothing but a mechanism makes noise. This package knows no torch: a mechanism takes float32 arrays and gives the same
back. A mechanism serves one round of one site, in one thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from contract.errors import BudgetError, ConfigError, FrameError
from contract.privacy_records import Channel, PrivacyEvent
from privacy.gaussian import GaussianRows, require_finite
from privacy.masking import Mask, RowMask
from privacy.stream import SecretStream

Singles = npt.NDArray[np.float32]

_FORWARD, _BACKWARD = "the hidden states at the head cut", "the gradient at the tail cut"


class WireMechanism(Protocol):
    """What stands between a client's head or tail and the codec, on hidden states and on their gradients alike.

    `rows` are the site's numbers of the B rows in a batch, in its order. Both passes raise NonFiniteError before
    anything is counted or noised, and FrameError where `rows` are not as many as the batch's.
    """

    @property
    def name(self) -> str:
        """As in the run's configuration and records."""

    @property
    def summary(self) -> str:
        """One plain sentence on what the trunk's operator can learn; shown with every run."""

    @property
    def events(self) -> Mapping[Channel, PrivacyEvent]:
        """What one pass costs each of its rows, by channel; a channel that is absent has no price."""

    def forward(self, hidden_BTD: Singles, rows: Sequence[int]) -> Singles:
        """What may leave in place of the hidden states, same shape and type."""

    def backward(self, grad_BTD: Singles, rows: Sequence[int]) -> Singles:
        """What may leave in place of the gradient, same shape and type."""


class Off:
    """Lets everything pass as it is."""

    name = "off"
    summary = "wire privacy is off: the server can read the text"
    events: Mapping[Channel, PrivacyEvent] = {}

    def forward(self, hidden_BTD: Singles, rows: Sequence[int]) -> Singles:
        return hidden_BTD

    def backward(self, grad_BTD: Singles, rows: Sequence[int]) -> Singles:
        return grad_BTD


class Empirical:
    """Noise in proportion to each row, and masked gradients; nothing is clipped, so that there is no epsilon."""

    name = "empirical"
    events: Mapping[Channel, PrivacyEvent] = {}

    def __init__(self, noise: float, mask: Mask, keep: float, stream: SecretStream) -> None:
        """`noise` is the noise's standard deviation over the root mean square of the row it is added to."""
        if not 0.0 <= noise < np.inf:
            raise ConfigError(f"wire-noise is {noise}; it must be a number of 0 or more")
        self._noise, self._stream = noise, stream
        self._mask = RowMask(mask, keep, stream)
        parts = [f"noise of {noise:g} times a row's root mean square is added"] if noise else []
        if mask != "none":
            which = "the largest" if mask == "top-k" else "a random"
            parts.append(f"{which} {keep:.4g} of each gradient's values is sent")
        self.summary = (
            f"wire privacy is empirical: {' and '.join(parts) or 'nothing is changed'}; this has no epsilon, and what "
            "the server can read is measured by `trunkline audit run`"
        )

    def forward(self, hidden_BTD: Singles, rows: Sequence[int]) -> Singles:
        _check(hidden_BTD, rows, _FORWARD)
        return hidden_BTD + self._noise_for(hidden_BTD)

    def backward(self, grad_BTD: Singles, rows: Sequence[int]) -> Singles:
        """The noise is added to the values that are sent, and never held back."""
        _check(grad_BTD, rows, _BACKWARD)
        masked_BTD, sent_BTD = self._mask.apply(grad_BTD, rows)
        return np.where(sent_BTD, masked_BTD + self._noise_for(grad_BTD), np.float32(0.0))

    def _noise_for(self, value_BTD: Singles) -> Singles:
        if not self._noise:
            return np.zeros_like(value_BTD)
        mean_squares_B = np.mean(np.square(value_BTD, dtype=np.float64), axis=(1, 2), keepdims=True)
        noise_BTD = self._stream.standard_normal(value_BTD.shape)
        noise_BTD *= self._noise * np.sqrt(mean_squares_B)
        return noise_BTD.astype(np.float32)


class WireDp:
    """Each row's activations, and its gradient, clipped and noised as one vector of T x D values.

    All that the trunk does afterwards is post-processing, as long as no row leaves more often than was priced.
    """

    name = "dp"

    def __init__(
        self, clip_forward: float, clip_backward: float, noise_multiplier: float, releases: int, stream: SecretStream
    ) -> None:
        """`releases` is how often a row may go each way; ConfigError for clips and multipliers not above 0."""
        self._ways: dict[Channel, GaussianRows] = {
            "wire_forward": GaussianRows(clip_forward, noise_multiplier, stream),
            "wire_backward": GaussianRows(clip_backward, noise_multiplier, stream),
        }
        self._releases = releases
        self._sent: dict[Channel, Counter[int]] = {channel: Counter() for channel in self._ways}
        self.summary = (
            f"wire privacy is dp: each row's activations are clipped to {clip_forward:g} and its gradient to "
            f"{clip_backward:g}, both with Gaussian noise of {noise_multiplier:g} times that, and sent at most "
            f"{releases} times a round; the epsilon is told at the end"
        )

    @property
    def events(self) -> Mapping[Channel, PrivacyEvent]:
        return {channel: way.event for channel, way in self._ways.items()}

    def forward(self, hidden_BTD: Singles, rows: Sequence[int]) -> Singles:
        """Raises BudgetError, naming the row, before anything is noised, where one was sent often enough."""
        return self._release("wire_forward", hidden_BTD, rows, _FORWARD)

    def backward(self, grad_BTD: Singles, rows: Sequence[int]) -> Singles:
        """Raises BudgetError, naming the row, before anything is noised, where one was sent often enough."""
        return self._release("wire_backward", grad_BTD, rows, _BACKWARD)

    def _release(self, channel: Channel, value_BTD: Singles, rows: Sequence[int], what: str) -> Singles:
        _check(value_BTD, rows, what)
        sent, now = self._sent[channel], Counter(rows)
        for row, times in now.items():
            if sent[row] + times > self._releases:
                raise BudgetError(
                    f"{what}: row {row} would be sent {sent[row] + times} times in this round; wire-releases lets it "
                    f"go {self._releases} times"
                )
        sent.update(now)  # before the noise: whatever fails from here on stays spent
        noised_BTD, _ = self._ways[channel].apply(value_BTD)
        return noised_BTD


def _check(value_BTD: Singles, rows: Sequence[int], what: str) -> None:
    require_finite(value_BTD, what)
    if len(rows) != len(value_BTD):
        raise FrameError(f"{what}: a batch of {len(value_BTD)} rows came with {len(rows)} row numbers")
