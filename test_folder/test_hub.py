"""A Hugging Face reference comes to one file at one commit, for whoever may read it, by the user's token or none."""

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from klora.errors import SourceError
from klora.sources import hub
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, Download, NotFound, Unreachable
from klora.sources.network import Network
from klora.sources.reference import HubFile, parse
from test_folder.fakes import CONTENT, SIGNATURE, Storage, fetched
from test_folder.fakes.hub import Hub

DIGEST = hashlib.sha256(CONTENT).hexdigest()
ANN, BOB = "hf_AnnsCanary", "hf_BobsCanary"

Resolve = Callable[..., tuple[Download, ...]]


@pytest.fixture
def authority(storage: Storage) -> Iterator[Hub]:
    with Hub(storage) as authority:
        authority.tokens_issued = {ANN, BOB}
        yield authority


@pytest.fixture
def resolve(authority: Hub, net: Network) -> Resolve:
    """What a reference, as people write it, comes to."""

    def resolved(text: str, token: str | None = None) -> tuple[Download, ...]:
        reference = parse(text)
        assert isinstance(reference, HubFile)
        with Deadline(10) as deadline:
            return hub.resolve(reference, token, authority.url, net, deadline)

    return resolved


# What is found.


def test_a_file_is_named_by_its_commit_and_known_before_it_is_fetched(authority: Hub, resolve: Resolve) -> None:
    card = {"base_model": ["black-forest-labs/FLUX.1-dev", "other"], "instance_prompt": "a photo of sks"}
    commit = authority.publish("o/m", {"README.md": b"", "x.safetensors": CONTENT}, card=card)
    assert resolve("hf:o/m") == (
        Download(
            key=f"hf:o/m@{commit}/x.safetensors",
            name="x.safetensors",
            url=f"{authority.url}/o/m/resolve/{commit}/x.safetensors",
            size=len(CONTENT),
            sha256=DIGEST,
            base_model="black-forest-labs/FLUX.1-dev",
            triggers=("a photo of sks",),
        ),
    )


@pytest.mark.parametrize(
    "form",
    [
        "hf:o/m@refs/pr/1/a b/x.safetensors",
        "https://huggingface.co/o/m/blob/refs%2Fpr%2F1/a%20b/x.safetensors",
        "https://huggingface.co/o/m/resolve/refs%2Fpr%2F1/a%20b/x.safetensors?download=true",
        "hf.co/o/m/raw/refs%2Fpr%2F1/a%20b/x.safetensors",
        "https://huggingface.co/o/m/tree/refs%2Fpr%2F1/a%20b",
    ],
)
def test_every_web_form_leads_to_the_bytes(
    authority: Hub, resolve: Resolve, storage: Storage, net: Network, form: str
) -> None:
    """H9, H10: and the storage that keeps them, elsewhere, sees no token."""
    authority.publish("o/m", {"x.safetensors": b"of main"})
    commit = authority.publish("o/m", {"a b/x.safetensors": CONTENT, "y.safetensors": b""}, "refs/pr/1", readers={ANN})
    [found] = resolve(form, ANN)
    assert found.key == f"hf:o/m@{commit}/a%20b/x.safetensors"
    assert fetched(found, net) == CONTENT
    assert (authority.tokens(), storage.tokens()) == ({ANN}, set())
    assert [request.path for request in storage.requests] == [f"/o/m/{DIGEST}"]


def test_a_branch_that_moves_is_another_file(authority: Hub, resolve: Resolve) -> None:
    """H7."""
    first = authority.publish("o/m", {"x.safetensors": b"1"})
    [before] = resolve("hf:o/m")
    authority.publish("o/m", {"x.safetensors": b"2"})
    [after], [fixed] = resolve("hf:o/m"), resolve(f"hf:o/m@{first}")
    assert before.key != after.key and before.sha256 != after.sha256
    assert fixed == before


# Which file of a repository.


