"""How much the cache holds, what goes first, and what becomes of a disk that fails."""

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from klora.cache import library
from klora.cache.draft import DiskError, DiskFullError
from klora.cache.folder import Folder
from klora.cache.refs import File
from klora.cache.room import CacheFullError, files
from klora.sources.deadline import Deadline
from klora.sources.kinds import Data
from test_folder.lending import CONTENT, SIZE, Shop, hub, opened_shop, safetensors, sha256

# Room.


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Shop]:
    """A cache for three files, and four to be had: a, b, c and d, and one that is as large as all."""
    with opened_shop(tmp_path / "cache", max_bytes=3 * SIZE) as shop:
        for seed, name in enumerate("abcd"):
            shop.authority.has(hub(name), (f"{name}.safetensors", safetensors(SIZE, seed)))
        shop.authority.has(hub("large"), ("large.safetensors", safetensors(3 * SIZE, 9)))
        shop.authority.has(hub("larger"), ("larger.safetensors", safetensors(3 * SIZE + 1, 9)))
        yield shop


def test_a_file_promises_what_it_has_not_yet(tmp_path: Path) -> None:
    """Of the disk's free bytes: what is written has left them already."""
    for name, content in (("written", os.urandom(65_536)), ("begun", os.urandom(8192))):
        with (tmp_path / name).open("wb") as file:
            file.write(content)
            file.truncate(65_536)
            os.fsync(file.fileno())
    assert {entry.path.name: entry.unwritten for entry in files(tmp_path)} == {"written": 0, "begun": 65_536 - 8192}


def used_long_ago(shop: Shop, *names: str) -> None:
    """Each a day longer than the one after it."""
    for days, name in enumerate(reversed(names), 1):
        then = time.time() - days * 86400
        os.utime(shop.store.refs.path(library.ref_name(f"hf:someone/{name}", "public")), (then, then))


def kept(shop: Shop) -> str:
    return "".join(name for seed, name in enumerate("abcd") if shop.blob(safetensors(SIZE, seed)).exists())


def test_the_longest_unused_goes_also_after_a_restart(small: Shop) -> None:
    """K4, K11."""
    for name in "abc":
        small.read(hub(name))
    used_long_ago(small, "c", "a", "b")
    small.reopen()
    small.read(hub("c"))
    small.read(hub("d"))
    assert kept(small) == "bcd"
    assert len(small.names("refs")) == 3
    assert small.store.room.used() == 3 * SIZE


def test_what_is_in_use_stays_and_the_rest_makes_room(small: Shop) -> None:
    """K4."""
    for name in "abc":
        small.read(hub(name))
    used_long_ago(small, "a", "b", "c")
    with small.borrowed(20, {}, lora=hub("a")) as paths:
        used_long_ago(small, "a", "b", "c")
        small.read(hub("d"))
        assert kept(small) == "acd"
        assert paths["lora"].read_bytes() == safetensors(SIZE, 0)


