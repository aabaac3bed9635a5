"""What the cache lends, once for all who want it, under which names. Keys of the reference's section 6."""

import logging
import threading
from dataclasses import replace

import pytest

from klora.errors import SourceError
from klora.sources.deadline import Deadline
from klora.sources.download import NotFound
from klora.sources.kinds import Data
from test_folder.fakes import tarred
from test_folder.lending import CONTENT, SIZE, STYLE, Shop, hub, sha256, signed

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


@pytest.mark.parametrize(
    ("lora", "beside"),
    [
        (("adapter_model.safetensors", CONTENT), ("adapter_config.json", b'{"r": 4}')),
        (("dog.safetensors", CONTENT), ("dog_emb.safetensors", STYLE)),
        (("dog.tar", tarred({"lora.safetensors": CONTENT})), ("dog_emb.safetensors", STYLE)),
    ],
)
def test_what_a_repository_has_beside_its_lora_lies_beside_it(
    shop: Shop, lora: tuple[str, bytes], beside: tuple[str, bytes]
) -> None:
    """H8."""
    shop.authority.has(hub("two"), lora, beside)
    with shop.borrowed(20, {}, lora=hub("two")) as paths:
        assert (paths["lora"].name, paths["lora"].read_bytes()) == lora
        assert paths["lora"].with_name(beside[0]).read_bytes() == beside[1]


def test_a_pin_is_of_the_lora_and_not_of_what_lies_beside_it(shop: Shop) -> None:
    shop.authority.has(hub("two"), ("dog.safetensors", CONTENT), ("dog_emb.safetensors", STYLE))
    for _ in range(2):
        assert shop.read(replace(hub("two"), pin=sha256(CONTENT))) == CONTENT
    assert shop.authority.asked.total() == 1
    with pytest.raises(SourceError, match="sha256"):
        shop.read(replace(hub("two"), pin=sha256(STYLE)))


def test_one_reference_for_both_inputs_is_fetched_once(shop: Shop) -> None:
    with shop.borrowed(20, {}, content_lora=hub("content"), style_lora=hub("content")) as paths:
        assert {path.read_bytes() for path in paths.values()} == {CONTENT}
    assert shop.origin.served.total() == 1


def test_both_are_fetched_at_the_same_time(shop: Shop) -> None:
    together = threading.Barrier(2, timeout=10)
    shop.origin.pause = lambda path: together.wait()
    with shop.borrowed(20, {}, content_lora=hub("content"), style_lora=hub("style")):
        assert not together.broken


def test_each_lora_has_its_line_in_the_log(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "klora.cache"):
        shop.read(hub("content"))
        shop.read(hub("content"))
    assert [record.getMessage().rpartition(",")[0] for record in caplog.records] == [
        f"hf:someone/content: fetched, {SIZE} bytes",
        f"hf:someone/content: hit, {SIZE} bytes",
    ]


TOLD = {"base_model": "Flux.1 D", "triggers": ("TOK", "in a style")}