@pytest.mark.parametrize(
    ("files", "asked", "chosen"),
    [
        (["a.safetensors", "x.bin", "in/b.safetensors"], "hf:o/m", "a.safetensors"),
        (["a.safetensors", "in/b.safetensors"], "hf:o/m/in", "in/b.safetensors"),
        (["a.safetensors", "b.safetensors"], "hf:o/m/b.safetensors", "b.safetensors"),
        (["a.safetensors", "b.tar"], "hf:o/m/b.tar", "b.tar"),
        (["a.safetensors", "lora.safetensors", "pytorch_lora_weights.safetensors"], "hf:o/m", "pytorch_lora_weights."),
        (["a.safetensors", "lora.safetensors", "adapter_model.safetensors"], "hf:o/m", "lora.safetensors"),
        (["a.safetensors", "adapter_model.safetensors"], "hf:o/m", "adapter_model.safetensors"),
        (["in/a.safetensors", "in/lora.safetensors", "a.safetensors"], "hf:o/m/in", "in/lora.safetensors"),
        (["a.safetensors.index.json", "b.safetensors"], "hf:o/m", "b.safetensors"),
    ],
)
def test_the_file_is_the_only_one_or_the_one_that_is_called_so(
    authority: Hub, resolve: Resolve, files: list[str], asked: str, chosen: str
) -> None:
    """H8: one of them, and several."""
    authority.publish("o/m", dict.fromkeys(files, CONTENT))
    [found] = resolve(asked)
    assert found.key.partition("/m@")[2].partition("/")[2].startswith(chosen)


@pytest.mark.parametrize("asked", ["hf:o/m/in", "hf:o/m/in/adapter_model.safetensors"])
def test_pefts_file_comes_with_what_says_its_alpha(authority: Hub, resolve: Resolve, net: Network, asked: str) -> None:
    """H8."""
    config = b'{"lora_alpha": 8}'
    authority.publish("o/m", {"in/adapter_model.safetensors": CONTENT, "in/adapter_config.json": config})
    weights, beside = resolve(asked)
    assert (weights.name, beside.name) == ("adapter_model.safetensors", "adapter_config.json")
    assert (beside.size, beside.sha256) == (len(config), None)
    assert beside.url.endswith("/in/adapter_config.json")


@pytest.mark.parametrize(
    ("files", "asked", "refusal"),
    [
        ([], "hf:o/m", "hf:o/m has no .safetensors file; in its repository there is none."),
        (["pytorch_lora_weights.bin"], "hf:o/m", "pickles are never read"),
        (["a.safetensors"], "hf:o/m/b.safetensors", "in its repository there is 'a.safetensors'."),
        (["in/a.safetensors"], "hf:o/m", "in its repository there is 'in/a.safetensors'."),
    ],
)
def test_a_repository_without_the_file_says_what_it_has(
    authority: Hub, resolve: Resolve, files: list[str], asked: str, refusal: str
) -> None:
    """H8: none, and only .bin."""
    authority.publish("o/m", dict.fromkeys(files, CONTENT))
    with pytest.raises(NotFound) as error:
        resolve(asked)
    assert refusal in str(error.value) and " Expected " in str(error.value)


def test_of_several_files_at_most_twenty_are_listed(authority: Hub, resolve: Resolve) -> None:
    """H8: three, and many."""
    for count, listed in ((3, "'00.safetensors', '01.safetensors', '02.safetensors'. "), (25, "and 5 more. ")):
        authority.publish("o/m", {f"{n:02}.safetensors": CONTENT for n in range(count)})
        with pytest.raises(SourceError, match=f"^hf:o/m has {count} files: ") as error:
            resolve("hf:o/m")
        assert type(error.value) is SourceError
        assert listed in str(error.value) and str(error.value).count(".safetensors'") == min(count, 20)


# Who may read it.


def refused(resolve: Resolve, kind: type[SourceError], text: str, token: str | None) -> str:
    with pytest.raises(kind) as error:
        resolve(text, token)
    assert type(error.value) is kind and error.value.__suppress_context__
    assert not {ANN, BOB} & set(str(error.value).split())
    return str(error.value)


@pytest.mark.parametrize("revision", ["", "@{commit}"])
def test_a_private_repository_is_for_its_readers(authority: Hub, resolve: Resolve, revision: str) -> None:
    """H1: A may; B with none, with another or with a wrong token may not, nor by the commit."""
    commit = authority.publish("o/m", {"x.safetensors": CONTENT}, readers={ANN})
    text = "hf:o/m" + revision.format(commit=commit)
    [found] = resolve(text, ANN)
    assert found.credential and found.headers == {"Authorization": f"Bearer {ANN}"}
    assert ANN not in f"{found!r} {found.key} {found.url}"
    assert "no token was given" in refused(resolve, Denied, text, None)
    assert "the token that was given may not" in refused(resolve, Denied, text, "hf_wrong")
    refused(resolve, NotFound, text, BOB)


