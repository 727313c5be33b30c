"""Keys as text and as files: what was written is read back, and what is no key, or is open to others, is refused."""

import base64
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from contract.errors import ConfigError
from contract.identity import (
    check_client_id,
    create_private_key,
    decode_public_key,
    parse_public_key,
    public_key_text,
    read_private_key,
)

PRIME = 2**255 - 19
REPOSITORY = Path(__file__).resolve().parents[2]


@given(st.binary(min_size=32, max_size=32))
def test_any_32_bytes_survive_as_text(key: bytes) -> None:
    assert decode_public_key(public_key_text(key), "key") == key


@given(st.binary(min_size=32, max_size=32))
@settings(max_examples=50)
def test_every_generated_key_can_identify_its_owner(seed: bytes) -> None:
    public = Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    assert parse_public_key(f" {public_key_text(public)}\n") == public


@given(st.text(max_size=80) | st.text(max_size=80).map("ed25519:".__add__))
def test_other_text_is_refused_or_is_a_key_spelt_as_keys_are(text: str) -> None:
    try:
        key = decode_public_key(text, "site.key")
    except ConfigError as error:
        assert "site.key" in str(error)  # noqa: PT017
    else:
        assert public_key_text(key) == text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "does not begin with ed25519:"),
        ("rsa:AAAA", "does not begin with ed25519:"),
        ("ed25519:" + base64.b64encode(bytes(31)).decode(), "of 31 bytes"),
        ("ed25519:" + base64.b64encode(bytes(33)).decode(), "of 33 bytes"),
        ("ed25519:!!!!", "not base64"),
        ("ed25519:" + "A" * 42 + "B=", "not base64 as it is written"),  # the last two bits say nothing
        ("-----BEGIN PRIVATE KEY-----", "which must not leave its file"),
    ],
)
def test_what_is_no_key_is_told_with_how_a_key_looks(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        parse_public_key(text, "--public-key")
    assert str(caught.value).startswith("--public-key ")
    assert "trunkline clients keygen" in str(caught.value)


def test_a_wrong_key_is_never_repeated_in_the_error() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_public_key("ed25519:c2VjcmV0", "key")
    assert "c2VjcmV0" not in str(caught.value)


def small_order_ys() -> list[int]:
    """The y of the eight points whose order divides 8: 1, -1, 0 and the roots of d y^4 + 2 y^2 - 1."""
    order_eight = bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")
    eight = int.from_bytes(order_eight, "little")
    return [1, PRIME - 1, 0, eight, PRIME - eight]


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("y", small_order_ys())
def test_a_key_under_which_anybody_can_sign_is_refused(y: int, sign: int) -> None:
    key = (y | sign << 255).to_bytes(32, "little")
    with pytest.raises(ConfigError, match="no Ed25519 key that can identify anybody"):
        parse_public_key(public_key_text(key))


def test_such_a_key_really_identifies_nobody() -> None:
    identity = (1).to_bytes(32, "little")
    forged = identity + bytes(32)  # R is the neutral point, S is 0: 0 B = R + k A whatever was said
    Ed25519PublicKey.from_public_bytes(identity).verify(forged, b"whatever")


@pytest.mark.parametrize("y", [2, PRIME, PRIME + 3, 2**255 - 1])
def test_bytes_that_are_no_point_or_no_number_of_the_field_are_refused(y: int) -> None:
    with pytest.raises(ConfigError, match="no Ed25519 key"):
        parse_public_key(public_key_text(y.to_bytes(32, "little")))


@pytest.mark.parametrize("client_id", ["a", "site-1", "Hospital.North_2", "9" * 64])
def test_a_client_id_is_plain(client_id: str) -> None:
    assert check_client_id(client_id) == client_id


@pytest.mark.parametrize("client_id", ["", "-a", ".a", "a b", "a/b", "ä", "a\n", "9" * 65, "a\x00", "a\x1b[31m"])
def test_another_client_id_is_refused(client_id: str) -> None:
    with pytest.raises(ConfigError, match="client id is"):
        check_client_id(client_id)


# ---- files -----------------------------------------------------------------------------------------------------------


def written(path: Path, data: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(data)
    path.chmod(mode)
    return path


def pem_of(key: Ed25519PrivateKey | X25519PrivateKey, password: bytes | None = None) -> bytes:
    sealed = NoEncryption() if password is None else BestAvailableEncryption(password)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, sealed)


def test_a_new_key_is_its_owners_alone_and_reads_back(tmp_path: Path) -> None:
    before = os.umask(0)  # even where files are everybody's by default
    try:
        public = create_private_key(tmp_path / "site.key")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "site.key").stat().st_mode) == 0o600
    assert read_private_key(tmp_path / "site.key").public_key().public_bytes_raw() == public
    assert (tmp_path / "site.key").read_text().startswith("-----BEGIN PRIVATE KEY-----\n")


