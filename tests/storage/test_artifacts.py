import hashlib
import os
import threading
from pathlib import Path

import pytest

from contract.errors import IntegrityError, StorageError
from storage.artifacts import ArtifactStore

DATA = b"an adapter's bytes" * 1000


def test_what_is_put_comes_back_under_its_hash(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "new" / "artifacts")
    sha256 = store.put(DATA)
    assert sha256 == hashlib.sha256(DATA).hexdigest()
    assert store.has(sha256)
    assert store.get(sha256) == DATA
    assert store.path(sha256).read_bytes() == DATA
    assert store.path(sha256).suffix == ".safetensors"


def test_putting_the_same_bytes_again_leaves_one_file(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    assert store.put(DATA) == store.put(DATA)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", [b"", DATA[:-1], DATA[:-1] + b"!"])
def test_a_file_that_changed_is_refused_by_name_and_mended_by_the_next_put(tmp_path: Path, damage: bytes) -> None:
    store = ArtifactStore(tmp_path)
    sha256 = store.put(DATA)
    store.path(sha256).write_bytes(damage)
    with pytest.raises(IntegrityError, match=f"{sha256}.safetensors hashes to {hashlib.sha256(damage).hexdigest()}"):
        store.get(sha256)
    store.put(DATA)
    assert store.get(sha256) == DATA


def test_an_absent_artifact_is_named(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    assert not store.has("0" * 64)
    with pytest.raises(StorageError, match=f"there is no artifact {'0' * 64}"):
        store.get("0" * 64)


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "a" * 63, "A" * 64, "a" * 64 + "\n", "/" + "a" * 63])
def test_a_name_that_is_no_hash_reaches_no_file(tmp_path: Path, name: str) -> None:
    store = ArtifactStore(tmp_path)
    for reach in (store.get, store.has, store.path):
        with pytest.raises(StorageError, match="must be 64 lower-case hexadecimal digits"):
            reach(name)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"cannot write artifact {tmp_path / 'file'}"):
        ArtifactStore(tmp_path / "file").put(DATA)


def test_two_writers_of_the_same_bytes_both_succeed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    names: list[str] = []
    threads = [threading.Thread(target=lambda: names.append(store.put(DATA))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(names) == 8
    assert len(set(names)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [f"{names[0]}.safetensors"]


def test_what_comes_bit_by_bit_is_nowhere_until_it_is_kept(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "artifacts")
    receiving = store.begin()
    receiving.write(b"adap")
    receiving.write(memoryview(b"ter"))
    sha256 = hashlib.sha256(b"adapter").hexdigest()
    assert receiving.sha256 == sha256
    assert receiving.flushed().read_bytes() == b"adapter"
    assert not store.has(sha256)
    assert receiving.keep() == sha256
    assert store.get(sha256) == b"adapter"
    receiving.abandon()
    assert store.get(sha256) == b"adapter"
    assert len(list((tmp_path / "artifacts").iterdir())) == 1


def test_what_is_abandoned_leaves_nothing(tmp_path: Path) -> None:
    receiving = ArtifactStore(tmp_path / "artifacts").begin()
    receiving.write(b"adapter")
    receiving.abandon()
    assert list((tmp_path / "artifacts").iterdir()) == []


def test_a_directory_that_nothing_can_come_into_is_named(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("a file")
    with pytest.raises(StorageError, match="cannot write to .*artifacts"):
        ArtifactStore(tmp_path / "artifacts").begin()


def test_what_was_put_or_used_since_is_not_unused(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    old, put, used = (store.put(data) for data in (b"old", b"put", b"used"))
    for sha256 in (old, put, used):
        os.utime(store.path(sha256), (1000, 1000))
    (tmp_path / "notes.safetensors").write_text("somebody's own")
    assert store.unused(1000.0) == []
    assert store.unused(1001.0) == sorted((old, put, used))
    store.put(b"put")
    store.use(used)
    assert store.unused(1001.0) == [old]
    with pytest.raises(StorageError, match=f"cannot note the use of artifact .*{'0' * 64}"):
        store.use("0" * 64)


def test_what_is_removed_is_here_no_more_and_may_be_removed_again(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    sha256 = store.put(DATA)
    for _ in range(2):
        store.remove(sha256)
        assert not store.has(sha256)
    assert ArtifactStore(tmp_path / "none").unused(1e12) == []
