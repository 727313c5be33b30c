"""The roster file: read as it was signed or not at all, and never an older one than before."""

import base64
import json
import os
import stat
import string
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.errors import ConfigError, IntegrityError, StorageError
from contract.identity import public_key_text
from contract.roster import MAX_ROSTER_BYTES, Roster, parse_roster, read_roster, signed_roster, write_roster

SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PINNED = SIGNER.public_key().public_bytes_raw()
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
KEYS = {"site-a": b"a" * 32, "site-b": b"b" * 32, "site-c": b"c" * 32}


def roster(version: int = 7, members: dict[str, bytes] | None = None) -> Roster:
    return Roster(version, NOON, PINNED, KEYS if members is None else members)


def resigned(body: bytes, key: Ed25519PrivateKey = SIGNER) -> bytes:
    """A file with `body`, whatever that is, and a signature that holds."""
    signature = base64.b64encode(key.sign(b"trunkline roster\x00" + body)).decode()
    return body + b"\n" + json.dumps({"signature": signature}, separators=(",", ":")).encode() + b"\n"


def body_with(**changed: Any) -> bytes:
    body = json.loads(signed_roster(roster(), SIGNER).split(b"\n")[0]) | changed
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


client_ids = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
rosters = st.builds(
    Roster,
    version=st.integers(1, 2**53),
    issued_at=st.datetimes(datetime(1970, 1, 1), datetime(9000, 1, 1)).map(
        lambda moment: moment.replace(microsecond=0, tzinfo=UTC)
    ),
    signer=st.just(PINNED),
    members=st.dictionaries(client_ids, st.binary(min_size=32, max_size=32), max_size=8).filter(
        lambda members: len(set(members.values())) == len(members)
    ),
)


@given(rosters)
def test_a_roster_reads_back_as_it_was_signed(written: Roster) -> None:
    assert parse_roster(signed_roster(written, SIGNER), PINNED, written.version) == written


@given(rosters)
def test_equal_rosters_are_equal_bytes_whatever_their_members_order(written: Roster) -> None:
    turned = Roster(written.version, written.issued_at, PINNED, dict(reversed(written.members.items())))
    assert signed_roster(turned, SIGNER) == signed_roster(written, SIGNER)


def test_every_single_byte_counts() -> None:
    data = signed_roster(roster(), SIGNER)
    for place in range(len(data)):
        for other in {data[place] ^ 1, data[place] ^ 0x20, ord(" "), ord("\n"), 0, 255} - {data[place]}:
            with pytest.raises(IntegrityError):
                parse_roster(data[:place] + bytes([other]) + data[place + 1 :], PINNED)


@given(st.data())
@settings(max_examples=300)
def test_a_byte_more_or_less_is_refused(data: st.DataObject) -> None:
    whole = signed_roster(roster(), SIGNER)
    place = data.draw(st.integers(0, len(whole) - 1))
    added = bytes([data.draw(st.sampled_from(string.printable.encode()))])
    for changed in (whole[:place] + whole[place + 1 :], whole[:place] + added + whole[place:], whole + added):
        with pytest.raises(IntegrityError):
            parse_roster(changed, PINNED)


@given(st.binary(max_size=300))
def test_no_bytes_make_the_reader_fail_otherwise(data: bytes) -> None:
    for body in (data, resigned(data)):
        with pytest.raises(IntegrityError):
            parse_roster(body, PINNED)


def test_an_older_version_than_one_seen_is_refused_with_both(tmp_path: Path) -> None:
    path = tmp_path / "roster"
    write_roster(path, roster(version=7), SIGNER)
    assert read_roster(path, PINNED, at_least=7).version == 7
    with pytest.raises(IntegrityError, match=rf"the roster {path}: version is 7, but version 8 was seen before"):
        read_roster(path, PINNED, at_least=8)


def test_only_the_pinned_key_signs() -> None:
    other = Ed25519PrivateKey.generate()
    theirs = other.public_key().public_bytes_raw()
    forged = signed_roster(Roster(7, NOON, theirs, KEYS), other)
    with pytest.raises(IntegrityError, match="is not signed by ed25519:"):
        parse_roster(forged, PINNED)
    with pytest.raises(IntegrityError, match="signer is ed25519:.*, not the one that signed it"):
        parse_roster(resigned(body_with(signer=public_key_text(theirs))), PINNED)
    with pytest.raises(ConfigError, match="the signing key is not that of the roster's signer"):
        signed_roster(roster(), other)


def test_a_signature_over_the_body_alone_is_none_over_a_roster() -> None:
    body = body_with()
    signature = base64.b64encode(SIGNER.sign(body)).decode()
    with pytest.raises(IntegrityError, match="is not signed by"):
        parse_roster(body + b'\n{"signature":"' + signature.encode() + b'"}\n', PINNED)


@pytest.mark.parametrize(
    "tail", [b"", b"\n", b"\n{}\n", b"\n[]\n", b'\n{"signature":7}\n', b'\n{"signature":"?"}\n', b"\n" + b"[" * 10_000]
)
def test_an_unsigned_roster_is_refused(tail: bytes) -> None:
    with pytest.raises(IntegrityError, match="is not signed"):
        parse_roster(body_with() + tail, PINNED)


