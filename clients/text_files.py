"""A site's text file as numbered rows: JSONL, JSON, Parquet or plain text.

Rows are read by pyarrow (a `.json` array by the standard library) straight from the file, a block at a time. Nothing is
written: no dataset cache, no temporary copy, so that private text stays in the file it came from.

A row is broken when it cannot be read as one of three forms, or has another form than the row before it:

    {"text": "..."}
    {"prompt": "...", "completion": "..."}
    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

Other columns are ignored. A broken row is a value, not an exception, so that `data check` can report what came before
it; it is the last one given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contract.errors import DataError

if TYPE_CHECKING:
    import pyarrow

LINE_SUFFIXES = (".jsonl", ".ndjson")
PLAIN_SUFFIXES = (".txt", ".text", ".md", ".rst")
SUFFIXES = (*LINE_SUFFIXES, ".json", ".parquet", *PLAIN_SUFFIXES)
FORMS = (("messages",), ("prompt", "completion"), ("text",))
FIELDS = tuple(field for form in FORMS for field in form)

_BLOCK_BYTES = 32 * 2**20
_PLAIN_CHUNK_BYTES = 64 * 2**10
_HALF_CHARACTER = "holds half of a surrogate pair (such as \\ud800), which is no text"
_WANTED = "'text', 'prompt' and 'completion', or 'messages'"


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row: `where` is "line 7" or "row 7", counted from 1; `problem` says what is wrong with a broken one."""

    where: str
    fields: Mapping[str, Any]
    problem: str = ""


def is_plain_text(path: Path) -> bool:
    """Whether `path` is read as one running text instead of rows."""
    return path.suffix.lower() in PLAIN_SUFFIXES


def read_rows(path: Path) -> Iterator[SourceRow]:
    """The rows of a JSONL, JSON or Parquet file; a broken row is the last.

    Raises DataError for a file that cannot be opened, is empty, or has a suffix that is not known.
    """
    suffix = _readable(path)
    if suffix == ".parquet":
        rows = _parquet_rows(path)
    elif suffix in LINE_SUFFIXES or not _starts_with_array(path):
        rows = _json_lines(path)
    else:
        rows = _json_array(path)
    return _one_form(rows)


def read_plain_text(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in pieces of about 64 KiB that end with a line.

    Raises DataError for a file that cannot be opened, is empty, or is not UTF-8, with the line of the bad byte.
    """
    _readable(path)
    line_number = 1
    with path.open("rb") as file:
        while lines := file.readlines(_PLAIN_CHUNK_BYTES):
            piece = b"".join(lines)
            try:
                yield piece.decode("utf-8-sig" if line_number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                line_number += piece[: error.start].count(b"\n")
                raise DataError(f"{path}: line {line_number}: not UTF-8 text") from error
            line_number += len(lines)


def _readable(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: suffix {suffix!r} is not known; wants one of {', '.join(SUFFIXES)}")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise DataError(f"{path}: the file is empty")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return suffix


def _starts_with_array(path: Path) -> bool:
    with path.open("rb") as file:
        for line in file:
            if stripped := line.removeprefix(b"\xef\xbb\xbf").strip():
                return stripped.startswith(b"[")
    return False


def _json_lines(path: Path) -> Iterator[SourceRow]:
    first_line = 1
    with path.open("rb") as file:
        while lines := file.readlines(_BLOCK_BYTES):
            if first_line == 1:
                lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            yield from _json_block(lines, first_line)
            first_line += len(lines)


def _json_block(lines: list[bytes], first_line: int) -> Iterator[SourceRow]:
    """Rows of whole lines. pyarrow names a bad row by its place in the block, which blank lines do not count in."""
    import pyarrow

    filled = [index for index, line in enumerate(lines) if line.strip()]
    if not filled:
        return
    bad_line = _first_undecodable(lines)
    problem = "not UTF-8 text" if bad_line is not None else ""
    if bad_line is None:
        try:
            fields = _parse_block(lines)
        except pyarrow.ArrowInvalid as error:
            bad_row, problem = _explain(str(error))
            bad_line = filled[min(bad_row, len(filled) - 1)]
        else:
            if len(fields) != len(filled):
                bad_line, problem = filled[0], "a line holds several JSON values; wants one object a line"
    if bad_line is None:
        for index, row in zip(filled, fields, strict=True):
            yield SourceRow(f"line {first_line + index}", row)
        return
    yield from _json_block(lines[:bad_line], first_line)
    yield SourceRow(f"line {first_line + bad_line}", {}, problem)


def _parse_block(lines: list[bytes]) -> list[dict[str, Any]]:
    import pyarrow
    from pyarrow import json as arrow_json

    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    # Declared, not inferred: a column of dates would otherwise become timestamps, and a foreign column of mixed types
    # would fail the file.
    schema = pyarrow.schema(
        [(name, pyarrow.list_(message) if name == "messages" else pyarrow.string()) for name in FIELDS]
    )
    block = b"".join(lines)
    table = arrow_json.read_json(
        pyarrow.BufferReader(block),
        read_options=arrow_json.ReadOptions(use_threads=False, block_size=len(block) + 1),
        parse_options=arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
    )
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _first_undecodable(lines: list[bytes]) -> int | None:
    try:
        b"".join(lines).decode()
    except UnicodeDecodeError as error:
        return b"".join(lines)[: error.start].count(b"\n")
    return None


def _explain(arrow_message: str) -> tuple[int, str]:
    """pyarrow's zero-based row and its complaint in words of the file."""
    match = re.search(r" in row (\d+)", arrow_message)
    reason = re.sub(r" in row \d+", "", arrow_message).removeprefix("JSON parse error: ").strip()
    changed = re.fullmatch(r"Column\(/?([^)]*)\) changed from (\w+) to (\w+)", reason)
    if changed:
        column, wanted, got = changed.groups()
        reason = f"{column.replace('/[]/', '[].') or 'the line'} is of JSON type {got}; wants {wanted}"
    return (int(match.group(1)) if match else 0), reason


def _json_array(path: Path) -> Iterator[SourceRow]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            items = json.load(file)
    except json.JSONDecodeError as error:
        yield SourceRow(f"line {error.lineno}", {}, error.msg)
        return
    except UnicodeDecodeError:
        yield SourceRow("line 1", {}, "not UTF-8 text")
        return
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets thousands deep
        raise DataError(f"{path}: cannot be read as JSON: {type(error).__name__}") from error
    for number, item in enumerate(items, start=1):
        if isinstance(item, dict):
            yield SourceRow(f"row {number}", item)
        else:
            yield SourceRow(f"row {number}", {}, f"a {type(item).__name__}; wants an object")
            return


def _parquet_rows(path: Path) -> Iterator[SourceRow]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in FIELDS]
            if not columns:
                found = ", ".join(file.schema_arrow.names) or "none"
                raise DataError(f"{path}: has the columns {found}; wants {_WANTED}")
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for fields in _batch_rows(batch):
                    number += 1
                    if fields is None:
                        yield SourceRow(f"row {number}", {}, "not UTF-8 text")
                        return
                    yield SourceRow(f"row {number}", fields)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from error


