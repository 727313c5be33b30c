"""Every field that leaves a client in a round, with its size, against docs/wire.md; and what must not be among them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord
from flwr.common.serde import message_to_proto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from clients.data import load_dataset, load_tokenizer
from clients.wire_log import field_sizes
from contract.codec import unpack_mask
from contract.config import RunConfig
from contract.trunk_pb2 import ClientFrame, Forward
from tests.clients.capture import Capture
from tests.clients.sites import Orchestrator, Site, upload_bytes, write_texts
from tests.conftest import TrunkProcess

WIRE_PAGE = Path(__file__).parent.parent.parent / "docs" / "wire.md"
WINDOW = 4
ELEMENT_BYTES = 4
CONFIG = RunConfig.from_flower(
    {
        "local-steps": 3,
        "per-device-train-batch-size": 3,
        "gradient-accumulation-steps": 2,
        "max-length": 16,
        "eval-fraction": 0.25,
        "lora-r": 4,
        "seed": 5,
        "secagg": "off",
        "trunk-autocast": "bfloat16",
        "deterministic": True,
    }
)


@dataclass
class Round:
    """One client's round as it went over the wire."""

    site: Site
    trunk_raw: bytes
    calls: list[list[bytes]]
    reply: Message
    wire_log: list[dict[str, Any]]
    trained_values: int
    orchestrator: Orchestrator

    def frames(self) -> list[ClientFrame]:
        (session,) = [call for call in self.calls if call != [b""]]
        return [ClientFrame.FromString(message) for message in session]

    def flower_raw(self) -> bytes:
        """What Flower pushes for the reply: its objects."""
        return b"".join(value.deflate() for value in get_all_nested_objects(self.reply).values())


@pytest.fixture(scope="module", params=["train", "final"])
def played(
    llama_dir: Path,
    trunk: TrunkProcess,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
    flower_task: None,
) -> Iterator[Round]:
    final = request.param == "final"
    capture = Capture(trunk.address)
    folder = tmp_path_factory.mktemp("audit")
    data = write_texts(folder / "private notes.jsonl", rows=24, seed=3)
    log = folder / "wire log.jsonl"
    node_config = {"model": str(llama_dir), "data": str(data), "trunk-address": capture.address}
    node_config |= {"wire-log": str(log), "name": "south"}
    site = Site(77, node_config)
    orchestrator = Orchestrator(CONFIG, llama_dir, trunk.address, run=f"audit-{request.param}")
    version = orchestrator.first()
    from clients.app import app

    reply = app(orchestrator.message(version, site, 1, final=final), site.context(CONFIG))
    assert not reply.has_error(), reply.error.reason
    factor = orchestrator.order(version, 1).factor
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    trained_values = int(version.client.trained(factor).sum())
    yield Round(site, capture.raw(), capture.messages(), reply, entries, trained_values, orchestrator)
    capture.close()


# ---- the table -----------------------------------------------------------------------------------------------------


def documented() -> dict[str, str]:
    """Field -> formula of its largest size."""
    rows = re.findall(r"^\| (\w+) \| ([\w.() ]+) \| ([^|]+) \| [^|]+ \| [^|]+ \|$", WIRE_PAGE.read_text(), re.MULTILINE)
    return {field.strip(): formula.strip() for _, field, formula in rows if field != "Field"}


def limit(formula: str, **values: float) -> float:
    return float(eval(formula, {"__builtins__": {}, "ceil": ceil}, values))


def leaves(descriptor: Descriptor, prefix: str = "") -> Iterator[str]:
    for found in descriptor.fields:
        name = prefix + found.name
        if found.type == FieldDescriptor.TYPE_MESSAGE and not found.message_type.GetOptions().map_entry:
            yield from leaves(found.message_type, f"{name}.")
        else:
            yield name


def unpadded(forward: Forward) -> int:
    """Positions up to the last token of each row; rows are padded on the right here."""
    rows, tokens, _ = forward.hidden.shape
    return int(unpack_mask(forward.attention_mask_bits, rows, tokens).sum())


