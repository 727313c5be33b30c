"""What differential privacy costs the demo: `python -m demo.private --out build`.

The demo's model is fine-tuned on the demo's text shared among 4, 20 and 100 clients: without differential privacy, at
client level and at example level, each at epsilon 8. Every run has the same text and as many rounds and steps, and is
judged on the same held-out text, which no client trains on. Each noise multiplier is the smallest that keeps to epsilon
for all rounds, as `trunkline budget plan` finds it. No run is stopped early, and none is left out.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from aggregation.encoding import fewest_honest, noise_scale
from aggregation.graph import full_threshold
from clients.data import SiteData, TokenRow, load_dataset, load_tokenizer
from clients.stdlib_text import DOMAINS
from contract.config import ConfigValue, RunConfig
from contract.output import OutputFormat, cli_errors, emit, talk
from demo.private_picture import write_picture
from demo.private_report import Outcome, Privacy, Report, table
from demo.settings import MODEL_DIR, RUN_CONFIG
from demo.unsplit import UnsplitModel, Update, run
from privacy.calibration import calibrated, usability
from privacy.plan import expected_spend

WHOLE, FROZEN = "no DP, trunk's adapter too", "no DP"
CLIENT, EXAMPLE = "client-level DP", "example-level DP"
_PRIVATE: dict[str, ConfigValue] = {"trunk-adapter": "frozen", "metrics": "off", "dp-epsilon": 8.0, "dp-delta": 1e-5}
MODES: dict[str, dict[str, ConfigValue]] = {
    WHOLE: {},
    FROZEN: {"trunk-adapter": "frozen"},
    CLIENT: {**_PRIVATE, "dp": "client", "dp-clip": 2.5},
    EXAMPLE: {**_PRIVATE, "dp": "example", "dp-clip": 0.1, "dp-sample-rate": 0.1},
}
"""What each mode sets beside SETTINGS."""

SETTINGS: dict[str, ConfigValue] = {
    **RUN_CONFIG,
    "model": str(MODEL_DIR),
    "eval-fraction": 0.1,
    "lora-r": 2,
    "lora-alpha": 4.0,
    "local-steps": 2,
    # AdamW with so large an epsilon is gradient descent with momentum: its updates keep the gradients' proportions, so
    # that noise averages out of them, where AdamW would blow it up to the size of a step.
    "adam-epsilon": 1.0,
    "learning-rate": 20.0,
    "lr-scheduler-type": "constant",
    "max-grad-norm": 0.0,
    "update-clip": 8.0,
}
CLIENTS, SEEDS = (4, 20, 100), (0, 1)
QUICK: dict[str, ConfigValue] = {"num-rounds": 1, "local-steps": 1, "eval-batches": 4}
QUICK_CLIENTS, QUICK_SEEDS = (4, 8), (0, 1)


def shares(config: RunConfig, count: int) -> list[SiteData]:
    """The demo's text as `count` clients have it by `stdlib:{partition}/count`."""
    tokenizer = load_tokenizer(config.model)
    return [
        load_dataset(f"stdlib:{place}/{count}", tokenizer, config.max_length, config.eval_fraction, config.seed)
        for place in range(count)
    ]


def pooled(finest: Sequence[SiteData], clients: int) -> list[tuple[TokenRow, ...]]:
    """The training rows of `clients` clients, who pool the finest shares: the same rows however many they are.

    Client n holds text of domain n modulo 4, as in a run. `clients` is a multiple of 4, and divides the shares.
    """
    domains, each = len(DOMAINS), len(finest) // clients
    held = []
    for client in range(clients):
        domain, start = client % domains, client // domains * each
        mine = [finest[domain + domains * place] for place in range(start, start + each)]
        held.append(tuple(row for site in mine for row in site.train_rows))
    return held


