"""A trunk of two processes (gloo, started by torchrun) gives each client the un-split model's result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel

from clients.split_model import trunk_state
from contract.adapter import adapter_parameters
from contract.errors import AgreementError, ConnectionFailedError
from contract.records import CutLayers, RoundKey
from tests.clients.conftest import ALL_LINEAR, opened
from tests.contract.families import Batch, attention, batch, save_model
from tests.contract.parity import Tensors, reference, run, trained_adapter

CUT = CutLayers(1, 1)
FAMILIES = ("llama", "qwen3", "phi3")
READY_S = 180.0
REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.deployment
PATTERNS = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules="all-linear",
    rank_pattern={"v_proj": 2, "layers.2.mlp.up_proj": 8},
    alpha_pattern={"o_proj": 3},
    use_rslora=True,
    task_type="CAUSAL_LM",
)

Torchrun = subprocess.Popen[bytes]


def started(model_dir: Path, folder: Path, *options: str) -> Torchrun:
    """torchrun with two processes of the trunk of `model_dir`, which write to FOLDER/announce and FOLDER/log."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "trunkline", "trunk", "serve", "--model", str(model_dir), "--listen", "127.0.0.1:0"]
    command += ["--device", "cpu", "--threads", "1", "--grace-s", "1", "--state-dir", str(folder / "state")]
    command += ["--announce-file", str(folder / "announce"), *options]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


@contextmanager
def serving(model_dir: Path, folder: Path, *options: str) -> Iterator[tuple[str, Torchrun]]:
    process = started(model_dir, folder, *options)
    ranks: list[int] = []
    try:
        deadline = time.monotonic() + READY_S
        while not (folder / "announce").is_file():
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the trunk did not come up:\n{(folder / 'log').read_text()[-3000:]}")
            time.sleep(0.05)
        ranks = children(process)
        yield (folder / "announce").read_text().strip(), process
    finally:
        ended(process, ranks)


def ended(process: Torchrun, ranks: Sequence[int] = ()) -> None:
    """torchrun's processes have groups of their own, and outlive one that is killed."""
    process.terminate()
    try:
        process.wait(60)
    finally:
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        process.kill()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: save_model(family, root / family) for family in (*FAMILIES, "gpt2")}


@pytest.fixture(scope="module")
def address_of(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], str]]:
    """The address of a family's trunk, which is started at its first use."""
    root = tmp_path_factory.mktemp("sharded")
    found: dict[str, str] = {}
    with ExitStack() as stack:

        def address(family: str) -> str:
            if family not in found:
                found[family] = stack.enter_context(serving(checkpoints[family], root / family))[0]
            return found[family]

        yield address


def split_run(model: PeftModel, padding: str) -> Tensors:
    model.zero_grad()
    found = run(model, adapter_parameters(model), batch(padding))
    return found | {f"grad {name}": grad for name, grad in trunk_state(model, gradients=True).items()}