KEY = public_key_text(b"k" * 32)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "is no JSON"),
        (b"[" * 10_000, "is no JSON"),
        (b"{}", "format is not trunkline-roster-1"),
        (b"7", "format is not trunkline-roster-1"),
        (body_with(format="trunkline-roster-2"), "format is not trunkline-roster-1"),
        (body_with(extra=1), "these fields are missing, or have no place in it: extra"),
        (body_with(version=0), "version is 0"),
        (body_with(version=-1), "version is -1"),
        (body_with(version=2**53 + 1), "version is 9007199254740993"),
        (body_with(version=True), "version is True"),
        (body_with(version="7"), "version is '7'"),
        (body_with(version=7.0), "version is 7.0"),
        (body_with(issued_at="yesterday"), "issued_at is no moment"),
        (body_with(issued_at=1), "issued_at is no text"),
        (body_with(issued_at="2026-01-01T12:00:00"), "with a time zone"),
        (body_with(issued_at="2026-01-01T13:00:00+01:00"), "not spelt as a roster is"),
        (body_with(signer=None), "signer is no text"),
        (body_with(members=[]), "members is no object"),
        (body_with(members={"a b": KEY}), "a client id in members is 'a b'"),
        (body_with(members={"a": "rsa:AAAA"}), "members.a does not begin with ed25519:"),
        (body_with(members={"a": 7}), "members.a is no text"),
        (body_with(members={"a": KEY, "b": KEY}), "members.b and members.a have the same key"),
        (body_with().replace(b'"site-b"', b'"site-a"'), "site-a is there twice"),
        (body_with().replace(b'":', b'": '), "not spelt as a roster is"),
        (body_with().replace(b"site-a", b"\\u0073ite-a"), "not spelt as a roster is"),
    ],
)
def test_a_signed_file_that_is_no_roster_names_its_field(tmp_path: Path, body: bytes, told: str) -> None:
    path = tmp_path / "roster"
    path.write_bytes(resigned(body))
    with pytest.raises(IntegrityError, match=told) as caught:
        read_roster(path, PINNED)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("version", "members", "told"),
    [
        (0, KEYS, "version is 0"),
        (1, {"-a": b"a" * 32}, "a client id in members"),
        (1, {"a": b"a" * 31}, "members.a is of 31 bytes"),
        (1, {"a": b"k" * 32, "b": b"k" * 32}, "members.b and members.a have the same key"),
    ],
)
def test_what_is_no_roster_is_never_signed(version: int, members: dict[str, bytes], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        roster(version, members)


def test_a_moment_is_the_same_in_any_time_zone() -> None:
    elsewhere = NOON.astimezone(timezone(timedelta(hours=9)))
    assert signed_roster(Roster(7, elsewhere, PINNED, KEYS), SIGNER) == signed_roster(roster(), SIGNER)
    with pytest.raises(ConfigError, match="whole seconds, with a time zone"):
        Roster(7, NOON.replace(tzinfo=None), PINNED, KEYS)


def test_an_oversized_roster_is_neither_written_nor_read(tmp_path: Path) -> None:
    many = {f"{number:064}": number.to_bytes(32, "big") for number in range(40_000)}
    with pytest.raises(ConfigError, match="of 40000 members is over 4000000 bytes"):
        write_roster(tmp_path / "roster", roster(1, many), SIGNER)
    assert list(tmp_path.iterdir()) == []
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(100 * MAX_ROSTER_BYTES)  # holes: takes no room, and would take memory if it were read
    with pytest.raises(IntegrityError, match="is over 4000000 bytes"):
        read_roster(tmp_path / "huge", PINNED)


def test_ten_thousand_members_fit() -> None:
    many = {f"{number:064}": number.to_bytes(32, "big") for number in range(16_384)}
    assert len(parse_roster(signed_roster(roster(1, many), SIGNER), PINNED).members) == 16_384


def test_a_roster_is_replaced_whole_and_is_public(tmp_path: Path) -> None:
    path = tmp_path / "roster"
    write_roster(path, roster(1), SIGNER)
    opened = path.open("rb")
    write_roster(path, roster(2), SIGNER)
    assert parse_roster(opened.read(), PINNED).version == 1, "who was reading was disturbed"
    opened.close()
    assert read_roster(path, PINNED).version == 2
    assert [one.name for one in tmp_path.iterdir()] == ["roster"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_roster_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"cannot read the roster {tmp_path}/none: No such file"):
        read_roster(tmp_path / "none", PINNED)
    with pytest.raises(StorageError, match="cannot write the roster .*No such file"):
        write_roster(tmp_path / "absent" / "roster", roster(), SIGNER)
    (tmp_path / "taken").mkdir()
    with pytest.raises(StorageError, match="cannot write the roster"):
        write_roster(tmp_path / "taken", roster(), SIGNER)
    assert [one.name for one in tmp_path.iterdir()] == ["taken"]


def test_a_rosters_members_do_not_change() -> None:
    members = dict(KEYS)
    made = roster(1, members)
    members["evil"] = b"e" * 32
    assert "evil" not in made.members
    with pytest.raises(TypeError):
        made.members["evil"] = b"e" * 32  # type: ignore[index]
