"""One audit from top to bottom: rows, controls, every mode, and what comes of it."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from clients.audits.adapter_bench import AdapterBench, MemberRows
from clients.audits.adapter_training import Entropy
from clients.audits.findings import ATTACKS, CONTROL, WIRE_ATTACKS, Attack, Finding, ModeSettings
from clients.audits.tap import MechanismOf, passes_of
from clients.audits.wire_bench import AuditRows, WireBench
from clients.data import STDLIB_PREFIX, TokenRow, load_dataset, load_tokenizer
from clients.stdlib_text import DOMAINS, domain_name
from clients.wire_privacy import wire_mechanism
from contract.checkpoint import fingerprint
from contract.config import ConfigValue, RunConfig
from contract.errors import ConfigError, DataError
from contract.model_files import resolve_model
from contract.privacy_records import ADVERSARIES, Adversary
from privacy.coverage import withheld
from privacy.plan import expected_spend

Tell = Callable[[str], None]

_MEMBERS, _OTHERS = 200, 1000
_FITTED = 8
"""Public tokens to learn from, for each of the site's that are audited; as many as those choose between attacks."""
_SHARED = ("head_layers", "tail_layers", "dtype", "attn_implementation", "codec", "codec_backward", "max_length")
_VERSIONS = ("trunkline", "torch", "transformers", "peft", "numpy", "opacus", "dp-accounting")


@dataclass(frozen=True, slots=True)
class Released:
    """An adapter that was trained elsewhere, rows that it was trained on, and others of the same kind."""

    adapter_dir: Path
    members: str
    others: str


@dataclass(frozen=True, slots=True)
class AuditPlan:
    """What is audited. `modes` are the settings by name, alike in model and cut; `passes` 0 goes by each mode's own.

    `data` is the site's text and `auxiliary` public text, each a file or `stdlib:NAME`; `tokens` of the first are
    attacked. `released`, where given, stands for the adapters that modes would train.
    """

    model: str | Path
    data: str
    modes: Mapping[str, RunConfig]
    auxiliary: Sequence[str]
    attacks: Sequence[Attack] = ATTACKS
    tokens: int = 5000
    seed: int = 0
    passes: int = 0
    released: Released | None = None
    mechanism_of: MechanismOf = wire_mechanism
    entropy: Entropy = os.urandom


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What came of an audit. The noise is secret and drawn anew each time; all else goes by `seed`."""

    format: int
    model: str
    fingerprint: str
    data: str
    auxiliary: Sequence[str]
    rows: int
    tokens: int
    seed: int
    seconds: float
    versions: Mapping[str, str]
    modes: Sequence[ModeSettings]
    findings: Sequence[Finding]

    @property
    def broken_controls(self) -> list[Finding]:
        """Attacks that fail where they must succeed: what they do not find elsewhere means nothing."""
        return [finding for finding in self.findings if not finding.works]

    def over(self, points: float) -> list[Finding]:
        """Findings in the audited modes that are surely (by the interval) so many percentage points above guessing."""
        return [
            finding
            for finding in self.findings
            if finding.mode != CONTROL and finding.in_shares and 100 * finding.above.lower > points
        ]


def run_audit(plan: AuditPlan, tell: Tell) -> AuditReport:
    """Every attack of `plan` in every mode, its controls first. `tell` gets a line about each step.

    Raises ConfigError and DataError for a plan that cannot be carried out, before any attack, and what loading the
    model, training and the wire mechanisms raise.
    """
    started = time.monotonic()
    shared = _check(plan)
    tokenizer = load_tokenizer(plan.model)

    def rows_of(source: str, seed: int) -> list[TokenRow]:
        found = load_dataset(source, tokenizer, shared.max_length, 0.0, plan.seed).train_rows
        return [found[place] for place in np.random.default_rng([plan.seed, seed]).permutation(len(found))]

    own = rows_of(plan.data, 0)
    audited = _first_tokens(own, plan.tokens)
    findings: list[Finding] = []
    if WIRE_ATTACKS & set(plan.attacks):
        public = [row for place, source in enumerate(plan.auxiliary) for row in rows_of(source, 1 + place)]
        findings += _wire_findings(plan, shared, _audit_rows(plan, audited, public), len(own), tell)
    if set(plan.attacks) - WIRE_ATTACKS:
        if plan.released:
            members = MemberRows(rows_of(plan.released.members, 0), rows_of(plan.released.others, 1))
        else:
            members = _member_rows(plan.data, own)
        findings += _adapter_findings(plan, shared, members, tell)
    return AuditReport(
        format=1,
        model=str(plan.model),
        fingerprint=fingerprint(resolve_model(plan.model)),
        data=plan.data,
        auxiliary=list(plan.auxiliary),
        rows=len(audited),
        tokens=sum(len(row.tokens_T) for row in audited),
        seed=plan.seed,
        seconds=time.monotonic() - started,
        versions={"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}},
        modes=[_mode_settings(name, config, plan, len(own)) for name, config in plan.modes.items()],
        findings=findings,
    )


def public_text_beside(data: str) -> tuple[str, ...]:
    """Every domain of the standard library's text but the one that `data` is of. Raises DataError for none such."""
    own = ""
    if data.startswith(STDLIB_PREFIX):
        own = domain_name(data.removeprefix(STDLIB_PREFIX).partition("/")[0])
    return tuple(f"{STDLIB_PREFIX}{domain}" for domain in DOMAINS if domain != own)