@pytest.mark.parametrize(("token", "seen"), [(None, "no token was given"), (BOB, "the token that was given may not")])
def test_a_gated_repository_says_to_accept_its_licence(
    authority: Hub, resolve: Resolve, token: str | None, seen: str
) -> None:
    """H2."""
    authority.publish("o/m", {"x.safetensors": CONTENT}, readers={ANN}, gated=True)
    sentence = refused(resolve, Denied, "hf:o/m", token)
    assert seen in sentence and "accepted the licence at huggingface.co/o/m." in sentence
    [found] = resolve("hf:o/m", ANN)
    assert found.credential


def test_a_gated_repository_with_a_new_name_is_as_gated_under_its_old_one(
    authority: Hub, resolve: Resolve, net: Network
) -> None:
    authority.publish("o/new", {"x.safetensors": CONTENT}, readers={ANN}, gated=True)
    authority.renamed["o/old"] = "o/new"
    [found] = resolve("hf:o/old", ANN)
    assert fetched(found, net) == CONTENT
    refused(resolve, Denied, "hf:o/old", BOB)


def test_a_token_that_is_withdrawn_is_refused_the_next_time(authority: Hub, resolve: Resolve) -> None:
    """H3, as far as asking again finds it: from a public repository, a private one, and a gated one."""
    authority.publish("o/public", {"x.safetensors": CONTENT})
    for gated in (False, True):
        authority.publish("o/m", {"x.safetensors": CONTENT}, readers={ANN}, gated=gated)
        assert resolve("hf:o/m", ANN)
        authority.repositories["o/m"].readers = set()
        with pytest.raises((Denied, NotFound)):
            resolve("hf:o/m", ANN)
    authority.tokens_issued.remove(ANN)
    refused(resolve, Denied, "hf:o/public", ANN)


