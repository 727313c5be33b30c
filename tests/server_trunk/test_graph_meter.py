"""What a pass without a graph holds at once, against the tensors that are really there."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contract.adapter import resolve_lora
from server_trunk.engine import Engine
from server_trunk.lane import Forward
from tests.contract.families import attention, save_model
from tests.server_trunk.conftest import CUT, HIDDEN, trunk_only

ROWS, LENGTH = 4, 24


class LiveTensors(TorchDispatchMode):
    """Bytes of the storages that are made within and not yet gone, and the most that there were of them."""

    def __init__(self) -> None:
        super().__init__()
        self._holders: dict[int, tuple[int, int]] = {}  # by address: size, tensors that have it
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        before = {one.untyped_storage().data_ptr() for one in tree_leaves(args) if isinstance(one, torch.Tensor)}
        for tensor in tree_leaves(answer):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                address = storage.data_ptr()
                if address in self._holders or address not in before:
                    size, holders = self._holders.get(address, (storage.nbytes(), 0))
                    self._holders[address] = size, holders + 1
                    weakref.finalize(tensor, self._gone, address)
        self.most = max(self.most, sum(size for size, _ in self._holders.values()))
        return answer

    def _gone(self, address: int) -> None:
        size, holders = self._holders.pop(address)
        if holders > 1:
            self._holders[address] = size, holders - 1


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom", "gemma3-text"])
def test_a_forward_without_a_graph_holds_no_more_than_was_estimated(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path)
    engine = Engine(
        tmp_path, CUT, dtype="float32", attn_implementation=attention(family), device="cpu", lanes=1, weights=""
    )
    spec = trunk_only(resolve_lora(tmp_path, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")))
    adapter = engine.open(spec, 0, "AB")
    asked = Forward(adapter, torch.randn(ROWS, LENGTH, HIDDEN), None, None, need_grad=False)
    engine.lanes[0].forward([asked])  # what is made once for all
    with LiveTensors() as live:
        engine.lanes[0].forward([asked])
    estimated = engine.meter.transient(asked.kind, asked.tokens)
    assert 0 < live.most <= estimated < engine.meter.estimate(asked.kind, asked.tokens)
