"""The attacks at what crosses the wire, on the same rows in each mode."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from clients.audits import enumeration, inversion, labels
from clients.audits.channel import Channel, backward_channel, forward_channel, hidden_states
from clients.audits.findings import CONTROL, Attack, Finding
from clients.audits.guessers import BlindGuesser, best_blind_guesser
from clients.audits.public_model import PublicHead, PublicLanguageModel
from clients.audits.public_text import swap_tokens, token_odds
from clients.audits.tap import Crossed, MechanismOf, Singles, Tap
from clients.data import TokenRow
from clients.wire_privacy import wire_mechanism
from contract.config import RunConfig
from contract.partition import DTYPES
from privacy.audits.intervals import difference_of_rows, rate_of_rows

Floats = npt.NDArray[np.float64]
Tell = Callable[[str], None]

_LEAST = {"enumeration": 0.95, "inversion": 0.8, "labels": 0.8}
"""What a control must recover."""
_PRIORS: tuple[enumeration.Prior, ...] = ("frequency", "model")
_PRIOR_WORDS = {"frequency": "how often tokens occur", "model": "what the base model expects"}


@dataclass(frozen=True, slots=True)
class AuditRows:
    """`audited` is the site's own; `fitted` and `judged` are public text, from which attackers learn and choose."""

    audited: Sequence[TokenRow]
    fitted: Sequence[TokenRow]
    judged: Sequence[TokenRow]


@dataclass(frozen=True, slots=True)
class _Sent:
    """What crossed in one mode; the attacker's own rows carry what they were before. `swapped` are some of those."""

    audited: list[Crossed]
    fitted: list[Crossed]
    judged: list[Crossed]
    swapped: list[Crossed]


