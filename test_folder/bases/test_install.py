"""Base models come whole and checked, from a hub on 127.0.0.1, by its client."""

import hashlib
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from klora.bases.install import ensure_base
from klora.bases.table import BASES, Base
from klora.errors import BaseModelError
from test_folder.fakes.base_hub import (
    BASE,
    COMMIT,
    CONFIG,
    FILES,
    GATED,
    INDEX,
    OTHER_COMMIT,
    REPOSITORY,
    SIGNATURE,
    TOKEN,
    UNET,
    VAE,
    Hub,
    Server,
    contents,
)  # fmt: skip

# The table.


def test_the_table_pins_a_commit_of_every_base() -> None:
    revisions = [source.revision for base in BASES.values() for source in base.sources]
    assert not [revision for revision in revisions if not re.fullmatch("[0-9a-f]{40}", revision)]
    assert {name for name, base in BASES.items() if base.gated} == {"flux-dev"}


@pytest.mark.parametrize(
    ("name", "wanted", "unwanted"),
    [
        ("sdxl", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors"),
        ("flux-dev", "transformer/diffusion_pytorch_model-00001-of-00003.safetensors", "flux1-dev.safetensors"),
        ("flux-dev", "tokenizer_2/spiece.model", "ae.safetensors"),
        ("segmenter", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_a_base_wants_the_files_that_are_loaded_and_no_others(name: str, wanted: str, unwanted: str) -> None:
    assert (BASES[name].wants(wanted), BASES[name].wants(unwanted)) == (True, False)


# By the hub's client.


def test_the_wanted_files_come_as_the_hub_has_them(hub: Hub, ensure: Callable[..., Path], tmp_path: Path) -> None:
    assert ensure() == tmp_path / "tiny"
    assert contents(tmp_path / "tiny") == FILES
    assert sorted(hub.fetched()) == sorted(FILES)
    assert {token for *_, token in hub.asked} == {None}


def test_a_fetch_leaves_no_thread_behind(ensure: Callable[..., Path]) -> None:
    before = {thread.ident for thread in threading.enumerate()}
    ensure()
    left = [thread.name for thread in threading.enumerate() if thread.ident not in before]
    assert [name for name in left if "process_request" not in name] == []  # the hub's own, which wait for more


def test_a_second_time_only_the_list_is_asked_for(hub: Hub, ensure: Callable[..., Path]) -> None:
    ensure()
    hub.asked.clear()
    ensure()
    assert hub.asked == [("GET tree", "", None)]


def test_each_file_has_one_line_in_the_log_and_no_line_has_a_signed_address(
    ensure: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ensure()
    lines = [record.getMessage() for record in caplog.records if record.name == "klora.bases.install"]
    assert lines[0] == f"tiny: 4 of 4 files to fetch (0.000 GB) from owner/tiny at {COMMIT}."
    words = [line.split(" in ")[0] for line in lines[1:]]
    assert sorted(words) == sorted(f"tiny: {path}, {len(content)} bytes" for path, content in FILES.items())
    assert all(line.endswith(" s by huggingface_hub.") for line in lines[1:])
    assert any(record.name == "httpx2" and "/storage/" in record.getMessage() for record in caplog.records)
    assert SIGNATURE not in caplog.text
    assert not logging.getLogger("httpx2").filters


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    hub: Hub, ensure: Callable[..., Path], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    hub.broken = {UNET: 1}
    ensure()
    assert (contents(tmp_path / "tiny"), hub.fetched().count(UNET)) == (FILES, 2)
    assert "Trying to resume download" in caplog.text
    assert SIGNATURE not in caplog.text


def test_half_a_base_is_not_installed_and_its_other_half_is_fetched(
    hub: Hub, ensure: Callable[..., Path], refusal: Callable[..., str], tmp_path: Path
) -> None:
    hub.lost = {UNET}
    message = refusal()
    assert message.startswith("tiny cannot be fetched from owner/tiny: ")
    assert message.endswith("What has come stays; the next attempt fetches the rest.")
    assert not (tmp_path / "tiny" / INDEX).exists()
    hub.lost, hub.asked = set(), []
    there = contents(tmp_path / "tiny")
    ensure()
    assert set(hub.fetched()) == set(FILES) - set(there)
    assert contents(tmp_path / "tiny") == FILES


def test_the_index_comes_last(hub: Hub, ensure: Callable[..., Path]) -> None:
    ensure()
    assert hub.fetched()[-1] == INDEX


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b""])
def test_a_complete_base_is_checked_by_sizes(
    hub: Hub, ensure: Callable[..., Path], tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    ensure()
    (tmp_path / "tiny" / VAE).write_bytes(change(FILES[VAE]))
    hub.asked.clear()
    ensure()
    assert (hub.fetched(), contents(tmp_path / "tiny")) == ([VAE], FILES)


def test_without_its_mark_a_base_is_checked_by_sha256(hub: Hub, ensure: Callable[..., Path], tmp_path: Path) -> None:
    """P4: what is there without a mark of success may be anything."""
    ensure()
    (tmp_path / "tiny" / ".cache" / "klora" / "state").unlink()
    (tmp_path / "tiny" / VAE).write_bytes(FILES[VAE][::-1])
    (tmp_path / "tiny" / CONFIG).write_bytes(FILES[CONFIG][::-1])
    hub.asked.clear()
    ensure()
    assert contents(tmp_path / "tiny") == FILES
    assert set(hub.fetched()) == {VAE, CONFIG, INDEX}  # of the small files nothing says of which commit they are


def test_another_commit_replaces_what_has_changed(hub: Hub, ensure: Callable[..., Path], tmp_path: Path) -> None:
    ensure()
    hub.files = hub.files | {VAE: FILES[VAE][::-1], CONFIG: FILES[CONFIG][::-1]}
    hub.asked.clear()
    ensure(replace(BASE, revision=OTHER_COMMIT))
    assert contents(tmp_path / "tiny") == {path: hub.files[path] for path in FILES}
    assert UNET not in hub.fetched()


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_token_goes_to_the_hub_and_never_to_its_storage(
    hub: Hub, ensure: Callable[..., Path], token: str | None
) -> None:
    ensure(BASE, token)
    sent = {
        kind: {seen for k, _, seen in hub.asked if k == kind} for kind in ("GET tree", "HEAD resolve", "GET storage")
    }
    given = {token and f"Bearer {token}"}
    assert sent == {"GET tree": given, "HEAD resolve": given, "GET storage": {None}}


# What goes wrong.


def test_a_size_that_is_not_the_listed_one_is_refused(hub: Hub, refusal: Callable[..., str], tmp_path: Path) -> None:
    hub.listed = {VAE: {"size": len(FILES[VAE]) + 1}}
    assert refusal().startswith(f"{VAE} of tiny came from owner/tiny as {len(FILES[VAE])} bytes with ")
    assert not (tmp_path / "tiny" / VAE).exists()


def test_a_sha256_that_is_not_the_listed_one_is_refused(hub: Hub, refusal: Callable[..., str], tmp_path: Path) -> None:
    hub.listed = {VAE: {"oid": "ab" * 32}}
    seen, size = hashlib.sha256(FILES[VAE]).hexdigest(), len(FILES[VAE])
    assert refusal() == (
        f"{VAE} of tiny came from owner/tiny as {size} bytes with the SHA-256 {seen}. "
        f"Expected {size} bytes with the SHA-256 {'ab' * 32}."
    )
    assert not {VAE, INDEX} & set(contents(tmp_path / "tiny"))


@pytest.mark.parametrize("base", [BASE, GATED])
def test_a_gated_base_without_a_token_says_what_to_do(hub: Hub, refusal: Callable[..., str], base: Base) -> None:
    hub.gated = {REPOSITORY}
    assert refusal(base) == (
        "tiny is gated: accept the licence at huggingface.co/owner/tiny and set HF_TOKEN to a token of the account "
        "that has."
    )


def test_a_token_that_the_hub_does_not_know_is_told_apart_and_the_next_one_is_right(
    hub: Hub, ensure: Callable[..., Path], refusal: Callable[..., str], tmp_path: Path
) -> None:
    hub.gated = {REPOSITORY}
    assert refusal(GATED, "hf_mistyped") == (
        "tiny cannot be fetched: Hugging Face does not know the token in HF_TOKEN. Expected a valid one."
    )
    assert contents(tmp_path) == {}
    ensure(GATED, TOKEN)
    assert contents(tmp_path / "tiny") == FILES


@pytest.mark.parametrize("given", [f"HF_TOKEN={TOKEN}\nOTHER=1", f"a {TOKEN}", f"\u201c{TOKEN}\u201d"])
def test_what_cannot_be_a_token_is_not_repeated(hub: Hub, refusal: Callable[..., str], given: str) -> None:
    """The client quotes a header that it cannot send."""
    assert refusal(GATED, given) == (
        "HF_TOKEN, or the build's secret in its place, holds a space, a line break or a letter that no token has. "
        "Expected the token as it was issued and nothing else."
    )
    assert hub.asked == []


def test_a_line_break_after_a_token_is_none_of_it(ensure: Callable[..., Path], tmp_path: Path) -> None:
    """As secrets have that come of a file."""
    ensure(GATED, f"{TOKEN}\n")
    assert contents(tmp_path / "tiny") == FILES


def test_a_hub_out_of_reach_is_a_sentence(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []  # 23 seconds between the client's tries
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=waits.append))
    with pytest.raises(BaseModelError) as error:
        ensure_base("tiny", BASE, tmp_path, endpoint="http://127.0.0.1:9")
    assert str(error.value) == (
        "tiny cannot be fetched from owner/tiny: [Errno 111] Connection refused. "
        "What has come stays; the next attempt fetches the rest."
    )
    assert waits


@pytest.mark.parametrize("kind", ["resolve", "storage"])
def test_a_refusal_is_told_with_its_address_but_without_the_signature(
    hub: Hub, refusal: Callable[..., str], kind: str
) -> None:
    hub.closed = kind
    message = refusal()
    assert message.startswith("tiny cannot be fetched from owner/tiny: ")
    assert "403 Forbidden" in message and f"/{kind}/" in message


def test_a_commit_that_is_gone_is_a_sentence(refusal: Callable[..., str]) -> None:
    message = refusal(replace(BASE, revision="ab" * 20))
    assert message.startswith("tiny cannot be fetched from owner/tiny: 404 Client Error.")
    assert "\n" not in message


def test_a_repository_with_nothing_of_the_base_is_refused(hub: Hub, refusal: Callable[..., str]) -> None:
    hub.files = {"README.md": b"moved"}
    assert refusal() == f"owner/tiny at {COMMIT} holds nothing of tiny. Expected a diffusers folder."
    assert hub.fetched() == []


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    hub: Hub, refusal: Callable[..., str], tmp_path: Path
) -> None:
    hub.listed = {VAE: {"size": 10**18}}
    message = refusal()
    assert message.startswith(f"tiny needs 1000000000.0 GB more in {tmp_path / 'tiny'}, where ")
    assert message.endswith(" GB are free. Expected a disk with room for its files.")
    assert hub.fetched() == []


def test_a_folder_that_cannot_be_made_is_a_sentence(server: Server, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file")
    with pytest.raises(BaseModelError, match=r"^tiny cannot be written into .*/tiny: Not a directory\. Expected"):
        ensure_base("tiny", BASE, tmp_path / "models", endpoint=server.address)