class Measurement:
    """All runs, on one model; a first round is trained once for all that begin with it."""

    def __init__(self, settings: Mapping[str, ConfigValue], clients: Sequence[int], seeds: Sequence[int]) -> None:
        self._settings, self._clients, self._seeds = settings, clients, seeds
        config = self._config(FROZEN)
        self._model = UnsplitModel(config)
        self._finest = shares(config, max(clients))
        self._heldout = tuple(row for site in self._finest for row in site.heldout_rows)
        self._norms: dict[int, float] = {}

    def report(self) -> Report:
        """Measure every mode with every number of clients."""
        started = time.monotonic()
        config = self._config(FROZEN)
        base = self._model.loss(config, self._model.start(config), self._heldout)
        talk(f"base model: held-out loss {base:.4f}")
        outcomes = [outcome for count in self._clients for outcome in self._with(count)]
        modes = list(MODES)
        return Report(
            base_loss=base,
            heldout_tokens=sum(row.targets for row in self._heldout),
            median_update_norms=self._norms,
            outcomes=tuple(sorted(outcomes, key=lambda outcome: modes.index(outcome.mode))),
            settings={name: value for name, value in self._settings.items() if name != "model"},
            modes=MODES,
            seeds=tuple(self._seeds),
            versions={"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "transformers", "peft", "numpy", "dp-accounting")},
            seconds=time.monotonic() - started,
        )

    def _with(self, count: int) -> list[Outcome]:
        clients = pooled(self._finest, count)
        plain = self._config(FROZEN)
        first = list(self._model.round_updates(plain, clients, 1, self._model.start(plain), 0))
        self._norms[count] = float(np.median([np.linalg.norm(update.change_d) for update in first]))
        talk(f"{count} clients: median norm of the first round's updates {self._norms[count]:.3g}")
        return [
            self._outcome(WHOLE, clients, self._seeds[:1]),
            self._outcome(FROZEN, clients, self._seeds[:1], first),
            self._outcome(CLIENT, clients, self._seeds, first),
            self._outcome(EXAMPLE, clients, self._seeds),
        ]

    def _outcome(
        self,
        mode: str,
        clients: Sequence[Sequence[TokenRow]],
        seeds: Sequence[int],
        first: Sequence[Update] | None = None,
    ) -> Outcome:
        config, fewest_rows = self._config(mode), min(map(len, clients))
        size, privacy = self._model.start(config).size, None
        if config.dp != "off":
            config = calibrated(
                config, size=size, scale_of=lambda tried: noise_scale(tried, len(clients), full_threshold(len(clients)))
            )
            privacy = _privacy(config, size, len(clients), fewest_rows)
        losses = []
        for seed in seeds:
            trained_d = run(self._model, config, clients, seed, first)
            losses.append(self._model.loss(config, trained_d, self._heldout))
            talk(f"{len(clients)} clients, {mode}, seed {seed}: held-out loss {losses[-1]:.4f}")
        return Outcome(mode, len(clients), fewest_rows, size, privacy, tuple(losses))

    def _config(self, mode: str) -> RunConfig:
        return RunConfig.from_flower({**self._settings, **MODES[mode]})


def _privacy(config: RunConfig, size: int, clients: int, rows: int) -> Privacy:
    """What the whole run costs, and how noisy it is, where each of `clients` has `rows`."""
    floor = fewest_honest(config, full_threshold(clients)) if config.dp == "client" else None
    noise = usability(config, size=size, clients=clients, fewest=floor or clients, rows=rows)[0]
    return Privacy(
        epsilon=expected_spend(config, scale=noise_scale(config, clients, full_threshold(clients)), size=size)[
            "holder"
        ],
        noise_multiplier=config.dp_noise_multiplier,
        clip=config.dp_clip,
        survivors_floor=floor,
        noise_to_signal=noise.noise_to_signal,
        noise_to_signal_of_run=noise.over_the_run,
    )


@cli_errors
def main(
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("build"),
    quick: Annotated[bool, typer.Option(help="See it work in a minute; the figures mean nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object in place of the table.")] = False,
) -> None:
    """Measure what differential privacy costs the demo."""
    settings = {**SETTINGS, **(QUICK if quick else {})}
    counts, seeds = (QUICK_CLIENTS, QUICK_SEEDS) if quick else (CLIENTS, SEEDS)
    report = Measurement(settings, counts, seeds).report()
    talk(f"picture: {write_picture(report, out)}")
    if as_json:
        emit(report, OutputFormat.JSON)
    else:
        emit(table(report), title=f"Base model's held-out loss: {report.base_loss:.4f}")


if __name__ == "__main__":
    typer.run(main)
