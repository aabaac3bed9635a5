"""A file in the request itself, as a data URI, is known by its content, or refused and not repeated."""

import io
import tarfile
from base64 import b64encode
from hashlib import sha256

import pytest

from klora.sources.kinds import Data
from klora.sources.reference import MAX_DATA_CHARACTERS, parse
from test_folder.references.parsing import PIN, refusal

SAFETENSORS = (2).to_bytes(8, "little") + b"{}"


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("lora.safetensors")
        member.size = len(SAFETENSORS)
        archive.addfile(member, io.BytesIO(SAFETENSORS))
    return file.getvalue()


def data(content: bytes, kind: str = "application/octet-stream") -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"


@pytest.mark.parametrize("content", [SAFETENSORS, tar()], ids=["safetensors", "tar"])
@pytest.mark.parametrize("kind", ["application/octet-stream", "", "text/plain;charset=utf-8"])
def test_a_data_uri_is_known_by_what_is_in_it(content: bytes, kind: str) -> None:
    """D1."""
    found = parse(data(content, kind))
    assert isinstance(found, Data)
    assert found.payload == content
    assert str(found) == f"data:{sha256(content).hexdigest()}"
    assert found == parse(data(content).replace("data:", " DATA:")) and "payload" not in repr(found)


def test_a_data_uri_is_held_against_its_pin() -> None:
    digest = sha256(SAFETENSORS).hexdigest()
    assert parse(f"{data(SAFETENSORS)}#sha256={digest}").pin == digest
    assert "its sha256 is not the one" in refusal(f"{data(SAFETENSORS)}#sha256={PIN}")


ENCODED = b64encode(tar()).decode()


@pytest.mark.parametrize(
    ("text", "why"),
    {
        "data:": "not in base64",
        "data:;base64": "not in base64",
        f"data:application/octet-stream,{ENCODED}": "not in base64",
        "data:;base64,": "looks like an empty file",
        f"data:;base64,{ENCODED[:-1]}": "damaged",
        f"data:;base64,{ENCODED}=": "damaged",
        f"data:;base64,{ENCODED[:8]} {ENCODED[8:]}": "damaged",
        f"data:;base64,{ENCODED[:8]}-{ENCODED[9:]}": "damaged",
        f"data:;base64,{ENCODED[:8]}é{ENCODED[9:]}": "damaged",
        f"data:;base64,%{ENCODED}": "damaged",
        f"data:;base64,data:;base64,{ENCODED}": "damaged",
        data(b"<html>"): "looks like a web page",
        data(b"\x80\x02cos\nsystem"): "looks like a pickle",
    }.items(),
)
def test_a_data_uri_that_is_damaged_or_something_else_is_refused_and_not_repeated(text: str, why: str) -> None:
    """D2."""
    sentence = refusal(text)
    assert why in sentence and sentence.startswith("'data:...' cannot be used: ")
    assert ENCODED[:12] not in sentence


def test_a_data_uri_above_its_bound_is_refused_before_it_is_decoded() -> None:
    """D2, 200 MB, of what would be refused for another reason if it were."""
    assert f"Expected at most {MAX_DATA_CHARACTERS}." in refusal("data:;base64," + "!" * (200 << 20))
