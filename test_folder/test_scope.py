"""For whom a fetched file is, and for how long an authority's word holds, its refusals too."""

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest

from klora.cache import library, refusals
from klora.cache.refs import Moment
from klora.errors import SourceError
from klora.sources.download import Denied, NotFound, Unreachable
from klora.sources.kinds import Bare, CivitaiFile, ReplicateModel
from test_folder.lending import CONTENT, STYLE, Clock, Shop, hub, sha256, signed

# Scopes.


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
    [ref] = (shop.root / "refs").iterdir()
    os.utime(ref, (0, 0))
    shop.authority.down = True
    later(100_000)
    with caplog.at_level(logging.WARNING, "klora.cache"):
        assert shop.read(hub("content")) == CONTENT
    assert "the copy in the cache serves" in caplog.text
    assert shop.store.refs.last_use(ref.stem) > 0
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
    clock = Clock(lambda now=time.time: now() + wall, lambda now=time.monotonic: now() + running)  # type: ignore[misc]
    monkeypatch.setattr("klora.cache.refs.time", clock)
    assert shop.read(hub("content")) == CONTENT
    assert shop.authority.asked.total() == 2
    assert shop.origin.served.total() == 1


def test_a_moment_is_recent_by_both_clocks_only() -> None:
    now = Moment.now()
    assert now.is_recent(1)
    assert not cast(Moment, now._replace(wall=now.wall - 2)).is_recent(1)
    assert not cast(Moment, now._replace(running=now.running - 2)).is_recent(1)


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
    for name in ("5", "another"):  # the oldest again, so that it is the newest but one
        with pytest.raises(NotFound), kept.remembering(name):
            raise NotFound("gone")
    with pytest.raises(NotFound, match="gone"):
        kept.check("5")