def sent_fields(played: Round) -> list[tuple[str, int, dict[str, float]]]:
    """(field, bytes, the formula's variables) of everything sent to the trunk; chunks are summed by their request."""
    sent: list[tuple[str, int, dict[str, float]]] = []
    targets = 0
    shape: dict[str, float] = {}
    chunks: defaultdict[int, int] = defaultdict(int)
    positions: dict[int, int] = {}
    for index, frame in enumerate(played.frames()):
        kind = str(frame.WhichOneof("body"))
        if kind == "hello":
            targets = sum(len(name) + 16 for name in frame.hello.lora.target_modules)
        if kind in ("forward", "backward"):
            header = frame.forward.hidden if kind == "forward" else frame.backward.grad
            rows, tokens, hidden = header.shape
            if kind == "forward":
                positions[frame.forward.microbatch] = unpadded(frame.forward)
            microbatch = frame.forward.microbatch if kind == "forward" else frame.backward.microbatch
            shape = {"B": rows, "T": tokens, "D": hidden, "N": positions[microbatch], "e": ELEMENT_BYTES}
            request, owner = kind, index
        if kind == "chunk":
            chunks[owner] += frame.ByteSize()
            sent = [entry for entry in sent if entry[2].get("owner") != owner]
            sent.append((f"chunk.data ({request})", chunks[owner], {**shape, "owner": owner}))
            continue
        values = {**shape, "targets": targets, "run": len(played.orchestrator.run), "client_id": len(played.site.name)}
        sent += [(field, size, values) for field, size in field_sizes(frame)]
    return sent


def reply_fields(reply: Message) -> list[tuple[str, int]]:
    found = list(field_sizes(message_to_proto(reply).metadata, "metadata."))
    for record_name, record in reply.content.items():
        if isinstance(record, MetricRecord):
            # A tag and a double, for each of a list's numbers too.
            sizes = {name: 9 * len(value) if isinstance(value, list) else 9 for name, value in record.items()}
            found += [(f"{record_name}.{name}", size) for name, size in sizes.items()]
        elif isinstance(record, ArrayRecord):
            array: Array
            for array in record.values():
                found.append((record_name, len(array.data)))
        else:
            found.append((f"{record_name}: {type(record).__name__}", 0))
    return found


def test_a_refusal_tells_a_code_and_a_reason_of_a_bounded_size(
    llama_dir: Path, trunk: TrunkProcess, tmp_path: Path, flower_task: None
) -> None:
    data = tmp_path / ("x" * 200) / ("y" * 200) / "notes that are gone.jsonl"
    node_config = {"model": str(llama_dir), "data": str(data), "trunk-address": trunk.address, "name": "south"}
    site = Site(78, node_config)
    orchestrator = Orchestrator(CONFIG, llama_dir, trunk.address, run="audit-refused")
    from clients.app import app

    reply = app(orchestrator.message(orchestrator.first(), site, 1), site.context(CONFIG))
    assert reply.has_error()
    table, sent = documented(), dict(field_sizes(message_to_proto(reply).error, "error."))
    assert sent.keys() == {"error.code", "error.reason"}
    for field, size in sent.items():
        assert size <= limit(table[field]), f"{field} has {size} bytes"
    assert "y" * 200 in reply.error.reason, "the reason names the file that this site was told to read"


def test_every_field_of_the_protocol_is_documented() -> None:
    table = documented()
    fields = set(leaves(ClientFrame.DESCRIPTOR)) - {"chunk.data"}
    assert fields <= table.keys(), sorted(fields - table.keys())
    ours = {
        field for field in table if not field.startswith(("chunk", "metadata", "metrics", "error", "update", "secure"))
    }
    assert ours - fields == {"describe", "close", "read_adapter", "headers.traceparent"}


def test_every_field_that_left_is_documented_with_its_size(played: Round) -> None:
    table = documented()
    described = [call for call in played.calls if call == [b""]]
    assert len(played.calls) == len(described) + 1
    seen = set()
    for field, size, values in sent_fields(played):
        assert field in table, f"{field} left the client and is not in docs/wire.md"
        assert size <= limit(table[field], **values), f"{field} has {size} bytes"
        seen.add(field)
    for field, size in reply_fields(played.reply):
        assert field in table, f"{field} left the client and is not in docs/wire.md"
        assert size <= limit(table[field], d=played.trained_values, N=1, r=4), f"{field} has {size} bytes"
        seen.add(field)
    expected = {"hello.adapter_sha256", "forward.attention_mask_bits", "chunk.data (forward)", "metrics.eval_loss"}
    expected |= {"hello.trunk_autocast", "hello.deterministic"}
    training = {"chunk.data (backward)", "step.grad_scale", "close.trained_tokens", "update", "metrics.train_loss"}
    assert expected <= seen
    assert seen & training == (training if "update" in played.reply.content else set())