def test_the_machines_own_token_is_never_used(
    authority: Hub, resolve: Resolve, net: Network, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """H4: not from the environment, not from a login, not from .netrc."""
    host = authority.host.partition(":")[0]
    (tmp_path / "token").write_text(ANN)
    (tmp_path / ".netrc").write_text(f"machine {host} login me password {ANN}\n")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.setenv(name, ANN)
    for name in ("HF_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    authority.publish("o/private", {"x.safetensors": CONTENT}, readers={ANN})
    authority.publish("o/public", {"x.safetensors": CONTENT})
    refused(resolve, Denied, "hf:o/private", None)
    [found] = resolve("hf:o/public", None)
    assert fetched(found, net) == CONTENT
    assert not found.credential and not found.headers
    assert authority.requests and not authority.tokens()


def test_two_users_at_once_get_what_each_may_read(authority: Hub, resolve: Resolve, tmp_path: Path) -> None:
    """H11: nothing is kept between calls."""
    for owner, token in (("ann", ANN), ("bob", BOB)):
        authority.publish(f"{owner}/m", {"x.safetensors": CONTENT}, readers={token})
    found: list[str | None] = []

    def ask(text: str, token: str) -> None:
        for _ in range(5):
            found.extend(download.headers["Authorization"] for download in resolve(text, token))

    threads = [threading.Thread(target=ask, args=args) for args in (("hf:ann/m", ANN), ("hf:bob/m", BOB))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, found)) == [f"Bearer {ANN}"] * 5 + [f"Bearer {BOB}"] * 5
    by_path = {request.path.split("/")[3]: request.token for request in authority.requests}
    assert by_path == {"ann": ANN, "bob": BOB}


@pytest.mark.parametrize("token", ["hf_Canary\r\nX-Other: 1", "hf_Canary é", "hf_Canary hf_Canary", "h" * 1001])
def test_what_cannot_be_a_token_is_sent_nowhere_and_not_repeated(authority: Hub, resolve: Resolve, token: str) -> None:
    with pytest.raises(Denied, match=r"^The token for Hugging Face holds ") as error:
        resolve("hf:o/m", token)
    assert "Canary" not in str(error.value) and "hhhh" not in str(error.value)
    assert not authority.requests


@pytest.mark.parametrize("token", ["", "  ", f" {ANN}\n"])
def test_space_around_a_token_is_none_of_it(authority: Hub, resolve: Resolve, token: str) -> None:
    authority.publish("o/m", {"x.safetensors": CONTENT})
    [found] = resolve("hf:o/m", token)
    assert found.headers == ({"Authorization": f"Bearer {ANN}"} if token.strip() else {})
    assert found.credential == bool(token.strip())


def test_nothing_of_a_token_or_a_signed_link_is_logged(
    authority: Hub, resolve: Resolve, net: Network, caplog: pytest.LogCaptureFixture
) -> None:
    """X1."""
    caplog.set_level(logging.DEBUG)
    authority.publish("o/m", {"x.safetensors": CONTENT}, readers={ANN}, gated=True)
    fetched(resolve("hf:o/m", ANN)[0], net)
    refused(resolve, Denied, "hf:o/m", BOB)
    assert "fetched" in caplog.text
    assert "Canary" not in caplog.text and SIGNATURE not in caplog.text


# What goes wrong.


@pytest.mark.parametrize("text", ["hf:o/nowhere", "hf:o/m@nowhere"])
def test_what_is_not_there_is_said_to_be_so(authority: Hub, resolve: Resolve, text: str) -> None:
    authority.publish("o/m", {"x.safetensors": CONTENT})
    assert refused(resolve, NotFound, text, ANN).startswith(f"{text} is not on Hugging Face")


def test_a_hub_that_fails_is_asked_again_and_then_unreachable(authority: Hub, resolve: Resolve) -> None:
    authority.failing = 503
    with pytest.raises(Unreachable):
        resolve("hf:o/m")
    assert len(authority.requests) > 1


@pytest.mark.parametrize("claim", [{"sha256": "0" * 64, "size": 1, "pointerSize": 1}, None], ids=["H5", "H6"])
def test_bytes_that_are_not_what_the_hub_says_are_refused(
    authority: Hub, resolve: Resolve, net: Network, claim: dict[str, Any] | None
) -> None:
    claims: dict[str, Any] = {"lfs": claim} if claim else {"size": len(CONTENT) + 1}
    authority.publish("o/m", {"x.safetensors": CONTENT}, claims={"x.safetensors": claims})
    [found] = resolve("hf:o/m")
    with pytest.raises(SourceError, match=r"sha256 is another|bytes long"):
        fetched(found, net)


@pytest.mark.parametrize("told", [{"size": "many"}, {"lfs": "none"}, {"lfs": [1]}])
def test_an_answer_that_makes_no_sense_is_the_hubs_fault(
    authority: Hub, resolve: Resolve, told: dict[str, Any]
) -> None:
    authority.publish("o/m", {"x.safetensors": CONTENT}, claims={"x.safetensors": told})
    with pytest.raises(Unreachable, match=r"^Hugging Face gave an answer that cannot be understood"):
        resolve("hf:o/m")


@pytest.mark.parametrize("card", [None, [], "text", {"base_model": 3, "instance_prompt": {}}, {"base_model": [None]}])
def test_a_card_that_makes_no_sense_says_nothing(authority: Hub, resolve: Resolve, card: Any) -> None:
    authority.publish("o/m", {"x.safetensors": CONTENT}, card=card)
    [found] = resolve("hf:o/m")
    assert (found.base_model, found.triggers) == (None, ())


@pytest.mark.parametrize(
    ("path", "name"),
    {
        "ünï cödé.safetensors": "n_c_d_.safetensors",
        f"{'x' * 100}.safetensors": f"{'x' * 68}.safetensors",
        ".hidden.safetensors": "hidden.safetensors",
        "a/-rf;$(x).safetensors": "rf_x_.safetensors",
    }.items(),
)
def test_a_name_is_plain_whatever_the_file_is_called(
    authority: Hub, resolve: Resolve, net: Network, path: str, name: str
) -> None:
    authority.publish("o/m", {path: CONTENT})
    [found] = resolve(str(HubFile("o/m", path=path)))
    assert found.name == name
    assert fetched(found, net) == CONTENT
