"""A tiny Llama with a tokenizer of its own, a trunk in another process, and rounds by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity
from peft import LoraConfig, PeftModel

from clients.connection import TrunkConnection
from clients.split_model import RoundStart, SplitSettings, closing_session, open_split_model
from contract import adapter
from contract.architecture import probe
from contract.records import CutLayers, Factor, RoundKey
from contract.trunk_arithmetic import PLAIN, TrunkArithmetic
from orchestrator.trunk import Trunk
from privacy.wire import WireMechanism
from tests.clients.sites import save_site_model
from tests.conftest import TrunkProcess
from tests.contract.parity import Tensors

CUT = CutLayers(1, 1)
ALL_LINEAR = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_site_model(tmp_path_factory.mktemp("models") / "tiny llama")


@pytest.fixture(scope="session")
def trunk(trunk_process: Callable[..., TrunkProcess], llama_dir: Path) -> TrunkProcess:
    """Serves the tiny Llama for all tests of this folder that leave it as it was."""
    return trunk_process(llama_dir, CUT.head, CUT.tail)


@pytest.fixture(scope="session")
def flower_task() -> Iterator[None]:
    """Messages name the Flower task that makes them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_run_id", "_node_id", "_task_id"):
            patch.setattr(TaskIdentity, name, 1)
        yield


@contextmanager
def opened(
    model_dir: Path,
    address: str,
    cut: CutLayers,
    tensors: Tensors,
    lora: LoraConfig = ALL_LINEAR,
    *,
    attn_implementation: str = "sdpa",
    key: RoundKey | None = None,
    client_id: str = "client-1",
    trainable: Factor = "AB",
    trunk_frozen: bool = False,
    mechanism: WireMechanism | None = None,
    arithmetic: TrunkArithmetic = PLAIN,
) -> Iterator[PeftModel]:
    """A split model in a round that starts from `tensors`, as a client app opens it."""
    spec = adapter.resolve_lora(model_dir, lora)
    client, trunk_part = adapter.split_adapter(tensors, probe(model_dir), cut)
    orchestrator = Trunk(address)
    start = RoundStart(
        key=key or RoundKey(re.sub(r"\W", "-", address), 1, 1),
        client_id=client_id,
        trainable=trainable,
        client_vector=adapter.flatten(client, sorted(client)),
        client_sha256=adapter.sha256_hex(adapter.to_bytes(client)),
        trunk_sha256=orchestrator.put_adapter(adapter.to_bytes(trunk_part)),
        trunk_frozen=trunk_frozen,
    )
    orchestrator.close()
    settings = SplitSettings(
        model_dir, cut, attn_implementation=attn_implementation, mechanism=mechanism, arithmetic=arithmetic
    )
    model = open_split_model(settings, spec, TrunkConnection(address), start)
    with closing_session(model):
        yield model
