"""Sites with texts of their own, and an orchestrator by hand: the real messages, sum and commit, without Flower."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, RecordDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aggregation.protocol import PlainSumServer
from aggregation.ring import FixedPoint, plan
from aggregation.rules import trainable_factor
from contract import adapter
from contract.config import RunConfig
from contract.records import LoraSpec, RoundKey
from orchestrator.adapters import ClientPart, draw_first_adapter
from orchestrator.messages import RoundOrder, adapter_record, order_message, read_metrics, read_update
from orchestrator.replicas import ConnectedTrunk, connect
from tests.contract.families import VOCAB, save_model
from tests.contract.parity import Tensors

WORDS = [a + b for a in "bdfgklmnprs" for b in ("a", "e", "i", "o", "u", "ai", "ou", "an")]
ROW_WORDS = (5, 12)


def save_site_model(directory: Path) -> Path:
    """The tiny Llama with a tokenizer of one token a word."""
    save_model("llama", directory)
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *WORDS])}
    assert len(vocabulary) <= VOCAB
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>").save_pretrained(directory)
    return directory


def write_texts(path: Path, rows: int, seed: int) -> Path:
    """A site's own JSONL; sites with other seeds prefer other words."""
    draw = random.Random(seed)
    favourites = draw.sample(WORDS, 20)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            text = " ".join(draw.choices(favourites, k=draw.randint(*ROW_WORDS)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


@dataclass
class Site:
    """One SuperNode's context."""

    node_id: int
    node_config: dict[str, str | int | bool]

    @property
    def name(self) -> str:
        return str(self.node_id)

    def context(self, config: RunConfig) -> Context:
        return Context(
            run_id=1,
            node_id=self.node_id,
            node_config={"allow-secagg-off": True, **self.node_config},
            state=RecordDict(),
            run_config=config.to_flower(),
        )


@dataclass(frozen=True)
class Version:
    """One version of the adapter, as both sides hold it."""

    number: int
    client: ClientPart
    trunk_bytes: bytes

    def tensors(self) -> Tensors:
        client = adapter.unflatten(self.client.vector_d, self.client.shapes, self.client.names)
        return {**client, **adapter.from_bytes(self.trunk_bytes)}


@dataclass
class Orchestrator:
    """Plays rounds with the code that the real one uses, one client after the other. `address` may be several."""

    config: RunConfig
    model_dir: Path
    address: str
    run: str
    spec: LoraSpec = field(init=False)
    trunk: ConnectedTrunk = field(init=False)
    weights: dict[str, int] = field(default_factory=dict)

    def first(self) -> Version:
        drawn = draw_first_adapter(self.config, str(self.model_dir))
        self.spec = drawn.spec
        self.trunk = connect(self.address)
        self.trunk.put_adapter(drawn.trunk)
        return Version(0, ClientPart.from_bytes(drawn.client), drawn.trunk)

    def order(self, version: Version, clients: int, *, final: bool = False) -> RoundOrder:
        return RoundOrder(
            run=self.run,
            round=version.number + 1,
            attempt=1,
            client_sha256=adapter.sha256_hex(version.client.to_bytes()),
            trunk_sha256=adapter.sha256_hex(version.trunk_bytes),
            factor=trainable_factor(self.config.aggregation, version.number + 1),
            clients=clients,
            final=final,
        )

    def message(self, version: Version, site: Site, clients: int, *, final: bool = False) -> Message:
        order = self.order(version, clients, final=final)
        return order_message(site.name, order, adapter_record(version.client.vector_d))

    def fixed_point(self, clients: int) -> FixedPoint:
        return plan(clients, self.config.max_trained_tokens(), self.config.update_clip)

    def round(self, version: Version, sites: list[Site], clients: int = 0) -> Version:
        """The version after `version`; `weights` then holds each client's trained tokens.

        `clients` is the cohort's size, where `sites` are not all of it.
        """
        from clients.app import app

        cohort = clients or len(sites)
        order = self.order(version, cohort)
        size = int(version.client.trained(order.factor).sum()) + 1
        summing = PlainSumServer(size, [site.name for site in sites])
        for site in sites:
            reply = app(self.message(version, site, cohort), site.context(self.config))
            assert not reply.has_error(), reply.error.reason
            summing.accept(site.name, read_update(reply.content, 4 * size))
            self.weights[site.name] = int(read_metrics(reply.content, site.name)["trained_tokens"])
        names = [site.name for site in sites]
        mean, weight = self.fixed_point(cohort).decode(summing.finish(names))
        key = RoundKey(self.run, order.round, order.attempt)
        average = self.trunk.commit_round(key, order.trunk_sha256, names)
        assert average.trained_tokens == weight == sum(self.weights[name] for name in names)
        moved = version.client.moved(order.factor, mean)
        return replace(version, number=order.round, client=moved, trunk_bytes=self.trunk.get_adapter(average.sha256))


def upload_bytes(reply: Message) -> bytes:
    record = reply.content["update"]
    assert isinstance(record, ArrayRecord)
    return read_update(reply.content, len(next(iter(record.values())).data))