def test_what_the_authority_tells_is_kept_lent_and_logged(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    shop.authority.has(hub("told"), ("t.safetensors", CONTENT), **TOLD)
    caplog.set_level(logging.INFO, "klora.cache")
    for _ in range(2):  # fetched, and from the cache of another process
        with Deadline(20) as deadline, shop.library.borrowed({"lora": hub("told")}, {}, deadline) as lent:
            assert (lent["lora"].triggers, lent["lora"].base) == (TOLD["triggers"], "flux-dev")
        assert caplog.messages[-1] == (
            "hf:someone/told: made for 'Flux.1 D', called by 'TOK', 'in a style', as its page says"
        )
        shop.reopen()
    (ref,) = (shop.store.refs.get(name) for name in shop.store.refs.names())
    assert ref
    assert {"base_model": ref.base_model, "triggers": ref.triggers} == TOLD
    assert (ref.reference, ref.files[0].sha256, ref.size) == ("hf:someone/told", sha256(CONTENT), SIZE)


@pytest.mark.parametrize(
    ("said", "bases", "fits"),
    [
        ("Flux.1 D", {"sdxl": "sdxl"}, False),
        ("Flux.1 D", {"sdxl": "sdxl", "flux-dev": "flux"}, True),
        ("Flux.1 D", {}, True),
        ("SD 1.5", {"sdxl": "sdxl", "flux-dev": "flux"}, False),
        ("SDXL 1.0", {"sdxl": "sdxl"}, True),
        ("Other", {"sdxl": "sdxl"}, True),
        (None, {"sdxl": "sdxl"}, True),
    ],
)
def test_what_is_surely_for_none_of_a_requests_bases_is_refused_before_it_is_fetched(
    shop: Shop, said: str | None, bases: dict[str, str], fits: bool
) -> None:
    """C9; also when it is here already, for then it was fetched for another request."""
    shop.authority.has(hub("told"), ("t.safetensors", CONTENT), base_model=said)

    def read(bases: dict[str, str]) -> bytes:
        with Deadline(20) as deadline, shop.library.borrowed({"lora": hub("told")}, {}, deadline, bases) as lent:
            return lent["lora"].path.read_bytes()

    for fetched in (0, 1):
        if fits:
            assert read(bases) == CONTENT
        else:
            with pytest.raises(SourceError) as error:
                read(bases)
            assert str(error.value) == (
                f"lora: hf:someone/told was made for {said!r}, as its page says. "
                f"Expected a LoRA for {' or '.join(bases)}."
            )
            assert shop.origin.served.total() == fetched and shop.is_clean()
        assert read({}) == CONTENT


# Data URIs.


@pytest.mark.parametrize(
    ("payload", "name"), [(CONTENT, "data.safetensors"), (tarred({"lora.safetensors": CONTENT}), "data.tar")]
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


# Pins.


@pytest.mark.parametrize("said", [True, False], ids=["known before", "known after"])
def test_a_pin_that_does_not_match_is_refused_and_harms_nobody_else(shop: Shop, said: bool) -> None:
    if not said:
        shop.authority.has(hub("content"), ("content.safetensors", CONTENT), sha256=None)
    wrong = replace(hub("content"), pin="0" * 64)
    with pytest.raises(SourceError) as error:
        shop.read(wrong)
    assert str(error.value) == (
        f"lora: hf:someone/content has the sha256 {sha256(CONTENT)}, and not the pinned {'0' * 64}. "
        "Expected the file that was pinned, or another pin."
    )
    assert shop.origin.served.total() == (0 if said else 1)
    assert shop.read(hub("content")) == CONTENT
    with pytest.raises(SourceError, match="not the pinned"):
        shop.read(wrong)
    assert shop.read(replace(hub("content"), pin=sha256(CONTENT))) == CONTENT
    assert shop.origin.served.total() == 1


def test_a_pin_of_the_file_that_is_here_asks_for_nothing(shop: Shop) -> None:
    for pin in (None, sha256(CONTENT)):
        assert shop.read(replace(hub("content"), pin=pin)) == CONTENT
    assert shop.authority.asked.total() == 1


@pytest.mark.parametrize("said", [True, False], ids=["known before", "known after"])
def test_a_pin_of_a_later_file_asks_for_it_at_once(shop: Shop, said: bool) -> None:
    """Who replaces a file and pins the new one does not wait until the authority's word on the old one is old."""
    assert shop.read(hub("content")) == CONTENT
    told = {} if said else {"sha256": None}
    shop.authority.has(hub("content"), ("content.safetensors", STYLE), commit="2", **told)
    assert shop.read(hub("content")) == CONTENT
    assert shop.read(replace(hub("content"), pin=sha256(STYLE))) == STYLE
    assert shop.read(hub("content")) == STYLE
    assert shop.authority.asked.total() == shop.origin.served.total() == 2
    with pytest.raises(SourceError, match="not the pinned"):
        shop.read(replace(hub("content"), pin=sha256(CONTENT)))


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