class WireBench:
    """Holds what does not depend on the mode."""

    def __init__(
        self,
        model_dir: str | Path,
        config: RunConfig,
        rows: AuditRows,
        seed: int,
        tell: Tell,
        mechanism_of: MechanismOf = wire_mechanism,
    ) -> None:
        self._rows, self._seed, self._tell = rows, seed, tell
        self._tap = Tap(model_dir, config, mechanism_of)
        self._head = PublicHead(model_dir, config)
        self._model = PublicLanguageModel(model_dir, config)
        self._eps = torch.finfo(DTYPES[config.dtype]).eps
        self._odds_V = token_odds(rows.fitted, len(self._tap.input_VD))

    def run(self, mode: str, config: RunConfig, passes: int, attacks: Collection[Attack]) -> list[Finding]:
        """The wire attacks among `attacks`, each in its variants."""
        tap = self._tap.with_config(config)
        self._tell(f"{mode}: sending {len(self._rows.audited)} rows, and public text to learn from")
        swapped = swap_tokens(self._rows.fitted, len(self._odds_V), self._seed)
        both_ways = len(self._rows.fitted)
        sent = _Sent(
            audited=tap.cross(self._rows.audited, passes),
            fitted=tap.simulate(self._rows.fitted, passes),
            judged=tap.simulate(self._rows.judged, passes),
            swapped=tap.simulate(swapped[:both_ways], passes),
        )
        found: list[Finding] = []
        if {"enumeration", "inversion"} & set(attacks):
            channel = forward_channel([*sent.fitted, *sent.judged], config)
            reader = self._reader(channel, sent, swapped, tap.simulate_hidden(swapped[both_ways:], passes))
            found += self._smashed(mode, sent, attacks, channel, reader)
        if "labels" in attacks:
            found += self._labels(mode, config, sent, tap)
        return found

    def _reader(
        self, channel: Channel, sent: _Sent, swapped: Sequence[TokenRow], states: Sequence[tuple[Singles, Singles]]
    ) -> inversion.TokenReader:
        simulated = [*map(hidden_states, sent.fitted), *map(hidden_states, sent.swapped), *states]
        fitted = inversion.samples([*self._rows.fitted, *swapped], simulated, channel)
        judged = inversion.samples(self._rows.judged, [*map(hidden_states, sent.judged)], channel)
        embedding_VC = self._tap.input_VD.double().numpy()
        return inversion.best_reader(fitted, judged, channel, embedding_VC, self._odds_V)

    def _smashed(
        self,
        mode: str,
        sent: _Sent,
        attacks: Collection[Attack],
        channel: Channel,
        reader: inversion.TokenReader,
    ) -> list[Finding]:
        found = []
        if "inversion" in attacks:
            rows = [channel.undone(one.hidden_TD, len(one.hidden_TD)) for one in sent.audited]
            guesses = [reader.guess(hidden_TD, self._odds_V) for hidden_TD in rows]
            found.append(self._tokens_found("inversion", "linear", mode, guesses))
        if "enumeration" in attacks:
            found += self._enumerate(mode, sent, channel, reader)
        return found

    def _enumerate(self, mode: str, sent: _Sent, channel: Channel, reader: inversion.TokenReader) -> list[Finding]:
        attack = enumeration.Enumeration(self._head, self._model, reader, channel, self._odds_V, self._eps)
        self._tell(f"{mode}: enumerating, nearest state")
        found = [self._tokens_found("enumeration", "nearest state", mode, attack.recover(sent.audited, "none"))]
        # A quarter of the public rows settles which prior is the better; a row is a hundred decisions.
        judged = sent.judged[: max(1, len(sent.judged) // 4)]
        hits = {prior: sum(_hits(judged, attack.recover(judged, prior))) for prior in _PRIORS}
        prior = max(_PRIORS, key=lambda one: hits[one])
        self._tell(f"{mode}: enumerating, with {_PRIOR_WORDS[prior]} as prior")
        variant = f"with a prior: {_PRIOR_WORDS[prior]}"
        found.append(self._tokens_found("enumeration", variant, mode, attack.recover(sent.audited, prior)))
        return found

    def _tokens_found(
        self, attack: Attack, variant: str, mode: str, guesses: Sequence[npt.NDArray[np.int64]]
    ) -> Finding:
        hits = [int((guess_T == row.tokens_T).sum()) for guess_T, row in zip(guesses, self._rows.audited, strict=True)]
        blind = [self._blind.hits(row) for row in self._rows.audited]
        sizes = [len(row.tokens_T) for row in self._rows.audited]
        return self._finding((attack, variant, mode, "tokens recovered"), self._blind.name, hits, blind, sizes)

    def _labels(self, mode: str, config: RunConfig, sent: _Sent, tap: Tap) -> list[Finding]:
        self._tell(f"{mode}: inferring labels")
        channel = backward_channel([*sent.fitted, *sent.judged], config)
        readers = labels.label_readers([*sent.fitted, *sent.swapped], channel, self._tap.output_VD.double().numpy())
        everywhere = [np.broadcast_to(self._odds_V, (len(one.row.tokens_T), len(self._odds_V))) for one in sent.judged]
        reader, place = labels.best_reader(
            readers, sent.judged, channel, [everywhere, tap.log_odds_of_next(sent.judged)]
        )
        odds: labels.Odds = tap.log_odds_of_next(sent.audited)
        if place == 0:
            odds = [np.broadcast_to(self._odds_V, one.shape) for one in odds]
        hits = labels.label_hits(sent.audited, reader, channel, odds)
        blind = [labels.right_labels(one, self._blind.guess_T[1 : len(one.row.tokens_T)]) for one in sent.audited]
        sizes = [one.targets for one in sent.audited]
        measure = "labels inferred"
        alone = self._finding(("labels", "alone", mode, measure), self._blind.name, hits, blind, sizes)

        told_judged = self._model.log_odds_of_next(self._rows.judged)
        reader, _ = labels.best_reader(readers, sent.judged, channel, [told_judged])
        hits = labels.label_hits(sent.audited, reader, channel, self._told)
        model = [
            labels.right_labels(one, odds_TV[:-1].argmax(axis=1))
            for one, odds_TV in zip(sent.audited, self._told, strict=True)
        ]
        guesser = "the base model, told the same prefix"
        return [alone, self._finding(("labels", "prefix known", mode, measure), guesser, hits, model, sizes)]

    def _finding(
        self,
        what: tuple[Attack, str, str, str],
        guesser: str,
        hits: Sequence[int],
        guessed: Sequence[int],
        sizes: Sequence[int],
    ) -> Finding:
        attack, variant, mode, measure = what
        return Finding(
            attack=attack,
            variant=variant,
            mode=mode,
            measure=measure,
            value=rate_of_rows(hits, sizes, self._seed),
            guesser=guesser,
            guessed=sum(guessed) / sum(sizes),
            above=difference_of_rows(hits, guessed, sizes, self._seed),
            trials=sum(sizes),
            unit=f"tokens of {len(sizes)} rows",
            least=_LEAST[attack] if mode == CONTROL else None,
        )

    @cached_property
    def _blind(self) -> BlindGuesser:
        longest = max(len(row.tokens_T) for row in (*self._rows.audited, *self._rows.judged))
        return best_blind_guesser(self._model, self._odds_V, longest, self._rows.judged)

    @cached_property
    def _told(self) -> list[npt.NDArray[np.float32]]:
        return self._model.log_odds_of_next(self._rows.audited)


def _hits(crossed: Sequence[Crossed], guesses: Sequence[npt.NDArray[np.int64]]) -> list[int]:
    return [int((guess_T == one.row.tokens_T).sum()) for one, guess_T in zip(crossed, guesses, strict=True)]
