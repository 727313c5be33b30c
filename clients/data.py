"""A site's private text as training batches.

`load_dataset` reads a file (see `clients.text_files` for the forms of a row) or, as `stdlib:NAME`, one of the demo's
domains of the Python standard library. Rows are tokenised once and cut at `max_length`; what the model should not learn
(prompts, the turns of others, padding) is labelled -100. Plain text is one running text, packed into
windows of `max_length`, with no overlap, so that nothing is cut off.

Everything is held in memory and nothing is written: there is no dataset cache.

Which rows are held out depends on (seed, row number) alone, and the order of batches on the key given to `row_batches`
alone, so that a repeated attempt of a round sees the same data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clients import chat, text_files
from contract.errors import DataError, ModelError
from contract.model_files import resolve_model

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
STDLIB_PREFIX = "stdlib:"

_SMALLEST_ROW_TOKENS = 2  # the first token predicts nothing by itself
_FEWEST_ROWS = 2  # one to train on and one to hold out


@dataclass(frozen=True, slots=True)
class TokenRow:
    """One example: `tokens_T` and `labels_T` int32 of one length; `number` is its place in the source, from 0."""

    number: int
    tokens_T: npt.NDArray[np.int32]
    labels_T: npt.NDArray[np.int32]
    truncated: bool

    @property
    def targets(self) -> int:
        """Tokens that the loss counts: labels from the second position on that are not ignored."""
        return int(np.count_nonzero(self.labels_T[1:] != IGNORED))


@dataclass(frozen=True, slots=True)
class DataCounts:
    """What a source holds: `rows` read, of which `empty` teach nothing and were dropped; tokens of the kept rows."""

    rows: int = 0
    empty: int = 0
    truncated: int = 0
    tokens: int = 0
    masked_tokens: int = 0

    @property
    def masked_share(self) -> float:
        """The share of kept tokens that the loss does not count, 0 to 1."""
        return self.masked_tokens / self.tokens if self.tokens else 0.0


@dataclass(frozen=True, slots=True)
class SiteData:
    """A site's rows, split into what it trains on and what it judges adapters by."""

    train_rows: tuple[TokenRow, ...]
    heldout_rows: tuple[TokenRow, ...]
    counts: DataCounts


