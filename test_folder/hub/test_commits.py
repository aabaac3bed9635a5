"""Every form of a Hugging Face reference leads to a file of one commit, known before it is fetched."""

import hashlib

import pytest

from klora.sources.download import Download
from klora.sources.network import Network
from test_folder.fakes import CONTENT, Storage, fetched
from test_folder.fakes.hub import Hub
from test_folder.hub.readers import ANN, Resolve

DIGEST = hashlib.sha256(CONTENT).hexdigest()


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