def test_a_full_disk_has_room_made_though_the_cache_may_hold_more(small: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a disk for two files."""

    def free(folder: Folder) -> int:
        held = [entry for place in (folder.blobs, folder.drafts) for entry in files(place)]
        return 2 * SIZE - sum(entry.size - entry.unwritten for entry in held)

    monkeypatch.setattr(Folder, "free_bytes", free)
    for name in "ab":
        small.read(hub(name))
    used_long_ago(small, "a", "b")
    small.read(hub("c"))
    assert kept(small) == "bc"
    with small.borrowed(20, {}, lora=hub("b")), pytest.raises(CacheFullError) as refusal:
        small.read(hub("large"))
    assert str(refusal.value).endswith(
        f" The disk of the LoRA cache is full: {3 * SIZE} bytes more were asked for, and of its 0 free bytes 0 are to "
        f"stay so. Expected {2 * SIZE} more of them, or a smaller file."
    )


def test_the_weights_of_a_repository_stay_while_its_config_comes(small: Shop) -> None:
    """Without a ref yet, they would be the first to go."""
    weights = safetensors(SIZE, 5)
    small.authority.has(hub("peft"), ("adapter_model.safetensors", weights), ("adapter_config.json", b"{}"))
    for name in "ab":
        small.read(hub(name))
    assert small.read(hub("peft")) == weights


def test_the_two_of_a_request_never_evict_each_other(small: Shop) -> None:
    """K4: there is room for one and a half."""
    small.max_bytes = SIZE * 3 // 2
    small.reopen()
    with pytest.raises(CacheFullError), small.borrowed(20, {}, content_lora=hub("a"), style_lora=hub("b")):
        pass
    small.max_bytes = SIZE * 2
    small.reopen()
    with small.borrowed(20, {}, content_lora=hub("a"), style_lora=hub("b")) as paths:
        assert [path.read_bytes() for path in paths.values()] == [safetensors(SIZE, 0), safetensors(SIZE, 1)]


def test_what_can_find_no_room_is_refused_before_it_is_fetched_and_evicts_nothing(small: Shop) -> None:
    for name in "abc":
        small.read(hub(name))
    served = small.origin.served.total()
    with small.borrowed(20, {}, lora=hub("a")), pytest.raises(CacheFullError) as error:
        small.read(hub("large"))
    assert str(error.value) == (
        f"lora: The LoRA cache is full: {3 * SIZE} bytes more were asked for, and {2 * SIZE} of its {3 * SIZE} "
        "can be had beside the files in use. Expected a smaller file, a larger cache, or, where other requests use "
        "them, another try when these have ended."
    )
    with pytest.raises(CacheFullError):
        small.read(hub("larger"))
    assert kept(small) == "abc"
    assert small.origin.served.total() == served
    assert len(small.read(hub("large"))) == 3 * SIZE
    assert small.store.room.used() == 3 * SIZE
    assert kept(small) == ""


def test_a_time_of_use_in_the_future_does_not_last(small: Shop) -> None:
    """K7."""
    for name in "abc":
        small.read(hub(name))
    used_long_ago(small, "b", "c")
    future = time.time() + 1e6
    os.utime(small.store.refs.path(library.ref_name("hf:someone/a", "public")), (future, future))
    small.read(hub("d"))
    assert kept(small) == "bcd"


def test_a_request_without_a_ref_gives_way_first(small: Shop) -> None:
    small.read(hub("a"))
    used_long_ago(small, "a")
    payload = safetensors(2 * SIZE, 7)
    small.read(Data(sha256(payload), payload))
    small.read(hub("b"))
    assert kept(small) == "ab"


# Scores of files.


def scored(shop: Shop, *files: bytes) -> Path:
    """Scores of these files, as somebody has kept them."""
    place = shop.store.scores([File("k", "n", sha256(file), len(file)) for file in files])
    place.write_text("x" * SIZE)
    return place


def test_scores_count_and_go_with_their_file(small: Shop) -> None:
    for name in "ab":
        small.read(hub(name))
    used_long_ago(small, "a", "b")
    first, second = (scored(small, safetensors(SIZE, seed)) for seed in range(2))
    assert small.store.room.used() == 4 * SIZE  # more than there may be, until the next file comes
    small.read(hub("c"))
    assert (kept(small), first.exists(), second.exists()) == ("bc", False, True)


def test_scores_of_other_files_stay(small: Shop) -> None:
    for name in "ab":
        small.read(hub(name))
    used_long_ago(small, "a", "b")
    first, second = (scored(small, safetensors(SIZE, seed)) for seed in range(2))
    with Deadline(20) as deadline:
        assert small.store.evict(1, deadline) == 2 * SIZE
    assert (kept(small), first.exists(), second.exists()) == ("b", False, True)


def test_scores_of_several_files_go_with_any_of_them(small: Shop) -> None:
    for name in "ab":
        small.read(hub(name))
    used_long_ago(small, "a", "b")
    both = scored(small, safetensors(SIZE, 1), safetensors(SIZE, 0))
    with Deadline(20) as deadline:
        small.store.evict(1, deadline)
    assert (kept(small), both.exists()) == ("b", False)


def test_a_start_clears_away_scores_whose_file_is_gone(small: Shop) -> None:
    for name in "ab":
        small.read(hub(name))
    here, gone = safetensors(SIZE, 0), safetensors(SIZE, 1)
    stay, go, half = scored(small, here), scored(small, gone), scored(small, here, gone)
    small.blob(gone).unlink()
    small.reopen()
    assert (stay.exists(), go.exists(), half.exists()) == (True, False, False)


def test_the_same_files_have_the_same_scores_whatever_they_are_called(small: Shop) -> None:
    small.authority.has(hub("copy"), ("other.safetensors", safetensors(SIZE, 0)))
    references = {"content_lora": hub("a"), "style_lora": hub("copy")}
    with Deadline(20) as deadline, small.library.borrowed(references, {}, deadline) as lent:
        assert lent["content_lora"].scores == lent["style_lora"].scores
        assert not lent["content_lora"].scores.exists()


# A disk that fails.


class Failing:
    """An os call that fails the first few times, from a given call on."""

    def __init__(self, call: Callable[..., object], errno: int, times: int = 10**6, after: int = 0) -> None:
        self.call, self.errno, self.left, self.after = call, errno, times, after

    def __call__(self, *arguments: object, **options: object) -> object:
        self.after -= 1
        if self.after < 0 < self.left:
            self.left -= 1
            raise OSError(self.errno, os.strerror(self.errno))
        return self.call(*arguments, **options)


FAILURES = [("pwrite", 0), ("pwrite", 1)]  # the first bytes, and later ones
FAILURES += [("ftruncate", n) for n in range(3)]  # to reserve, at the file's end, at the ref's
FAILURES += [("fsync", n) for n in range(4)]  # of the file, its folder, the ref, its folder
FULL = [(call, after, 28) for call, after in FAILURES] + [("pwrite", 0, 122), ("pwrite", 0, 27)]  # ENOSPC EDQUOT EFBIG


@pytest.mark.parametrize(("call", "after", "errno"), FULL)
def test_a_disk_that_is_full_leaves_no_half_of_anything(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, call: str, after: int, errno: int
) -> None:
    """K5, at each write."""
    shop.authority.has(hub("long"), ("long.safetensors", safetensors(3 << 19)))
    shop.read(hub("style"))
    shop.read(hub("content"))
    refs = shop.names("refs")
    used_long_ago(shop, "style", "content")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, Failing(getattr(os, call), errno, after=after))
        with pytest.raises(DiskFullError, match=r"^lora: The LoRA cache cannot be written: .*\. Expected a disk"):
            shop.read(hub("long"))
    assert set(shop.names("refs")) <= set(refs)
    assert shop.is_clean()
    assert shop.read(hub("long")) == safetensors(3 << 19)


def test_a_disk_that_is_full_when_only_the_ref_is_missing_is_a_sentence(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K5."""
    whole = os.pwrite

    def pwrite(descriptor: int, data: memoryview, at: int) -> int:
        if bytes(data[:12]) == b'{"reference"':
            raise OSError(28, os.strerror(28))
        return whole(descriptor, data, at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(DiskFullError, match="No space left"):
            shop.read(hub("content"))
    assert shop.names("refs") == []
    assert shop.is_clean()
    assert shop.read(hub("content")) == CONTENT


def test_a_disk_that_is_full_at_the_very_last_leaves_no_ref(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """K5: nothing can be evicted, hence no second try."""
    with shop.borrowed(20, {}, lora=hub("style")), monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Failing(os.fsync, 28, after=3))
        patch.setattr(shop.store, "evict", lambda wanted, deadline: 0)
        with pytest.raises(DiskFullError):
            shop.read(hub("content"))
        assert len(shop.names("refs")) == 1


def test_a_disk_that_is_full_has_the_longest_unused_go_and_is_tried_once_more(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K5."""
    shop.read(hub("style"))
    used_long_ago(shop, "style")
    monkeypatch.setattr(os, "pwrite", Failing(os.pwrite, 28, times=1))
    assert shop.read(hub("content")) == CONTENT
    assert shop.names("blobs") == [sha256(CONTENT)]


def test_a_disk_that_fails_otherwise_is_a_sentence_and_no_broken_connection(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", Failing(os.pwrite, 5))
    with pytest.raises(DiskError, match="Input/output error"):
        shop.read(hub("content"))
    assert shop.origin.served.total() == 1


def test_a_limit_on_the_size_of_files_is_a_sentence(shop: Shop) -> None:
    """K5."""
    most, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, hard))
    try:
        with pytest.raises(DiskFullError, match="File too large"):
            shop.read(hub("content"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    assert shop.is_clean()
    assert shop.read(hub("content")) == CONTENT