def require_close(expected: Tensors, got: Tensors) -> None:
    """To 1e-5 of each tensor's largest value."""
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert (value - got[name]).abs().max() <= 1e-5 * value.abs().max(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_logits_and_gradients_are_the_unsplit_ones(
    checkpoints: dict[str, Path], address_of: Callable[[str], str], family: str
) -> None:
    tensors = trained_adapter(checkpoints[family], ALL_LINEAR)
    whole = reference(checkpoints[family], ALL_LINEAR, tensors, attention(family))
    with opened(checkpoints[family], address_of(family), CUT, tensors) as model:
        for padding in ("none", "left", "right"):
            require_close(run(whole, adapter_parameters(whole), batch(padding)), split_run(model, padding))


def test_the_comparison_would_see_another_adapter(
    checkpoints: dict[str, Path], address_of: Callable[[str], str]
) -> None:
    whole = reference(checkpoints["llama"], ALL_LINEAR, trained_adapter(checkpoints["llama"], ALL_LINEAR), "sdpa")
    other = trained_adapter(checkpoints["llama"], ALL_LINEAR, seed=6)
    with opened(checkpoints["llama"], address_of("llama"), CUT, other) as model:
        with pytest.raises(AssertionError):
            require_close(run(whole, adapter_parameters(whole), batch()), split_run(model, "none"))


def test_clients_of_other_ranks_at_once_get_their_own_results(
    checkpoints: dict[str, Path], address_of: Callable[[str], str]
) -> None:
    """Their passes may be shared, which one is a matter of time."""
    address = address_of("llama")
    model_dir = checkpoints["llama"]
    loras = [ALL_LINEAR, PATTERNS, ALL_LINEAR]
    adapters = [trained_adapter(model_dir, lora, seed) for seed, lora in enumerate(loras)]
    key = RoundKey("at-once", 1, 1)
    with ExitStack() as stack:
        models = [
            stack.enter_context(opened(model_dir, address, CUT, tensors, lora, key=key, client_id=f"client-{number}"))
            for number, (lora, tensors) in enumerate(zip(loras, adapters, strict=True))
        ]
        pool = stack.enter_context(ThreadPoolExecutor(len(models)))
        results = list(pool.map(lambda model: [split_run(model, "none") for _ in range(6)], models))
    for lora, tensors, found in zip(loras, adapters, results, strict=True):
        whole = reference(model_dir, lora, tensors, "sdpa")
        expected = run(whole, adapter_parameters(whole), batch())
        for got in found:
            require_close(expected, got)


def test_steps_train_as_the_unsplit_model_does(checkpoints: dict[str, Path], address_of: Callable[[str], str]) -> None:
    tensors = trained_adapter(checkpoints["llama"], ALL_LINEAR)
    whole = reference(checkpoints["llama"], ALL_LINEAR, tensors, "sdpa")

    def losses(model: PeftModel) -> list[float]:
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
        found = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = model(**batch("left").inputs()).loss
            loss.backward()
            optimizer.step()
            found.append(float(loss))
        return found

    with opened(checkpoints["llama"], address_of("llama"), CUT, tensors, key=RoundKey("steps", 1, 1)) as model:
        assert losses(model) == pytest.approx(losses(whole), rel=1e-5)


def test_forwards_without_room_for_their_graphs_are_computed_again(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    tensors = trained_adapter(checkpoints["llama"], ALL_LINEAR)
    whole = reference(checkpoints["llama"], ALL_LINEAR, tensors, "sdpa")
    tokens_BT = torch.randint(32, (64, 16), generator=torch.Generator().manual_seed(0))
    large = Batch(tokens_BT, None, tokens_BT)
    expected = run(whole, adapter_parameters(whole), large)
    with (
        serving(checkpoints["llama"], tmp_path / "small", "--memory-budget", "64M") as (address, _),
        opened(checkpoints["llama"], address, CUT, tensors) as model,
    ):
        # Twelve graphs of megabytes each are more than the budget has room for; all wait for one backward.
        losses = [model(**large.inputs()).loss for _ in range(12)]
        torch.stack(losses).mean().backward()
        got = {f"grad {name}": one.grad for name, one in adapter_parameters(model).items()}
        got |= {f"grad {name}": grad for name, grad in trunk_state(model, gradients=True).items()}
    require_close({name: value for name, value in expected.items() if name in got}, got)


def test_adapters_with_dropout_are_refused(checkpoints: dict[str, Path], address_of: Callable[[str], str]) -> None:
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    tensors = trained_adapter(checkpoints["llama"], lora)
    with (
        pytest.raises(AgreementError, match="parted among 2 processes, .* dropout is 0.1"),
        opened(checkpoints["llama"], address_of("llama"), CUT, tensors, lora),
    ):
        pass


def test_a_model_without_a_plan_is_refused_by_name(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    process = started(checkpoints["gpt2"], tmp_path / "gpt2")
    try:
        assert process.wait(READY_S) != 0
    finally:
        ended(process)
    assert "gpt2 has no tensor-parallel plan: serve it by one process" in (tmp_path / "gpt2" / "log").read_text()


def test_told_to_end_all_processes_end_well(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with serving(checkpoints["llama"], tmp_path / "ends") as (_, process):
        ranks = children(process)
        assert len(ranks) == 2
        os.kill(ranks[0], signal.SIGTERM)  # as torchrun does; it would itself report what it was told as an error
        os.kill(ranks[1], signal.SIGTERM)
        assert process.wait(30) == 0, (tmp_path / "ends" / "log").read_text()


def test_a_process_that_dies_ends_the_trunk_and_says_so(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = trained_adapter(checkpoints["llama"], ALL_LINEAR)
    with serving(checkpoints["llama"], tmp_path / "dies") as (address, process):
        with opened(checkpoints["llama"], address, CUT, tensors) as model:
            model(**batch().inputs()).loss.backward()
            os.kill(children(process)[1], signal.SIGKILL)
            with pytest.raises(ConnectionFailedError, match="all end|broke|shutting down"):
                model(**batch().inputs())
        assert process.wait(60) != 0


def test_a_leader_that_dies_takes_the_others_along(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with serving(checkpoints["llama"], tmp_path / "leader") as (_, process):
        leader, follower = children(process)
        os.kill(leader, signal.SIGKILL)
        assert process.wait(60) != 0
        assert not Path(f"/proc/{follower}").exists()


def children(process: Torchrun) -> list[int]:
    """The processes of a trunk, the leader first."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {Path(f"/proc/{one}/environ").read_bytes().split(b"\0RANK=")[1].split(b"\0")[0]: int(one) for one in found}
    return [ranks[rank] for rank in sorted(ranks)]