@pytest.mark.parametrize("played", ["train"], indirect=True)
def test_the_sizes_of_the_tensors_are_exactly_those_of_the_batches(played: Round) -> None:
    forwards = [frame.forward for frame in played.frames() if frame.WhichOneof("body") == "forward"]
    backwards = [frame.backward for frame in played.frames() if frame.WhichOneof("body") == "backward"]
    data = sum(len(frame.chunk.data) for frame in played.frames() if frame.WhichOneof("body") == "chunk")
    assert len(backwards) == CONFIG.local_steps * CONFIG.gradient_accumulation_steps
    positions = {forward.microbatch: unpadded(forward) for forward in forwards}
    requests = [request.microbatch for request in (*forwards, *backwards)]
    hidden_size = forwards[0].hidden.shape[2]
    assert data == sum(ELEMENT_BYTES * hidden_size * positions[microbatch] for microbatch in requests)
    assert sum(positions.values()) < sum(forward.hidden.shape[0] * forward.hidden.shape[1] for forward in forwards)
    transport = len(played.trunk_raw) - sum(len(message) for call in played.calls for message in call)
    messages = sum(len(call) for call in played.calls)
    assert transport < 60 * messages + 2000
    assert len(upload_bytes(played.reply)) == 4 * (played.trained_values + 1)


def test_the_wire_log_lists_exactly_what_was_captured(played: Round) -> None:
    logged = [entry for entry in played.wire_log if entry["channel"] == "trunk" and entry["message"] != "describe"]
    captured = [(str(frame.WhichOneof("body")), frame.ByteSize()) for frame in played.frames()]
    assert [(entry["message"], entry["bytes"]) for entry in logged] == captured
    for entry, frame in zip(logged, played.frames(), strict=True):
        assert sum(entry["fields"].values()) == entry["bytes"]
        assert entry["fields"] == dict(field_sizes(frame))
    (flower,) = [entry for entry in played.wire_log if entry["channel"] == "flower"]
    names = {name for name, _ in reply_fields(played.reply) if not name.startswith("metadata.")}
    assert set(flower["fields"]) == names
    sent = sum(entry["bytes"] for entry in played.wire_log)
    assert played.reply.content["metrics"]["sent_bytes"] == sent


# ---- what must not be there ----------------------------------------------------------------------------------------


def site_secrets(site: Site) -> dict[str, set[bytes]]:
    """Byte patterns of the site's tokens, labels and text, by name."""
    tokenizer = load_tokenizer(site.node_config["model"])
    data = load_dataset(site.node_config["data"], tokenizer, CONFIG.max_length, CONFIG.eval_fraction, CONFIG.seed)
    found: dict[str, set[bytes]] = defaultdict(set)
    for row in (*data.train_rows, *data.heldout_rows):
        for name, ids in (("tokens", row.tokens_T), ("labels", row.labels_T)):
            for start in range(len(ids) - WINDOW + 1):
                window = ids[start : start + WINDOW]
                for kind in ("<i4", "<i8", "<u2", ">i4", ">i8"):
                    found[f"{name} as {kind}"].add(window.astype(kind).tobytes())
            for start in range(len(ids) - 2 * WINDOW + 1):
                found[f"{name} as bytes"].add(ids[start : start + 2 * WINDOW].astype(np.uint8).tobytes())
    for line in Path(site.node_config["data"]).read_text().splitlines():
        words = json.loads(line)["text"].split()
        for start in range(len(words) - 2):
            phrase = " ".join(words[start : start + 3])
            found["text"] |= {phrase.encode(), phrase.encode("utf-16-le")}
    found["paths"] |= {site.node_config["data"].encode(), site.node_config["model"].encode(), b"private notes"}
    return found


def leaked(captured: bytes, secrets: dict[str, set[bytes]]) -> set[str]:
    return {name for name, patterns in secrets.items() if any(pattern in captured for pattern in patterns)}


def test_no_token_label_or_text_is_in_the_captured_bytes(played: Round) -> None:
    secrets = site_secrets(played.site)
    assert min(len(patterns) for patterns in secrets.values()) >= 3
    captured = [played.trunk_raw, played.flower_raw(), *(message for call in played.calls for message in call)]
    for part in captured:
        assert leaked(part, secrets) == set()


@pytest.mark.parametrize("played", ["train"], indirect=True)
def test_the_search_would_find_each_of_them(played: Round) -> None:
    secrets = site_secrets(played.site)
    for name, patterns in secrets.items():
        planted = played.trunk_raw[:1000] + sorted(patterns)[len(patterns) // 2] + played.trunk_raw[1000:]
        assert name in leaked(planted, secrets)


def test_a_field_that_is_not_in_the_table_would_be_found(played: Round) -> None:
    metrics = played.reply.content["metrics"]
    assert isinstance(metrics, MetricRecord)
    metrics["favourite_word"] = 7
    assert {name for name, _ in reply_fields(played.reply)} - documented().keys() == {"metrics.favourite_word"}
    del metrics["favourite_word"]