@dataclass(frozen=True, slots=True)
class DataReport:
    """What `data check` says of a source: its counts, up to the first broken row if there is one.

    `problem` says why it is not sound, be it that row (`broken`) or the whole.
    """

    counts: DataCounts
    problem: str = ""
    broken: bool = False


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint directory or hub id. Raises ModelError where there is none that can be loaded."""
    from transformers import AutoTokenizer

    directory = resolve_model(model, weights=False)
    try:
        return AutoTokenizer.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:
        # The tokenizers' library says with a bare Exception that it does not know a file's kind.
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ModelError(f"{model}: no tokenizer can be loaded: {reason}") from error


def load_dataset(
    source: str, tokenizer: PreTrainedTokenizerBase, max_length: int, eval_fraction: float, seed: int
) -> SiteData:
    """Tokenised rows of `source` (a path or `stdlib:NAME`), at most `max_length` tokens each, split by `eval_fraction`.

    At least one row is held out (unless `eval_fraction` is 0) and at least one is left to train on. Raises DataError,
    with path and line or row, for a broken row, an unreadable file, or too few rows to split.
    """
    rows, empty, broken = _gather(source, tokenizer, max_length)
    if broken:
        raise DataError(f"{source}: {broken.where}: {broken.problem}")
    if too_few := _too_few(len(rows), empty, max_length, _FEWEST_ROWS if eval_fraction > 0 else 1):
        raise DataError(f"{source}: {too_few}")
    heldout = _heldout_numbers([row.number for row in rows], eval_fraction, seed)
    return SiteData(
        train_rows=tuple(row for row in rows if row.number not in heldout),
        heldout_rows=tuple(row for row in rows if row.number in heldout),
        counts=_count(rows, empty),
    )


def check_dataset(source: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> DataReport:
    """Counts of `source` up to its first broken row, and that row; or that it has too few to also hold one out.

    Raises DataError for an unreadable file.
    """
    rows, empty, broken = _gather(source, tokenizer, max_length)
    if broken:
        return DataReport(_count(rows, empty), f"{broken.where}: {broken.problem}", broken=True)
    return DataReport(_count(rows, empty), _too_few(len(rows), empty, max_length, _FEWEST_ROWS))


def _too_few(usable: int, empty: int, max_length: int, wanted: int) -> str:
    """What is wrong with so few `usable` rows, or nothing."""
    if usable >= wanted:
        return ""
    why = ", one to train on and one to hold out" if wanted == _FEWEST_ROWS else ""
    return (
        f"{usable} of {usable + empty} rows hold something to learn within {max_length} tokens; "
        f"wants at least {wanted}{why}"
    )


def order_key(seed: int, run: str, round_number: int, client: str, attempt: int = 1) -> str:
    """All that the order of a client's batches in a round depends on.

    A later attempt draws anew: two attempts whose cohorts differ by one client would otherwise have sums that differ by
    exactly what that client sent.
    """
    key = f"{seed}/{run}/{round_number}/{client}"
    return key if attempt == 1 else f"{key}/{attempt}"


def repeated_order_key(seed: int, round_number: int, site: str) -> str:
    """The key of a `deterministic` run: the same in every run and attempt, and whatever id Flower gave the site."""
    return f"{seed}//{round_number}/{site}"


def row_batches(
    rows: Sequence[TokenRow], batch_size: int, key: str | None = None, epochs: int | None = 1
) -> Iterator[list[TokenRow]]:
    """Batches of `batch_size` rows (the last of an epoch may be smaller), shuffled anew each epoch from `key`.

    Without a key the rows keep their order. `epochs` None goes on for ever.
    """
    if not rows:
        return
    epoch = 0
    while epochs is None or epoch < epochs:
        order = list(range(len(rows)))
        if key is not None:
            order.sort(key=lambda index: _digest(f"{key}/{epoch}/{index}"))
        for start in range(0, len(order), batch_size):
            yield [rows[index] for index in order[start : start + batch_size]]
        epoch += 1


@dataclass(frozen=True, slots=True)
class LengthBucket:
    """Rows are shown as long as the next multiple of `tokens`, but not above `longest`; 0 shows their own lengths."""

    tokens: int = 0
    longest: int = 0

    def shown(self, length: int) -> int:
        """How long a row of `length` tokens looks to who sees its attention mask."""
        if not self.tokens:
            return length
        return max(length, min(-(-length // self.tokens) * self.tokens, self.longest))


OWN_LENGTHS = LengthBucket()


def collate(rows: Sequence[TokenRow], bucket: LengthBucket = OWN_LENGTHS) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels`, int64 of shape (B, T), T the longest that a row is shown as.

    Rows are padded on the right with token 0 and label -100. The mask is 1 up to the length that the row is shown as: a
    causal model's tokens do not attend to what comes after them, so that no loss changes with it.
    """
    import torch

    shown = [bucket.shown(len(row.tokens_T)) for row in rows]
    shape = (len(rows), max(shown))
    tokens_BT = torch.zeros(shape, dtype=torch.int64)
    mask_BT = torch.zeros(shape, dtype=torch.int64)
    labels_BT = torch.full(shape, IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        length = len(row.tokens_T)
        tokens_BT[index, :length] = torch.from_numpy(row.tokens_T)
        mask_BT[index, : shown[index]] = 1
        labels_BT[index, :length] = torch.from_numpy(row.labels_T)
    return {"input_ids": tokens_BT, "attention_mask": mask_BT, "labels": labels_BT}


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _heldout_numbers(numbers: Sequence[int], fraction: float, seed: int) -> frozenset[int]:
    """Row numbers whose hash falls below `fraction`; at least one and not all, unless `fraction` is 0."""
    if fraction <= 0:
        return frozenset()
    ranked = sorted(numbers, key=lambda number: _digest(f"{seed}/{number}"))
    limit = int(fraction * 2**64)
    below = sum(int.from_bytes(_digest(f"{seed}/{number}"), "big") < limit for number in ranked)
    return frozenset(ranked[: min(max(below, 1), len(ranked) - 1)])


def _count(rows: Sequence[TokenRow], empty: int) -> DataCounts:
    return DataCounts(
        rows=len(rows) + empty,
        empty=empty,
        truncated=sum(row.truncated for row in rows),
        tokens=sum(len(row.tokens_T) for row in rows),
        masked_tokens=sum(int(np.count_nonzero(row.labels_T == IGNORED)) for row in rows),
    )


def _gather(
    source: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[TokenRow], int, text_files.SourceRow | None]:
    """The rows that teach something, how many do not, and the broken row that ended the reading, if any."""
    rows: list[TokenRow] = []
    empty = 0
    for row in _token_rows(source, tokenizer, max_length):
        if isinstance(row, text_files.SourceRow):
            return rows, empty, row
        if row.targets:
            rows.append(row)
        else:
            empty += 1
    return rows, empty, None


def _token_rows(
    source: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[TokenRow | text_files.SourceRow]:
    """Tokenised rows; where one is broken, that source row instead, as the last."""
    if source.startswith(STDLIB_PREFIX):
        from clients import stdlib_text

        documents = stdlib_text.domain_documents(source.removeprefix(STDLIB_PREFIX))
        yield from _packed(([document.text] for document in documents), tokenizer, max_length)
        return
    path = Path(source)
    if text_files.is_plain_text(path):
        yield from _packed([text_files.read_plain_text(path)], tokenizer, max_length)
        return
    for number, row in enumerate(text_files.read_rows(path)):
        if row.problem:
            yield row
            return
        try:
            ids, labels = _encode(row.fields, tokenizer)
        except DataError as error:
            yield text_files.SourceRow(row.where, {}, str(error))
            return
        yield _token_row(number, ids, labels, max_length)


def _token_row(number: int, ids: Sequence[int], labels: Sequence[int], max_length: int) -> TokenRow:
    return TokenRow(
        number,
        np.asarray(ids[:max_length], dtype=np.int32),
        np.asarray(labels[:max_length], dtype=np.int32),
        truncated=len(ids) > max_length,
    )


def _encode(fields: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids and labels of one row, before it is cut."""
    if "messages" in fields:
        ids, learned = chat.encode_messages(fields["messages"], tokenizer)
        return ids, [token if flag else IGNORED for token, flag in zip(ids, learned, strict=True)]
    if "text" in fields:
        if not fields["text"].strip():
            return [], []
        ids = _with_end(_ids(fields["text"], tokenizer, special=True), tokenizer)
        return ids, ids
    if not fields["completion"].strip():
        return [], []
    prompt = _without_end(_ids(fields["prompt"], tokenizer, special=True), tokenizer)
    completion = _with_end(_ids(fields["completion"], tokenizer, special=False), tokenizer)
    return prompt + completion, [IGNORED] * len(prompt) + completion


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, special: bool) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
    except Exception as error:
        raise DataError(f"the model's tokenizer fails on it: {type(error).__name__}") from error


def _with_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] == end) else [*ids, end]


def _without_end(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Some tokenizers end every text; a prompt goes on."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _packed(
    documents: Iterable[Iterable[str]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[TokenRow]:
    """Windows of `max_length` tokens over all documents, each ended by the end-of-text token; the last may be shorter.

    A document comes in pieces that are tokenised apart.
    """
    pending: list[int] = []
    number = 0
    for document in documents:
        for piece in document:
            pending += _ids(piece, tokenizer, special=False)
            whole = len(pending) - len(pending) % max_length
            for start in range(0, whole, max_length):
                window = pending[start : start + max_length]
                yield _token_row(number, window, window, max_length)
                number += 1
            del pending[:whole]
        if tokenizer.eos_token_id is not None:
            pending.append(tokenizer.eos_token_id)
    if len(pending) >= _SMALLEST_ROW_TOKENS:
        yield _token_row(number, pending, pending, max_length)
