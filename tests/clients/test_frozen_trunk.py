"""A round whose trunk trains nothing: the client's half learns as beside a trained one, and the trunk's stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clients.split_model import close, remote_layers, trunk_state
from contract.adapter import adapter_parameters, split_adapter
from contract.architecture import probe
from tests.clients.conftest import ALL_LINEAR, CUT, opened
from tests.conftest import TrunkProcess
from tests.contract.families import batch
from tests.contract.parity import Tensors, differences, run, trained_adapter


@pytest.fixture
def start(llama_dir: Path) -> Tensors:
    return trained_adapter(llama_dir, ALL_LINEAR)


def test_the_clients_gradients_are_bitwise_those_beside_a_trained_trunk(
    llama_dir: Path, trunk: TrunkProcess, start: Tensors
) -> None:
    found = []
    for frozen in (False, True):
        with opened(llama_dir, trunk.address, CUT, start, trunk_frozen=frozen) as model:
            found.append([run(model, adapter_parameters(model), batch(padding)) for padding in ("left", "right")])
            assert remote_layers(model).anchor.requires_grad is not frozen
    for expected, got in zip(*found, strict=True):
        assert differences(expected, got) == []


def test_any_optimizer_steps_the_clients_half_and_the_trunks_stays(
    llama_dir: Path, trunk: TrunkProcess, start: Tensors
) -> None:
    with opened(llama_dir, trunk.address, CUT, start, trunk_frozen=True) as model:
        mine = adapter_parameters(model)
        optimizers = [torch.optim.SGD(mine.values(), lr=0.1), torch.optim.AdamW(model.parameters(), lr=0.1)]
        for optimizer in optimizers:
            before = {name: value.detach().clone() for name, value in mine.items()}
            model(**batch().inputs()).loss.backward()
            optimizer.step()
            assert len(differences(before, dict(mine))) == len(mine)
        trunk_start = split_adapter(start, probe(llama_dir), CUT)[1]
        assert differences(trunk_start, trunk_state(model)) == []
        assert trunk_state(model, gradients=True) == {}
        assert "trunk.step" not in remote_layers(model).trunk.wire_log.summary()
        assert close(model).trained_tokens == 0
