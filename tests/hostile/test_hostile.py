"""A sample of the hostile clients, from a seed that is printed; `make hostile` plays all of them at full size."""

from __future__ import annotations

import asyncio
import os
import random
import secrets
from pathlib import Path
from typing import Any

import pytest

from server_trunk import conversation
from server_trunk.memory import Hold
from tests.hostile.__main__ import OPEN, QUICK_SCALE, fuzzed, stormed
from tests.hostile.fuzz import Fuzz, Tally
from tests.hostile.impostors import LOCKED
from tests.hostile.stage import serving

FRAMES, ATTACKS, SECONDS = 2_000, 6, 1.0


@pytest.fixture(scope="module")
def seed() -> int:
    return int(os.environ.get("TRUNKLINE_HOSTILE_SEED", secrets.randbits(32)))


@pytest.mark.timeout(600)
def test_fuzzed_conversations_end_well_or_by_a_named_error_and_leave_nothing(seed: int) -> None:
    found = asyncio.run(fuzzed(seed, FRAMES))
    assert found["faults"] == [], f"TRUNKLINE_HOSTILE_SEED={seed}"
    assert found["frames"] >= FRAMES
    assert found["honest"] > 5
    assert found["ends"]["well"] > 0
    assert found["ends"]["FrameError"] > 0


@pytest.mark.timeout(900)
def test_under_attack_memory_stays_in_its_budget_and_honest_clients_get_their_bits(seed: int) -> None:
    attacks = random.Random(seed).sample(OPEN, ATTACKS)
    found = stormed(seed, SECONDS, QUICK_SCALE, attacks)
    assert found["faults"] == [], f"TRUNKLINE_HOSTILE_SEED={seed}, of {attacks}"
    assert [phase["name"] for phase in found["phases"][1:-1]] == attacks
    assert all(phase["rounds"] for phase in found["phases"])
    assert all(phase["ends"] for phase in found["phases"][1:-1]), "each attack did something"


@pytest.mark.timeout(600)
def test_impostors_are_let_in_by_no_ticket_and_no_certificate(seed: int) -> None:
    found = stormed(seed, 2.0, QUICK_SCALE, list(LOCKED), locked=True)
    assert found["faults"] == [], f"TRUNKLINE_HOSTILE_SEED={seed}"
    _, by_ticket, by_certificate, _ = found["phases"]
    assert by_ticket["ends"]["TicketError"] > 20
    assert by_certificate["ends"]["AccessError"] > 20
    assert by_certificate["ends"]["UNAVAILABLE"] > 5


def played(folder: Path, batches: int) -> Tally:
    """The tally of a few batches, from a seed of their own."""

    async def play() -> Tally:
        async with serving(folder) as (server, served):
            fuzz = Fuzz(server, served, 1)
            fuzz.patience_s = 0.5
            for number in range(8):
                fuzz._expected[number] = await fuzz._honest(number)
            for number in range(batches):
                await fuzz.batch(number)
            return fuzz.tally

    return asyncio.run(play())


def test_the_fuzzing_sees_an_error_that_nobody_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(step: Any) -> Any:
        raise ValueError("a fault of the trunk's own")

    monkeypatch.setattr(conversation, "read_step", broken)
    assert any("it ended with ValueError and no named error" in fault for fault in played(tmp_path, 1).faults)


def test_the_fuzzing_sees_memory_that_is_not_given_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Hold, "release", lambda hold: None)
    assert any("bytes of memory" in fault for fault in played(tmp_path, 1).faults)


def test_the_fuzzing_sees_answers_that_others_changed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = 0
    deliver = conversation.Conversation._deliver

    async def sometimes_wrong(self: conversation.Conversation, out: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 60 and out.size:
            out._data = memoryview(bytearray(out._data))
            out._data[0] ^= 1
        await deliver(self, out)

    monkeypatch.setattr(conversation.Conversation, "_deliver", sometimes_wrong)
    assert any("beside it got other bits" in fault for fault in played(tmp_path, 4).faults)