def test_a_key_is_never_overwritten_nor_written_through_a_link(tmp_path: Path) -> None:
    written(tmp_path / "site.key", b"mine")
    (tmp_path / "link.key").symlink_to(tmp_path / "elsewhere")
    for name in ("site.key", "link.key"):
        with pytest.raises(ConfigError, match=f"there is a file .*{name} already"):
            create_private_key(tmp_path / name)
    assert (tmp_path / "site.key").read_bytes() == b"mine"
    assert not (tmp_path / "elsewhere").exists()


def test_where_no_file_can_be_made_it_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot make the key file .*No such file or directory"):
        create_private_key(tmp_path / "absent" / "site.key")


@pytest.mark.parametrize("reason", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_half_a_key_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: BaseException) -> None:
    def fail(descriptor: int) -> None:
        raise reason

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConfigError if isinstance(reason, OSError) else KeyboardInterrupt):
        create_private_key(tmp_path / "site.key")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, pathlib, signal, sys
from contract.identity import create_private_key

os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
create_private_key(pathlib.Path(sys.argv[1]))
"""


def test_a_process_that_was_killed_while_it_made_a_key_stands_in_nobodys_way(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=REPOSITORY, timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    public = create_private_key(path)
    assert read_private_key(path).public_key().public_bytes_raw() == public


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644, 0o777])
def test_a_key_that_others_can_use_is_refused_with_what_to_run(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "the site's.key"
    create_private_key(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:04o}\): run `chmod 600 ") as caught:
        read_private_key(path)
    command = str(caught.value).partition("`")[2].rstrip("`")
    assert os.system(command) == 0
    read_private_key(path)


def test_read_only_is_private_too(tmp_path: Path) -> None:
    create_private_key(tmp_path / "site.key")
    (tmp_path / "site.key").chmod(0o400)
    read_private_key(tmp_path / "site.key")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "holds no private key in PEM"),
        (b"s3cret", "holds no private key in PEM"),
        (pem_of(X25519PrivateKey.generate()), "is no Ed25519 key"),
        (pem_of(Ed25519PrivateKey.generate(), b"password"), "is encrypted"),
        (
            Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            "holds no private key in PEM",
        ),
        (b"x" * 20_000, "over 16384 bytes"),
    ],
)
def test_what_is_no_private_key_is_refused_without_its_contents(tmp_path: Path, data: bytes, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        read_private_key(written(tmp_path / "site.key", data))
    assert "site.key" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_damaged_key_tells_none_of_it(tmp_path: Path) -> None:
    create_private_key(tmp_path / "site.key")
    lines = (tmp_path / "site.key").read_text().splitlines()
    written(tmp_path / "cut.key", "\n".join([lines[0], lines[1][:-8], lines[2]]).encode())
    with pytest.raises(ConfigError) as caught:
        read_private_key(tmp_path / "cut.key")
    assert lines[1][:12] not in str(caught.value)
    assert caught.value.__suppress_context__


def test_what_is_no_file_is_told_and_a_pipe_does_not_hang(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the key file .*No such file"):
        read_private_key(tmp_path / "absent.key")
    os.mkfifo(tmp_path / "pipe", 0o600)
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigError):
            read_private_key(path)
