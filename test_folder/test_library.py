"""What the cache lends, to whom, and what it asks and fetches for that. K1 to K12 of the reference's section 6."""

import logging
import os
import resource
import signal
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import cast

import pytest

from klora.cache import CacheFullError, library, refusals
from klora.cache.draft import DiskError, DiskFullError
from klora.cache.refs import Moment
from klora.errors import SourceError
from klora.sources.deadline import Cancelled, Deadline
from klora.sources.download import Denied, NotFound, Unreachable
from klora.sources.kinds import Bare, CivitaiFile, Data, Local, ReplicateModel, Url
from test_folder.lending import Shop, hub, opened_shop, safetensors, sha256

SIZE = 100_000
CONTENT, STYLE = safetensors(SIZE, 1), safetensors(SIZE, 2)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """With a content and a style LoRA to be had by everybody."""
    with opened_shop(tmp_path / "cache") as shop:
        shop.authority.has(hub("content"), ("content.safetensors", CONTENT))
        shop.authority.has(hub("style"), ("style.safetensors", STYLE))
        yield shop


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let so many seconds pass, by both clocks."""

    def pass_(seconds: float) -> None:
        wall, running = time.time, time.monotonic
        monkeypatch.setattr("klora.cache.refs.time", _Clock(lambda: wall() + seconds, lambda: running() + seconds))
        monkeypatch.setattr("klora.cache.refusals.time", _Clock(time.time, lambda: running() + seconds))

    return pass_


class _Clock:
    def __init__(self, wall: Callable[[], float], running: Callable[[], float]) -> None:
        self.time, self.monotonic = wall, running


# What is lent.


def test_both_files_come_under_their_names_and_go_when_given_back(shop: Shop) -> None:
    with shop.borrowed(20, {}, content_lora=hub("content"), style_lora=hub("style")) as paths:
        assert paths["content_lora"].read_bytes() == CONTENT
        assert paths["style_lora"].read_bytes() == STYLE
        assert [paths[name].name for name in ("content_lora", "style_lora")] == [
            "content.safetensors",
            "style.safetensors",
        ]
    assert not any(path.exists() for path in paths.values())
    assert shop.is_clean()


def test_what_is_here_is_lent_without_a_question_and_without_a_download(shop: Shop) -> None:
    """T1."""
    for _ in range(2):
        assert shop.read(hub("content")) == CONTENT
    assert shop.authority.asked.total() == shop.origin.served.total() == 1


def test_a_peft_repository_has_its_config_beside_its_weights(shop: Shop) -> None:
    """H8."""
    files = (("adapter_config.json", b'{"r": 4}'), ("adapter_model.safetensors", CONTENT))
    shop.authority.has(hub("peft"), *files)

    def fetch_json_too(download: object, draft: object, deadline: object) -> str:
        body = dict(files)[download.name]  # type: ignore[attr-defined]
        draft.write(body)  # type: ignore[attr-defined]
        return sha256(body)

    shop.library._fetch = fetch_json_too  # type: ignore[assignment]
    with shop.borrowed(20, {}, lora=hub("peft")) as paths:
        assert paths["lora"].name == "adapter_model.safetensors"
        assert paths["lora"].with_name("adapter_config.json").read_bytes() == b'{"r": 4}'


def test_one_reference_for_both_inputs_is_fetched_once(shop: Shop) -> None:
    with shop.borrowed(20, {}, content_lora=hub("content"), style_lora=hub("content")) as paths:
        assert {path.read_bytes() for path in paths.values()} == {CONTENT}
    assert shop.origin.served.total() == 1


def test_both_are_fetched_at_the_same_time(shop: Shop) -> None:
    together = threading.Barrier(2, timeout=10)
    shop.origin.pause = lambda path: together.wait()
    with shop.borrowed(20, {}, content_lora=hub("content"), style_lora=hub("style")):
        assert not together.broken


def test_a_file_of_the_servers_own_is_not_the_caches(shop: Shop) -> None:
    with pytest.raises(TypeError, match=r"^lora is a file of the server's own"):
        shop.read(Local("x.safetensors"))


def test_each_lora_has_its_line_in_the_log(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "klora.cache"):
        shop.read(hub("content"))
        shop.read(hub("content"))
    assert [record.getMessage().rpartition(",")[0] for record in caplog.records] == [
        f"hf:someone/content: fetched, {SIZE} bytes",
        f"hf:someone/content: hit, {SIZE} bytes",
    ]


def test_what_the_authority_tells_is_kept(shop: Shop) -> None:
    shop.authority.has(hub("told"), ("t.safetensors", CONTENT), base_model="Flux.1 D", triggers=("TOK",))
    shop.read(hub("told"))
    (ref,) = (shop.store.refs.get(name) for name in shop.store.refs.names())
    assert ref
    assert (ref.reference, ref.base_model, ref.triggers) == ("hf:someone/told", "Flux.1 D", ("TOK",))
    assert (ref.files[0].sha256, ref.size) == (sha256(CONTENT), SIZE)


# Data URIs.


def tar_of(name: str, body: bytes) -> bytes:
    file = BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(body)
        tar.addfile(member, BytesIO(body))
    return file.getvalue()


@pytest.mark.parametrize(
    ("payload", "name"), [(CONTENT, "data.safetensors"), (tar_of("lora.safetensors", CONTENT), "data.tar")]
)
def test_what_came_with_the_request_is_lent_and_leaves_no_ref(shop: Shop, payload: bytes, name: str) -> None:
    """D1."""
    for _ in range(2):
        with shop.borrowed(20, {}, lora=Data(sha256(payload), payload)) as paths:
            assert (paths["lora"].name, paths["lora"].read_bytes()) == (name, payload)
    assert shop.names("refs") == []
    assert not shop.authority.asked


def test_a_payload_that_is_damaged_is_refused_and_not_kept(shop: Shop) -> None:
    payload = CONTENT[:-1]
    with pytest.raises(SourceError, match="damaged"):
        shop.read(Data(sha256(payload), payload))
    assert shop.names("blobs") == []
    assert shop.is_clean()


# Scopes.


def signed(secret: str) -> Url:
    return Url("https://host/a.safetensors", f"https://host/a.safetensors?{secret}", secret)


def test_one_users_gated_file_is_not_anothers(shop: Shop) -> None:
    """H1, also after a restart."""
    shop.authority.allowed["hf:someone/content"] = {"A"}
    assert shop.read(hub("content"), hf="A") == CONTENT
    for _ in range(2):
        for tokens in ({}, {"hf": "B"}, {"civitai": "A"}):
            with pytest.raises(Denied):
                shop.read(hub("content"), **tokens)
        shop.reopen()
    assert shop.read(hub("content"), hf="A") == CONTENT
    assert shop.origin.served.total() == 1


def test_a_link_that_was_signed_serves_nobody_with_another_signature(shop: Shop) -> None:
    shop.authority.has(signed(""), ("a.safetensors", CONTENT), sha256=None)
    shop.authority.allowed[str(signed(""))] = {"sig=1"}
    assert shop.read(signed("sig=1")) == CONTENT
    assert shop.read(signed("sig=1")) == CONTENT
    for other in ("", "sig=2"):
        with pytest.raises(Denied):
            shop.read(signed(other))
    assert shop.origin.served.total() == 1


def test_two_signatures_of_one_link_in_one_request_are_both_asked_for(shop: Shop) -> None:
    shop.authority.has(signed(""), ("a.safetensors", CONTENT))
    shop.authority.allowed[str(signed(""))] = {"sig=1"}
    with pytest.raises(Denied), shop.borrowed(20, {}, content_lora=signed("sig=1"), style_lora=signed("sig=2")):
        pass


ASKED = {"hf": hub("x"), "civitai": CivitaiFile(1), "replicate": ReplicateModel("o/n")}


@pytest.mark.parametrize("authority", ASKED)
def test_a_token_counts_for_its_own_authority_only(authority: str) -> None:
    scope = library.scope_of
    others = {name: "t" for name in ASKED if name != authority}
    assert scope(ASKED[authority], others, b"s") == "public"
    own = scope(ASKED[authority], {authority: "t"}, b"s")
    assert own == scope(ASKED[authority], {authority: "t", **others}, b"s")
    assert len({own, "public", scope(ASKED[authority], {authority: "u"}, b"s")}) == 3
    assert own != scope(ASKED[authority], {authority: "t"}, b"other secret")
    assert own != next(scope(one, {name: "t"}, b"s") for name, one in ASKED.items() if name != authority)


def test_a_bare_name_counts_both_tokens_that_it_may_be_asked_with() -> None:
    tokens = [{}, {"hf": "t"}, {"replicate": "t"}, {"hf": "t", "replicate": "t"}, {"hf": "u", "replicate": "t"}]
    assert len({library.scope_of(Bare("o/n"), one, b"s") for one in tokens}) == len(tokens)
    assert library.scope_of(Bare("o/n"), {"civitai": "t"}, b"s") == "public"


def test_an_empty_token_is_none() -> None:
    assert library.scope_of(hub("x"), {"hf": ""}, b"s") == "public"


def test_what_was_asked_for_with_a_foreign_credential_never_becomes_public(shop: Shop) -> None:
    resolve = shop.authority.resolve
    shop.library._resolve = lambda *asked: tuple(replace(one, credential=True) for one in resolve(*asked))
    with pytest.raises(RuntimeError, match="did not bring"):
        shop.read(hub("content"))
    assert shop.names("blobs") == shop.names("refs") == []


def test_the_same_bytes_from_two_places_are_one_blob(shop: Shop) -> None:
    """K8."""
    shop.authority.has(hub("copy"), ("other.safetensors", CONTENT))
    with shop.borrowed(20, {}, content_lora=hub("content")), shop.borrowed(20, {}, style_lora=hub("copy")) as paths:
        assert paths["style_lora"].name == "other.safetensors"
    assert shop.names("blobs") == [sha256(CONTENT)]
    assert shop.origin.served.total() == 1


def test_a_hash_that_the_user_names_selects_no_blob(shop: Shop) -> None:
    """K8: neither theft nor a way to ask whether it is here."""
    shop.authority.allowed["hf:someone/content"] = {"A"}
    shop.read(hub("content"), hf="A")
    for name in ("style", "missing"):
        with pytest.raises(SourceError) as error:
            shop.read(replace(hub(name), pin=sha256(CONTENT)))
        shop.blob(CONTENT).unlink(missing_ok=True)
        with pytest.raises(SourceError) as without:
            shop.read(replace(hub(name), pin=sha256(CONTENT)))
        assert str(without.value) == str(error.value)


def test_a_hash_that_an_authority_names_becomes_no_path(shop: Shop) -> None:
    (shop.root / "victim").write_bytes(b"x")
    shop.authority.has(hub("odd"), ("odd.safetensors", CONTENT), sha256="../victim")
    with pytest.raises(SourceError, match="its sha256 is another"):
        shop.read(hub("odd"))
    assert (shop.root / "victim").read_bytes() == b"x"


# Pins.


@pytest.mark.parametrize("said", [True, False], ids=["known before", "known after"])
def test_a_pin_that_does_not_match_is_refused_and_harms_nobody_else(shop: Shop, said: bool) -> None:
    if not said:
        shop.authority.has(hub("content"), ("content.safetensors", CONTENT), sha256=None)
    wrong = replace(hub("content"), pin="0" * 64)
    with pytest.raises(SourceError) as error:
        shop.read(wrong)
    assert str(error.value) == (
        f"hf:someone/content has the sha256 {sha256(CONTENT)}, and not the pinned {'0' * 64}. "
        "Expected the file that was pinned, or another pin."
    )
    assert shop.origin.served.total() == (0 if said else 1)
    assert shop.read(hub("content")) == CONTENT
    with pytest.raises(SourceError, match="not the pinned"):
        shop.read(wrong)
    assert shop.read(replace(hub("content"), pin=sha256(CONTENT))) == CONTENT
    assert shop.origin.served.total() == 1


# Ten minutes.


@pytest.mark.parametrize(("seconds", "questions"), [(590, 1), (610, 2)])
def test_the_authority_is_asked_again_after_ten_minutes(
    shop: Shop, later: Callable[[float], None], seconds: float, questions: int
) -> None:
    shop.read(hub("content"))
    later(seconds)
    assert shop.read(hub("content")) == CONTENT
    assert shop.read(hub("content")) == CONTENT
    assert shop.authority.asked.total() == questions
    assert shop.origin.served.total() == 1


def test_an_unchanged_file_without_a_known_hash_is_not_fetched_again(
    shop: Shop, later: Callable[[float], None]
) -> None:
    shop.authority.has(hub("content"), ("content.safetensors", CONTENT), sha256=None)
    shop.read(hub("content"))
    later(610)
    assert shop.read(hub("content")) == CONTENT
    assert shop.origin.served.total() == 1


def test_a_new_commit_is_fetched(shop: Shop, later: Callable[[float], None]) -> None:
    """H7."""
    shop.read(hub("content"))
    shop.authority.has(hub("content"), ("content.safetensors", STYLE), commit="2")
    later(610)
    assert shop.read(hub("content")) == STYLE


@pytest.mark.parametrize("tokens", [{}, {"hf": "A"}], ids=["public", "own"])
def test_who_is_no_longer_allowed_is_refused_although_the_file_is_here(
    shop: Shop, later: Callable[[float], None], tokens: dict[str, str]
) -> None:
    """H3; and not by an authority out of reach either."""
    shop.read(hub("content"), **tokens)
    shop.authority.allowed["hf:someone/content"] = set()
    later(610)
    with pytest.raises(Denied):
        shop.read(hub("content"), **tokens)
    shop.authority.down = True
    later(1300)
    with pytest.raises(Unreachable):
        shop.read(hub("content"), **tokens)


def test_what_is_refused_when_it_is_fetched_does_not_serve_later(shop: Shop, later: Callable[[float], None]) -> None:
    shop.read(hub("content"))
    shop.authority.has(hub("content"), ("content.safetensors", STYLE), commit="2")
    shop.origin.files.clear()
    later(610)
    with pytest.raises(NotFound):
        shop.read(hub("content"))
    shop.authority.down = True
    later(1300)
    with pytest.raises(Unreachable):
        shop.read(hub("content"))


def test_what_everybody_may_have_serves_while_its_authority_is_out_of_reach(
    shop: Shop, later: Callable[[float], None], caplog: pytest.LogCaptureFixture
) -> None:
    shop.read(hub("content"))
    shop.authority.down = True
    later(100_000)
    with caplog.at_level(logging.WARNING, "klora.cache"):
        assert shop.read(hub("content")) == CONTENT
    assert "the copy in the cache serves" in caplog.text
    shop.authority.down = False
    shop.authority.has(hub("content"), ("content.safetensors", STYLE), commit="2")
    assert shop.read(hub("content")) == STYLE


def test_what_is_not_for_everybody_does_not_serve_then(shop: Shop, later: Callable[[float], None]) -> None:
    shop.read(hub("content"), hf="A")
    shop.authority.down = True
    later(610)
    with pytest.raises(Unreachable):
        shop.read(hub("content"), hf="A")


@pytest.mark.parametrize(
    ("wall", "running"), [(-5000, 0), (5000, 0), (-5000, 610), (0, -5000), (0, 610)], ids=lambda n: f"{n:+}"
)
def test_clocks_that_jump_make_no_old_word_a_new_one(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, wall: float, running: float
) -> None:
    """K7: put back, put forward, or put back so that ten minutes seem not to have passed; a machine begun again."""
    shop.read(hub("content"))
    clock = _Clock(lambda now=time.time: now() + wall, lambda now=time.monotonic: now() + running)  # type: ignore[misc]
    monkeypatch.setattr("klora.cache.refs.time", clock)
    assert shop.read(hub("content")) == CONTENT
    assert shop.authority.asked.total() == 2
    assert shop.origin.served.total() == 1


# Refusals.


def test_what_was_missing_is_found_half_a_minute_after_it_was_published(
    shop: Shop, later: Callable[[float], None]
) -> None:
    """K9."""
    for _ in range(2):
        with pytest.raises(NotFound, match="There is no hf:someone/new"):
            shop.read(hub("new"))
    shop.authority.has(hub("new"), ("new.safetensors", CONTENT))
    later(29)
    with pytest.raises(NotFound):
        shop.read(hub("new"))
    assert shop.authority.asked.total() == 1
    later(31)
    assert shop.read(hub("new")) == CONTENT


def test_one_users_refusal_blocks_no_other(shop: Shop, later: Callable[[float], None]) -> None:
    """K9."""
    shop.authority.allowed["hf:someone/content"] = {"A"}
    for _ in range(2):
        with pytest.raises(Denied):
            shop.read(hub("content"), hf="B")
    assert shop.read(hub("content"), hf="A") == CONTENT
    assert shop.authority.asked.total() == 2
    shop.authority.allowed["hf:someone/content"] = {"B"}
    later(11)
    assert shop.read(hub("content"), hf="B") == CONTENT


def test_what_is_merely_out_of_reach_is_asked_for_again_at_once(shop: Shop) -> None:
    shop.authority.down = True
    with pytest.raises(Unreachable):
        shop.read(hub("content"))
    shop.authority.down = False
    assert shop.read(hub("content")) == CONTENT


def test_a_file_that_is_no_lora_is_not_fetched_again_at_once(shop: Shop) -> None:
    shop.authority.has(hub("page"), ("page.safetensors", b"<html>" * 100), sha256=None)
    for _ in range(2):
        with pytest.raises(SourceError, match="web page"):
            shop.read(hub("page"))
    assert shop.origin.served.total() == 1
    assert shop.names("blobs") == shop.names("refs") == []
    assert shop.is_clean()


def test_refusals_are_bounded_and_keep_no_frames() -> None:
    kept = refusals.Refusals()
    for n in range(refusals.MAX_REFUSALS + 5):
        with pytest.raises(NotFound), kept.remembering(str(n)):
            raise NotFound("gone")
    assert len(kept._known) == refusals.MAX_REFUSALS
    assert not any(error.__traceback__ for _, error in kept._known.values())
    kept.check("0")
    with pytest.raises(NotFound, match="gone"):
        kept.check(str(refusals.MAX_REFUSALS))


# Single flight.


def test_fifty_threads_fetch_one_file_once(shop: Shop) -> None:
    """K1; the processes are in test_cache_kill.py."""
    with ThreadPoolExecutor(50) as pool:
        assert set(pool.map(lambda _: shop.read(hub("content")), range(50))) == {CONTENT}
    assert shop.origin.served.total() == shop.authority.asked.total() == 1


def test_those_who_wait_share_a_refusal(shop: Shop) -> None:
    def refusal(_: int) -> str:
        with pytest.raises(NotFound) as error:
            shop.read(hub("missing"))
        return str(error.value)

    with ThreadPoolExecutor(20) as pool:
        assert len(set(pool.map(refusal, range(20)))) == 1
    assert shop.authority.asked.total() == 1


def waiting_for_the_body(shop: Shop) -> tuple[threading.Event, threading.Event]:
    """(set when a body is half sent, to be set for it to go on); from then on no body waits."""
    half, go_on = threading.Event(), threading.Event()

    def pause(path: str) -> None:
        half.set()
        go_on.wait(20)

    shop.origin.pause = pause
    return half, go_on


def test_who_waits_for_another_waits_no_longer_than_its_own_deadline(shop: Shop) -> None:
    half, go_on = waiting_for_the_body(shop)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(shop.read, hub("content"))
        assert half.wait(10)
        start = time.monotonic()
        with pytest.raises(Unreachable):
            shop.read(hub("content"), seconds=0.3)
        assert 0.25 < time.monotonic() - start < 1.5
        go_on.set()
        assert first.result() == CONTENT


class Cancellation(BaseException):
    """As Cog raises it in whatever the main thread does."""


@pytest.mark.parametrize("waits", [False, True], ids=["fetching", "waiting for another"])
def test_a_cancelled_request_ends_at_once_and_leaves_nothing_behind(shop: Shop, waits: bool) -> None:
    """K10."""
    half, go_on = waiting_for_the_body(shop)
    other = threading.Thread(target=lambda: shop.read(hub("content")))
    if waits:
        other.start()
        half.wait(10)

    def cancel(*_: object) -> None:
        raise Cancellation

    before = signal.signal(signal.SIGUSR1, cancel)
    threading.Thread(target=lambda: (half.wait(10), time.sleep(0.2), os.kill(os.getpid(), signal.SIGUSR1))).start()
    try:
        with pytest.raises(Cancellation), shop.borrowed(20, {}, a=hub("content"), b=hub("style")):
            pass
    finally:
        signal.signal(signal.SIGUSR1, before)
    if not waits:
        assert shop.is_clean()
    go_on.set()
    start = time.monotonic()
    if waits:
        other.join()
    assert shop.read(hub("content")) == CONTENT
    assert shop.read(hub("style")) == STYLE
    assert time.monotonic() - start < 2
    assert shop.is_clean()


def test_a_cancelled_download_is_no_refusal_for_those_who_waited(shop: Shop) -> None:
    half, go_on = waiting_for_the_body(shop)
    deadline = Deadline(20)
    with ThreadPoolExecutor(2) as pool:

        def first() -> None:
            with shop.library.borrowed({"lora": hub("content")}, {}, deadline):
                pass

        cancelled = pool.submit(first)
        assert half.wait(10)
        second = pool.submit(shop.read, hub("content"))
        time.sleep(0.1)
        deadline.cancel()
        go_on.set()
        with pytest.raises(Cancelled):
            cancelled.result()
        assert second.result() == CONTENT


def test_the_first_failure_ends_the_other_download(shop: Shop) -> None:
    _, go_on = waiting_for_the_body(shop)
    start = time.monotonic()
    with pytest.raises(NotFound), shop.borrowed(20, {}, content_lora=hub("content"), style_lora=hub("missing")):
        pass
    assert time.monotonic() - start < 2
    assert shop.is_clean()
    go_on.set()


# Damage.


def flipped(path: Path) -> None:
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(SIZE // 2)
        byte = file.read(1)[0]
        file.seek(SIZE // 2)
        file.write(bytes([byte ^ 1]))


def cut(path: Path) -> None:
    path.chmod(0o600)
    os.truncate(path, SIZE - 1)


def emptied(path: Path) -> None:
    path.chmod(0o600)
    os.truncate(path, 0)


def linked_elsewhere(path: Path) -> None:
    elsewhere = path.parents[2] / "elsewhere"
    elsewhere.write_bytes(CONTENT)
    path.unlink()
    path.symlink_to(elsewhere)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").write_text("x")


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("said", [True, False], ids=["hash known", "hash unknown"])
@pytest.mark.parametrize("again", [False, True], ids=["same process", "new process"])
@pytest.mark.parametrize("damage", [flipped, cut, emptied, linked_elsewhere, a_folder, a_pipe])
def test_a_damaged_blob_is_found_set_aside_and_fetched_again(
    shop: Shop, damage: Callable[[Path], None], again: bool, said: bool
) -> None:
    """K3."""
    if not said:
        shop.authority.has(hub("content"), ("content.safetensors", CONTENT), sha256=None)
    shop.read(hub("content"))
    damage(shop.blob(CONTENT))
    if again:
        shop.reopen()
    assert shop.read(hub("content")) == CONTENT
    assert len(shop.names("quarantine")) == 1
    assert shop.origin.served.total() == 2
    assert shop.read(hub("content")) == CONTENT
    assert shop.origin.served.total() == 2


def test_a_damaged_blob_does_not_serve_for_an_authority_out_of_reach(
    shop: Shop, later: Callable[[float], None]
) -> None:
    shop.read(hub("content"))
    flipped(shop.blob(CONTENT))
    shop.authority.down = True
    later(610)
    with pytest.raises(Unreachable):
        shop.read(hub("content"))


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'{"files": [], "authorised": [0, 0], "triggers": []}', b"\xff"])
def test_a_damaged_ref_is_none(shop: Shop, text: bytes) -> None:
    shop.read(hub("content"))
    (name,) = shop.names("refs")
    (shop.root / "refs" / name).write_bytes(text)
    assert shop.read(hub("content")) == CONTENT
    assert shop.authority.asked.total() == 2
    assert shop.origin.served.total() == 1


@pytest.mark.parametrize(("part", "value"), [("name", "../../x"), ("name", ".hidden"), ("sha256", "../refs/x")])
def test_a_ref_that_leads_out_of_its_folder_is_none(shop: Shop, part: str, value: str) -> None:
    shop.read(hub("content"))
    (name,) = shop.names("refs")
    path = shop.root / "refs" / name
    was = {"name": "content.safetensors", "sha256": sha256(CONTENT)}[part]
    path.write_text(path.read_text().replace(f'"{was}"', f'"{value}"'))
    assert shop.store.refs.get(path.stem) is None


def test_a_ref_under_another_refs_name_is_none(shop: Shop) -> None:
    shop.authority.allowed["hf:someone/style"] = {"A"}
    shop.read(hub("style"), hf="A")
    (private,) = shop.names("refs")
    public = library.ref_name("hf:someone/style", "public")
    (shop.root / "refs" / private).rename(shop.root / "refs" / f"{public}.json")
    with pytest.raises(Denied):
        shop.read(hub("style"))


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
        f"The LoRA cache is full: {3 * SIZE} bytes more were asked for, and {2 * SIZE} of its {3 * SIZE} can be had "
        "while other requests use the rest. Expected a smaller file, or another try when they have ended."
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
        with pytest.raises(DiskFullError, match=r"^The LoRA cache cannot be written: .*\. Expected a disk with room"):
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


# Secrets.


def test_no_token_and_no_signature_is_in_the_cache_or_in_its_log(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    """X1, for this room."""
    url = signed("X-Amz-Signature=CANARY")
    shop.authority.has(signed(""), ("a.safetensors", STYLE))
    with caplog.at_level(logging.DEBUG):
        shop.read(hub("content"), hf="CANARY")
        shop.read(url, replicate="CANARY")
        with pytest.raises(NotFound) as error:
            shop.read(hub("missing"), hf="CANARY")
    written = b"".join(path.read_bytes() for path in shop.root.rglob("*") if path.is_file())
    names = " ".join(str(path) for path in shop.root.rglob("*"))
    assert b"CANARY" not in written
    assert "CANARY" not in names + caplog.text + str(error.value)


def test_a_moment_is_recent_by_both_clocks_only() -> None:
    now = Moment.now()
    assert now.is_recent(1)
    assert not cast(Moment, now._replace(wall=now.wall - 2)).is_recent(1)
    assert not cast(Moment, now._replace(running=now.running - 2)).is_recent(1)