def _batch_rows(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | None]:
    """The rows of `batch`, up to the first whose bytes are not UTF-8: None stands for that one."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield None
                return


def _one_form(rows: Iterable[SourceRow]) -> Iterator[SourceRow]:
    """`rows` with only their form's fields, up to the first that is broken or of another form than the first."""
    first: tuple[tuple[str, ...], str] | None = None
    for row in rows:
        if row.problem:
            yield row
            return
        form, problem = _form_of(row.fields)
        if not problem and first is not None and form != first[0]:
            problem = f"has {_quoted(form)} but {first[1]} has {_quoted(first[0])}; wants one form in a file"
        if not problem:
            problem = _type_problem(form, row.fields)
        if problem:
            yield SourceRow(row.where, {}, problem)
            return
        first = first or (form, row.where)
        yield SourceRow(row.where, {name: row.fields[name] for name in form})


def _form_of(fields: Mapping[str, Any]) -> tuple[tuple[str, ...], str]:
    present = tuple(name for name in FIELDS if fields.get(name) is not None)
    if present in FORMS:
        return present, ""
    if not present:
        return (), f"has none of the fields it could train on; wants {_WANTED}"
    if len(present) == 1:
        missing = "completion" if present == ("prompt",) else "prompt"
        return (), f"has '{present[0]}' but no '{missing}'"
    return (), f"has {_quoted(present)}; wants only one of {_WANTED}"


def _type_problem(form: tuple[str, ...], fields: Mapping[str, Any]) -> str:
    if form != ("messages",):
        for name in form:
            if not isinstance(fields[name], str):
                return f"'{name}' is of type {type(fields[name]).__name__}; wants text"
            if not _is_text(fields[name]):
                return f"'{name}' {_HALF_CHARACTER}"
        return ""
    messages = fields["messages"]
    if not isinstance(messages, list):
        return f"'messages' is of type {type(messages).__name__}; wants a list of objects with 'role' and 'content'"
    for index, message in enumerate(messages):
        for name in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(name), str):
                return f"message {index + 1} has no '{name}' text; wants 'role' and 'content' in every message"
            if not _is_text(message[name]):
                return f"'{name}' of message {index + 1} {_HALF_CHARACTER}"
    return ""


def _is_text(value: str) -> bool:
    """Whether UTF-8 can say it: JSON can escape one half of a surrogate pair, which no tokenizer takes."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _quoted(names: Iterable[str]) -> str:
    return " and ".join(f"'{name}'" for name in names)
