"""Text features on disk: the same bits, for the same files only, and never the end of a job."""

import os
from pathlib import Path

import numpy as np
import pytest

from trt_wan.engines.store import checksums
from trt_wan.runtime import text_cache
from trt_wan.runtime.text_cache import TextCache

SHAPE = (8, 4)
NUMBERS = ("bf16", "tensorrt_rtx 1.6.1", "a GPU")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRT_WAN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return written(tmp_path / "umt5.safetensors", b"weights")


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes are remembered although the files have just been written."""
    monkeypatch.setattr(checksums, "SETTLED", -1.0)


def written(path: Path, content: bytes) -> Path:
    """Two contents of one length leave the same size and mtime."""
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9))
    return path


def opened(*files: Path, numbers: tuple[str, ...] = NUMBERS, enabled: bool = True) -> TextCache:
    return TextCache(enabled, files, numbers, SHAPE)


def features(rows: int = 3) -> text_cache.Features:
    values = np.zeros(SHAPE, np.float32)
    values[:rows] = np.random.default_rng(rows).standard_normal((rows, SHAPE[1]))
    values[0, 0] = -0.0
    return values


def kept(cache: TextCache, prompt: str, values: text_cache.Features) -> None:
    cache.store(prompt, values)
    cache.close(60)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_known_prompt_has_the_same_bits(settled: None, encoder: Path, rows: int) -> None:
    first = opened(encoder)
    assert first.find("a cat") is None
    kept(first, "a cat", features(rows))
    for cache in (first, opened(encoder)):
        found = cache.find("a cat")
        assert found is not None
        np.testing.assert_array_equal(found.view(np.uint32), features(rows).view(np.uint32))
        assert cache.find("a dog") is None


def test_the_next_run_reads_no_file_of_weights(
    settled: None, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(opened(encoder), "a cat", features())

    def never(*_: object) -> str:
        raise AssertionError("hashed again")

    monkeypatch.setattr(text_cache, "content_hash", never)
    assert opened(encoder).find("a cat") is not None


def test_everything_that_decides_the_numbers_is_in_the_key(
    settled: None, encoder: Path, tmp_path: Path
) -> None:
    kept(opened(encoder), "a cat", features())
    assert opened(encoder, numbers=("fp8", *NUMBERS[1:])).find("a cat") is None
    tokenizer = written(tmp_path / "tokenizer.json", b"{}")
    assert opened(encoder, tokenizer).find("a cat") is None
    copy = written(tmp_path / "copy.safetensors", b"weights")
    other = opened(copy)
    kept(other, "a dog", features(1))
    assert other.find("a cat") is not None, "the content counts, not the path"
    written(encoder, b"another")
    changed = opened(encoder)
    kept(changed, "a dog", features(1))
    assert changed.find("a cat") is None, "same size and mtime, another content"


def test_a_file_that_changes_while_the_job_runs_stores_nothing(encoder: Path, home: Path) -> None:
    cache = opened(encoder)
    written(encoder, b"another")
    kept(cache, "a cat", features())
    assert not list(home.rglob("*.features"))


def test_a_prompt_stored_before_the_hash_is_known_is_found_in_the_same_run(encoder: Path) -> None:
    cache = opened(encoder)
    with cache._lock:  # the thread waits here
        cache._pending["a cat"] = features()
    np.testing.assert_array_equal(cache.find("a cat"), features())


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:40] + b"?" + b[41:], lambda b: b""])
def test_damaged_files_are_ignored_and_rewritten(encoder: Path, home: Path, damage) -> None:  # type: ignore[no-untyped-def]
    cache = opened(encoder)
    kept(cache, "a cat", features())
    (path,) = home.rglob("*.features")
    path.write_bytes(damage(path.read_bytes()))
    assert cache.find("a cat") is None
    cache.store("a cat", features())
    np.testing.assert_array_equal(cache.find("a cat"), features())


def test_disabled_or_without_files_it_does_nothing(encoder: Path, home: Path) -> None:
    for cache in (opened(encoder, enabled=False), opened(), opened(encoder.with_name("missing"))):
        kept(cache, "a cat", features())
        assert cache.find("a cat") is None
    assert not home.exists()


def test_a_home_that_cannot_be_written_ends_no_job(encoder: Path, home: Path) -> None:
    home.write_text("a file where the folder should be")
    cache = opened(encoder)
    kept(cache, "a cat", features())
    assert cache.find("a cat") is None


def test_the_least_recently_used_features_go(
    encoder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = opened(encoder)
    kept(cache, "0", features())
    (size,) = (path.stat().st_size for path in home.rglob("*.features"))
    monkeypatch.setattr(text_cache, "LIMIT", 2 * size)
    os.utime(next(home.rglob("*.features")), (1e9, 1e9))
    cache.store("1", features())
    os.utime(cache._path("1", cache._hashes or []), (1.1e9, 1.1e9))
    assert cache.find("0") is not None  # used just now
    cache.store("2", features())
    assert [cache.find(prompt) is not None for prompt in "012"] == [True, False, True]


def test_the_end_of_a_job_does_not_wait_for_a_slow_hash(
    encoder: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(path, state, memory, should_stop):  # type: ignore[no-untyped-def]
        while not should_stop():
            pass
        return None

    monkeypatch.setattr(text_cache, "content_hash", slow)
    cache = opened(encoder)
    cache.store("a cat", features())
    cache.close(0.01)
    assert cache._hashing is not None
    cache._hashing.join(60)
    assert not cache._hashing.is_alive() and not list(home.rglob("*.features"))
