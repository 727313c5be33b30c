"""The gradient of each row of a microbatch by itself, over the client's half of the adapter: what DP-SGD clips.

Three ways, through a remote trunk as through a whole model: book-keeping (clients/bookkeeping.py), and Opacus's hooks
and ghost clipping (clients/opacus_gradients.py). Each is tried on made-up rows before it sees one of a site's
(clients/gradient_proof.py). All of them go over the wire once, forth and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from torch import nn

from clients.bookkeeping import BookKeeping
from clients.gradient_proof import proved
from clients.row_gradients import ExampleGradients, sound_crossing, trained_layers

Method = Literal["book-keeping", "hooks", "ghost"]


@contextmanager
def example_gradients(model: nn.Module, method: Method) -> Iterator[ExampleGradients]:
    """Rows' gradients of `model` by `method`, proved on made-up rows first.

    Raises ConfigError where that fails, and where the model holds what rows' gradients are not proved for.
    """
    layers = trained_layers(model)
    with sound_crossing(model):
        gradients = _proved(model, layers, method)
        try:
            yield gradients
        finally:
            gradients.close()


def _proved(model: nn.Module, layers: Mapping[str, nn.Linear], method: Method) -> ExampleGradients:
    if method == "book-keeping":
        return proved(model, layers, lambda: BookKeeping(model, layers))
    from clients.opacus_gradients import Ghost, Hooks  # Opacus takes half a second to import

    way = Hooks if method == "hooks" else Ghost
    return proved(model, layers, lambda: way(model, layers))
