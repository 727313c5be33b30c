"""What the measurement of differential privacy's cost compares, computes and shows, on a tiny model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import typer
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from clients.data import DataCounts, SiteData, TokenRow
from clients.stdlib_text import DOMAINS
from contract.adapter import adapter_shapes, initial_adapter, resolve_lora, run_lora
from contract.config import ConfigValue, RunConfig
from contract.errors import ConfigError, StorageError
from demo import private
from demo.private_picture import PICTURE, write_picture
from demo.private_report import SAME_NATS, Outcome, Privacy, Report, table, verdict
from demo.unsplit import UnsplitModel, Update, mean_update, run
from tests.clients.sites import save_site_model
from tests.contract.families import VOCAB

Vector = npt.NDArray[np.float64]

TOKENS = 12
SETTINGS: dict[str, ConfigValue] = {
    **private.SETTINGS,
    "max-length": TOKENS,
    "num-rounds": 2,
    "per-device-train-batch-size": 4,
    "learning-rate": 1.0,
}
BASE = 4.25


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_site_model(tmp_path_factory.mktemp("private") / "model")


@pytest.fixture(scope="module")
def unsplit(model_dir: Path) -> UnsplitModel:
    return UnsplitModel(config(model_dir))


def config(model_dir: Path, **changes: ConfigValue) -> RunConfig:
    changed = {name.replace("_", "-"): value for name, value in changes.items()}
    return RunConfig.from_flower({**SETTINGS, "model": str(model_dir), "trunk-adapter": "frozen", **changed})


def text_rows(first: int, count: int, tokens: int = TOKENS) -> tuple[TokenRow, ...]:
    """Random rows, numbered from `first` on."""
    drawn = np.random.default_rng(first).integers(3, VOCAB, size=(count, tokens), dtype=np.int32)
    return tuple(TokenRow(first + place, tokens_T, tokens_T, False) for place, tokens_T in enumerate(drawn))


def sites(count: int) -> list[SiteData]:
    """Shares of six to eight rows to train on and one held out."""
    return [
        SiteData(text_rows(100 * place, 6 + place % 3), text_rows(100 * place + 50, 1), DataCounts())
        for place in range(count)
    ]


def outcome(
    mode: str = private.CLIENT, clients: int = 4, losses: Sequence[float] = (4.2, 4.21), noised: bool = True
) -> Outcome:
    privacy = Privacy(7.99, 1.1, 2.5, 2, 35.4, 20.4) if noised else None
    return Outcome(mode, clients, 30, 8192, privacy, tuple(losses))


def report(*outcomes: Outcome) -> Report:
    return Report(BASE, 1000, {4: 3.0}, outcomes, {}, {}, (0, 1), {}, 1.0)


@pytest.mark.parametrize("clients", [4, 8, 12, 24])
def test_the_same_rows_are_trained_on_however_many_clients_share_them(clients: int) -> None:
    finest = sites(24)
    held = private.pooled(finest, clients)
    assert len(held) == clients
    numbers = [row.number for rows in held for row in rows]
    assert sorted(numbers) == sorted(row.number for site in finest for row in site.train_rows)
    assert len(set(numbers)) == len(numbers)
    for client, rows in enumerate(held):
        places = {row.number // 100 for row in rows}
        assert len(places) == 24 // clients
        assert {place % len(DOMAINS) for place in places} == {client % len(DOMAINS)}


def test_a_client_reads_the_share_that_its_number_names(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def load(source: str, *rest: object) -> SiteData:
        read.append(source)
        return sites(1)[0]

    monkeypatch.setattr(private, "load_dataset", load)
    private.shares(RunConfig.from_flower(private.SETTINGS), 3)
    assert read == ["stdlib:0/3", "stdlib:1/3", "stdlib:2/3"]


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ([BASE - 2 * SAME_NATS], "better than the base model"),
        ([BASE - 2 * SAME_NATS, BASE - SAME_NATS / 2], "no better than the base model"),
        ([BASE - 2 * SAME_NATS, BASE + 2 * SAME_NATS], "no better than the base model"),
        ([BASE + SAME_NATS / 2], "no better than the base model"),
        ([BASE + 2 * SAME_NATS, BASE + SAME_NATS / 2], "no better than the base model"),
        ([BASE + 2 * SAME_NATS, 9.0], "worse than doing nothing"),
    ],
)
def test_a_verdict_is_passed_only_where_every_seed_agrees(losses: list[float], words: str) -> None:
    assert verdict(BASE, losses) == words


def test_the_table_has_a_row_for_each_outcome_with_its_price_and_its_loss() -> None:
    noised, plain = table(report(outcome(losses=(8.4, 8.2)), outcome(private.FROZEN, losses=(4.23,), noised=False)))
    assert noised == {
        "mode": "client-level DP",
        "clients": 4,
        "epsilon": 7.99,
        "d": 8192,
        "z": 1.1,
        "clip": 2.5,
        "survivors floor": 2,
        "noise to signal": 35.4,
        "loss": "8.3000",
        "spread": "8.2000 to 8.4000",
        "change": "+4.0500",
        "verdict": "worse than doing nothing",
    }
    assert list(plain) == list(noised)
    assert {name for name, value in plain.items() if value is None} == {
        "epsilon", "z", "clip", "survivors floor", "noise to signal", "spread",
    }  # fmt: skip
    assert (plain["loss"], plain["change"], plain["verdict"]) == ("4.2300", "-0.0200", "better than the base model")


def test_a_loss_beyond_the_picture_is_written_at_its_edge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    save = Figure.savefig

    def kept(figure: Figure, *args: Any, **more: Any) -> None:
        drawn.append(figure)
        save(figure, *args, **more)

    monkeypatch.setattr(Figure, "savefig", kept)
    shown = report(outcome(private.FROZEN, losses=(4.23,), noised=False), outcome(losses=(8.4, 8.2)))
    path = write_picture(shown, tmp_path / "new")
    assert path == tmp_path / "new" / PICTURE
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    axes = drawn[0].axes[0]
    lowest, highest = axes.get_ylim()
    assert lowest < 4.23 < BASE < highest < 4.4
    assert [text.get_text() for text in axes.texts] == ["8.30 \u2191"]
    assert {text.get_text() for text in drawn[0].legends[0].get_texts()} == {"base model", "no DP", "client-level DP"}


def test_a_picture_that_cannot_be_drawn_or_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"cannot write .*{PICTURE}"):
        write_picture(report(outcome()), tmp_path / "file")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"the picture needs matplotlib: install trunkline\[audit\]"):
        write_picture(report(outcome()), tmp_path)


class Plain:
    """The same training by PEFT and torch alone: every step of a client takes all of its rows."""

    def __init__(self, run_config: RunConfig, layers: Sequence[int]) -> None:
        spec = resolve_lora(run_config.model, run_lora(run_config))
        self._config, self._first = run_config, initial_adapter(adapter_shapes(run_config.model, spec), run_config.seed)
        base = AutoModelForCausalLM.from_pretrained(run_config.model, dtype=torch.float32)
        lora = LoraConfig(r=run_config.lora_r, lora_alpha=run_config.lora_alpha, target_modules="all-linear")
        self.model = get_peft_model(base, lora)
        trained = [f".layers.{layer}." for layer in layers]
        self._live = {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if "lora_B" in name and any(layer in name for layer in trained)
        }
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in self._live)
                if "lora_A" in name:
                    parameter.copy_(self._first[name.replace(".default", "")])

    @property
    def values_d(self) -> Vector:
        return np.concatenate([self._live[name].detach().numpy().ravel() for name in sorted(self._live)]).astype(float)

    def set(self, values_d: Vector) -> None:
        start = 0
        for name in sorted(self._live):
            parameter = self._live[name]
            part = torch.from_numpy(values_d[start : start + parameter.numel()]).float()
            parameter.data.copy_(part.reshape(parameter.shape))
            start += parameter.numel()

    def loss(self, rows: Sequence[TokenRow]) -> torch.Tensor:
        tokens_BT = torch.from_numpy(np.stack([row.tokens_T for row in rows]).astype(np.int64))
        loss: torch.Tensor = self.model(input_ids=tokens_BT, labels=tokens_BT).loss
        return loss

    def run(self, clients: Sequence[Sequence[TokenRow]]) -> Vector:
        """Federated averaging, weighted by predicted tokens."""
        tokens = np.array([sum(len(row.tokens_T) - 1 for row in rows) for rows in clients])
        values_d = self.values_d
        for _ in range(self._config.num_rounds):
            changes = []
            for rows in clients:
                self.set(values_d)
                optimizer = torch.optim.AdamW(
                    self._live.values(), lr=self._config.learning_rate, eps=self._config.adam_epsilon, weight_decay=0.0
                )
                for _ in range(self._config.local_steps):
                    self.loss(rows).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
                changes.append(self.values_d - values_d)
            values_d = values_d + tokens @ np.stack(changes) / tokens.sum()
        self.set(values_d)
        return values_d


@pytest.mark.parametrize(("trunk_adapter", "layers"), [("frozen", (0, 3)), ("trained", (0, 1, 2, 3))])
def test_a_run_without_privacy_is_federated_averaging(
    model_dir: Path, unsplit: UnsplitModel, trunk_adapter: str, layers: Sequence[int]
) -> None:
    plain, clients = config(model_dir, trunk_adapter=trunk_adapter), [text_rows(0, 4), text_rows(10, 4, tokens=7)]
    peer = Plain(plain, layers)
    expected_d = peer.run(clients)
    told: list[str] = []
    trained_d = run(unsplit, plain, clients, 0, tell=told.append)
    assert trained_d.shape == expected_d.shape
    assert np.abs(expected_d).max() > 0.01
    np.testing.assert_allclose(trained_d, expected_d, atol=1e-5)
    assert told == ["round 1 of 2", "round 2 of 2"]
    heldout = text_rows(20, 6)
    assert unsplit.loss(plain, trained_d, heldout) == pytest.approx(peer.loss(heldout).item(), abs=1e-5)
    assert unsplit.loss(plain, unsplit.start(plain), heldout) != pytest.approx(peer.loss(heldout).item(), abs=1e-3)


def test_example_level_without_clipping_noise_and_chance_is_federated_averaging(
    model_dir: Path, unsplit: UnsplitModel
) -> None:
    quiet: dict[str, ConfigValue] = {
        "dp": "example",
        "dp_clip": 100.0,
        "dp_noise_multiplier": 1e-8,
        "dp_sample_rate": 1.0,
        "metrics": "off",
    }
    clients = [text_rows(0, 4), text_rows(10, 4)]
    trained_d = run(unsplit, config(model_dir, **quiet), clients, 0)
    np.testing.assert_allclose(trained_d, Plain(config(model_dir), (0, 3)).run(clients), atol=1e-5)


def test_example_level_noise_is_z_clips_over_the_rows_of_a_step(model_dir: Path, unsplit: UnsplitModel) -> None:
    """The first step of AdamW with an epsilon of 1 moves a value by g / (|g| + 1) learning rates."""
    loud: dict[str, ConfigValue] = {
        "dp": "example",
        "dp_clip": 1e-3,
        "dp_noise_multiplier": 200.0,
        "dp_sample_rate": 0.5,
        "metrics": "off",
    }
    noised = config(model_dir, **loud, local_steps=1)
    start_d = unsplit.start(noised)
    changed = [next(unsplit.round_updates(noised, [text_rows(0, 20)], 1, start_d, seed)).change_d for seed in (0, 0, 1)]
    np.testing.assert_array_equal(changed[0], changed[1])
    assert not (changed[0] == changed[2]).any()
    for change_d in (changed[0], changed[2]):
        gradient_d = change_d / (1 - np.abs(change_d))
        assert gradient_d.std() == pytest.approx(200.0 * 1e-3 / (0.5 * 20), rel=0.1)


def test_client_level_noise_is_that_of_the_fewest_survivors_over_the_clients(model_dir: Path) -> None:
    """Four clients, of whom three must stay and one may tell its noise: two carry all of it, and four shares add up."""
    noised = config(model_dir, dp="client", dp_clip=2.5, dp_noise_multiplier=1.1, metrics="off")
    nothing = [Update(np.zeros(20_000), 10)] * 4
    means = [mean_update(nothing, noised, 4, seed, number) for seed, number in ((0, 1), (0, 1), (1, 1), (0, 2))]
    np.testing.assert_array_equal(means[0], means[1])
    for mean_d in means:
        assert mean_d.std() == pytest.approx(1.1 * 2.5 / 4 * np.sqrt(4 / 2), rel=0.03)
        assert abs(mean_d.mean()) < 5 * mean_d.std() / np.sqrt(mean_d.size)
    for other_d in means[2:]:
        assert abs(np.corrcoef(means[0], other_d)[0, 1]) < 0.05


def test_client_level_updates_are_cut_and_count_the_same_whatever_their_tokens(model_dir: Path) -> None:
    quiet = config(model_dir, dp="client", dp_clip=2.0, dp_noise_multiplier=1e-3, metrics="off")
    one_d, other_d = np.zeros(50), np.zeros(50)
    one_d[0], other_d[1] = 30.0, 1.0
    updates = [Update(one_d, 1000), *[Update(other_d, 1)] * 3]
    expected_d = np.zeros(50)
    expected_d[:2] = 2.0 / 4, 3 * 1.0 / 4
    np.testing.assert_allclose(mean_update(updates, quiet, 4, 0, 1), expected_d, atol=0.01)


def test_a_first_round_that_was_trained_before_is_the_one_that_the_run_would_train(
    model_dir: Path, unsplit: UnsplitModel
) -> None:
    noised = config(model_dir, dp="client", dp_clip=0.5, dp_noise_multiplier=0.1, metrics="off")
    clients = [text_rows(10 * client, 6) for client in range(3)]
    plain = config(model_dir)
    first = list(unsplit.round_updates(plain, clients, 1, unsplit.start(plain), 0))
    trained = [run(unsplit, noised, clients, 5, given) for given in (None, first)]
    np.testing.assert_array_equal(trained[0], trained[1])
    halved = [replace(update, change_d=update.change_d / 2) for update in first]
    assert not np.array_equal(run(unsplit, noised, clients, 5, halved), trained[0])


def test_the_command_measures_every_mode_with_every_number_of_clients(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finest = sites(8)
    monkeypatch.setattr(private, "SETTINGS", {**SETTINGS, "model": str(model_dir)})
    monkeypatch.setattr(private, "shares", lambda asked, count: finest[:count])
    app = typer.Typer()
    app.command()(private.main)
    done = CliRunner().invoke(app, ["--quick", "--json", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)["data"]
    measured = {(one["mode"], one["clients"]): one for one in found["outcomes"]}
    assert list(measured) == [(mode, count) for mode in private.MODES for count in private.QUICK_CLIENTS]
    for (mode, count), one in measured.items():
        private_mode = mode in (private.CLIENT, private.EXAMPLE)
        assert len(one["losses"]) == (2 if private_mode else 1)
        assert len(set(one["losses"])) == len(one["losses"])
        assert (one["privacy"] is not None) == private_mode
        half = 1 if mode == private.WHOLE else 2  # two of the four layers are the trunk's
        assert one["trained_values"] * half == measured[private.WHOLE, 4]["trained_values"]
        assert one["rows_each"] == min(map(len, private.pooled(finest, count)))
        if private_mode:
            assert 7.9 < one["privacy"]["epsilon"] <= 8.0
            floor = {4: 2, 8: 5}[count] if mode == private.CLIENT else None
            assert one["privacy"]["survivors_floor"] == floor
    heldout = [row for site in finest for row in site.heldout_rows]
    base = Plain(config(model_dir), (0, 3)).loss(heldout)
    assert found["heldout_tokens"] == 8 * (TOKENS - 1)
    assert found["base_loss"] == pytest.approx(base.item(), abs=1e-5)
    assert (tmp_path / PICTURE).is_file()