def _check(plan: AuditPlan) -> RunConfig:
    """The settings that all modes share, as one of them has them."""
    if not plan.modes or CONTROL in plan.modes:
        raise ConfigError(f"an audit needs at least one mode, and none may be called {CONTROL!r}")
    if plan.data in plan.auxiliary:
        raise ConfigError(f"{plan.data} is the audited text and the auxiliary one; an attacker does not have the first")
    first_name, first = next(iter(plan.modes.items()))
    for name, config in plan.modes.items():
        for key in _SHARED:
            if getattr(config, key) != getattr(first, key):
                raise ConfigError(
                    f"{key.replace('_', '-')} is {getattr(first, key)} in mode {first_name!r} and "
                    f"{getattr(config, key)} in mode {name!r}; the modes of an audit share it"
                )
    return first


def _first_tokens(rows: Sequence[TokenRow], tokens: int) -> list[TokenRow]:
    """The first of `rows` that have `tokens` tokens together, or all."""
    chosen: list[TokenRow] = []
    for row in rows:
        if sum(len(one.tokens_T) for one in chosen) >= tokens:
            break
        chosen.append(row)
    return chosen


def _audit_rows(plan: AuditPlan, audited: Sequence[TokenRow], public: Sequence[TokenRow]) -> AuditRows:
    mixed = [public[place] for place in np.random.default_rng([plan.seed, 99]).permutation(len(public))]
    judged = _first_tokens(mixed, plan.tokens)
    fitted = _first_tokens(mixed[len(judged) :], _FITTED * plan.tokens)
    if not fitted:
        raise DataError(
            f"{', '.join(plan.auxiliary) or 'no auxiliary text'}: {len(public)} rows are too few for attackers to "
            f"learn from; more than {plan.tokens} tokens are needed"
        )
    return AuditRows(audited, fitted, judged)


def _member_rows(source: str, own: Sequence[TokenRow]) -> MemberRows:
    members = min(_MEMBERS, len(own) // 2)
    if members < 2:
        raise DataError(f"{source}: {len(own)} rows are too few to train on some and hold others out; 4 at least")
    return MemberRows(own[:members], own[members : members + _OTHERS])


def _wire_findings(plan: AuditPlan, shared: RunConfig, rows: AuditRows, own: int, tell: Tell) -> list[Finding]:
    """Modes with the same wire have the same findings; that of the control is `off`."""
    bench = WireBench(plan.model, shared, rows, plan.seed, tell, plan.mechanism_of)
    clear = RunConfig.from_flower({**shared.to_flower(), "wire": "off"})
    controls = bench.run(CONTROL, clear, 1, plan.attacks)
    known = {_wire_settings(clear, 1): controls}
    findings = list(controls)
    for name, config in plan.modes.items():
        passes = _passes(plan, config, own)
        key = _wire_settings(config, passes)
        if key not in known:
            known[key] = bench.run(name, config, passes, plan.attacks)
        findings += [replace(finding, mode=name, least=None) for finding in known[key]]
    return findings


def _adapter_findings(plan: AuditPlan, shared: RunConfig, rows: MemberRows, tell: Tell) -> list[Finding]:
    """Modes whose adapters are trained alike have the same findings."""
    bench = AdapterBench(plan.model, shared, rows, plan.seed, tell, plan.entropy)
    findings = bench.control(plan.attacks)
    if plan.released:
        tell(f"judging {plan.released.adapter_dir}")
        return findings + bench.released("released adapter", plan.released.adapter_dir)
    known: dict[str, list[Finding]] = {}
    for name, config in plan.modes.items():
        key = _training_settings(config)
        if key not in known:
            known[key] = bench.run(name, config, plan.attacks)
        findings += [replace(finding, mode=name) for finding in known[key]]
    return findings


def _passes(plan: AuditPlan, config: RunConfig, rows: int) -> int:
    return 1 if config.wire == "off" else plan.passes or passes_of(config, rows)


def _wire_settings(config: RunConfig, passes: int) -> str:
    if config.wire == "off":
        return "off"
    return f"{passes} {_settings_of(config, lambda key: key.startswith(('wire', 'gradient-mask')))}"


def _training_settings(config: RunConfig) -> str:
    ignored = ("wire", "gradient-mask", "dp-epsilon", "dp-delta")
    private = config.dp == "example"

    def matters(key: str) -> bool:
        if key == "wire-releases":
            return private and config.wire == "dp"
        return not key.startswith(ignored) and (private or key == "dp" or not key.startswith("dp-"))

    return str(_settings_of(config, matters))


def _settings_of(config: RunConfig, wanted: Callable[[str], bool]) -> dict[str, ConfigValue]:
    return {key: value for key, value in config.to_flower().items() if wanted(key)}


def _mode_settings(name: str, config: RunConfig, plan: AuditPlan, rows: int) -> ModeSettings:
    usual = RunConfig().to_flower()
    changed = _settings_of(config, lambda key: key not in ("model", "data"))
    why = {adversary: withheld(config, adversary) for adversary in ADVERSARIES}
    spend: Mapping[Adversary, float] = {}
    if config.dp == "example":
        spend = expected_spend(config, scale=None, size=1)
    return ModeSettings(
        name=name,
        settings={key: value for key, value in changed.items() if value != usual[key]},
        passes=_passes(plan, config, rows),
        epsilon={adversary: spend[adversary] for adversary in spend if why[adversary] is None},
        withheld={adversary: reason for adversary, reason in why.items() if reason is not None},
    )
