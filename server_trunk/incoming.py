"""The tensors of one forward: as they came, or from disk, or as a difference to what the session sent before."""

from __future__ import annotations

from torch import Tensor

from contract import codec
from contract import trunk_pb2 as pb
from contract.delta import SampleCache
from server_trunk.lane import Graph
from server_trunk.memory import Spill, Spilled
from server_trunk.requests import ForwardInputs


class Incoming:
    """Decodes a forward's hidden states and encodes its answer, on a lane's thread."""

    def __init__(
        self,
        forward: pb.Forward,
        inputs: ForwardInputs,
        samples: SampleCache,
        data: memoryview,
        put_aside: Spilled | None,
        spill: Spill | None,
    ) -> None:
        """`data` is in memory, or `put_aside` on disk. With `spill` no input is to be held after its forward."""
        self._forward = forward
        self._inputs = inputs
        self._samples = samples
        self._data: memoryview | None = data
        self._put_aside = put_aside
        self._spill = spill

    def values_BTD(self) -> Tensor:
        """Raises FrameError, NonFiniteError and StorageError. A difference is decoded once: it moves the cache."""
        header, mask_BT, samples = self._forward.hidden, self._inputs.mask_BT, self._inputs.samples
        data = self._data if self._put_aside is None else self._put_aside.read()
        if data is None:
            raise RuntimeError("a forward's tensor is decoded once")
        if samples is None:
            hidden_BTD = codec.decode(header, data, mask_BT)
        else:
            hidden_BTD = self._samples.decode("head", header, data, mask_BT, samples)
            self._data = self._put_aside = None
        codec.require_finite(hidden_BTD, "forward.hidden")
        return hidden_BTD

    def answer(self, output_BTD: Tensor) -> tuple[pb.TensorHeader, memoryview]:
        """Raises NonFiniteError for values that the reply's codec cannot carry."""
        if self._inputs.samples is None:
            return codec.encode(output_BTD, self._forward.reply_codec, self._inputs.mask_BT)
        return self._samples.encode("tail", output_BTD, self._inputs.mask_BT, self._inputs.samples)

    def lighten(self, graph: Graph) -> None:
        """Leave the input to the disk, where memory had no room for it. Raises CapacityError, StorageError."""
        if self._spill is None:
            return
        if self._put_aside is not None:
            graph.put_aside(self.values_BTD)
        else:
            _put_input_aside(graph, self._spill)


def put_aside(graph: Graph, spill: Spill) -> None:
    """Leave all that a graph keeps to the disk: its backward computes the forward again.

    In its session's turn only. Raises CapacityError, StorageError.
    """
    if graph.forward.read_again is None:
        _put_input_aside(graph, spill)
    graph.drop()


def _put_input_aside(graph: Graph, spill: Spill) -> None:
    header, data = codec.encode(graph.forward.hidden_BTD, "identity")
    kept = spill.put(data)
    graph.put_aside(lambda: codec.decode(header, kept.read()))
