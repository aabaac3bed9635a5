"""Every spelling of a reference comes to one value; what cannot be fetched, or hides something, is refused."""

import io
import tarfile
from base64 import b64encode
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from klora.errors import SourceError
from klora.sources.reference import (
    MAX_CHARACTERS,
    MAX_DATA_CHARACTERS,
    Bare,
    CivitaiFile,
    Data,
    HubFile,
    Local,
    ReplicateModel,
    Url,
    parse,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VERSION = "6f7a773af6fc3e8de9d5a3c00be77c17308914bf67772726aff83496ba1e3bbe"
PIN = "ab" * 32
SAFETENSORS = (2).to_bytes(8, "little") + b"{}"


def refusal(text: str) -> str:
    with pytest.raises(SourceError) as error:
        parse(text)
    return str(error.value)


def tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("lora.safetensors")
        member.size = len(SAFETENSORS)
        archive.addfile(member, io.BytesIO(SAFETENSORS))
    return file.getvalue()


def data(content: bytes, kind: str = "application/octet-stream") -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"


# What each form means.

ROOT = HubFile("o/m")
FILE = HubFile("o/m", "main", "x.safetensors")
DEEP = HubFile("o/m", "main", "a b/x.safetensors")
PULL = HubFile("o/m", "refs/pr/1", "x.safetensors")

HUB = {
    "hf:o/m": ROOT,
    "HF:o/m": ROOT,
    "hf://o/m": ROOT,
    "hf:o/m/": ROOT,
    "hf:o/m@main": ROOT,
    "hf:o/m@v1.0": HubFile("o/m", "v1.0"),
    f"hf:o/m@{COMMIT}/x.safetensors": HubFile("o/m", COMMIT, "x.safetensors"),
    "hf:o/m/x.safetensors": FILE,
    "hf:o/m//x.safetensors": FILE,
    "hf://o/m@main/x.safetensors": FILE,
    "hf://o/m@refs/pr/1/x.safetensors": PULL,
    "hf:o/m@refs%2Fpr%2F1/x.safetensors": PULL,
    "hf:o/m/a b/x.safetensors": DEEP,
    "hf:o/m/a%20b/x.safetensors": DEEP,
    "hf:o/m/a@b": HubFile("o/m", "main", "a@b"),
    "https://huggingface.co/o/m": ROOT,
    "https://huggingface.co/o/m/": ROOT,
    "https://huggingface.co/o/m?x=1": ROOT,
    "https://huggingface.co/o/m/tree/main": ROOT,
    "https://huggingface.co/o/m/tree/main/": ROOT,
    "https://huggingface.co/o/m/tree/v2/sub/folder": HubFile("o/m", "v2", "sub/folder"),
    "https://huggingface.co/o/m/blob/main/x.safetensors": FILE,
    "https://huggingface.co/o/m/resolve/main/x.safetensors": FILE,
    "https://huggingface.co/o/m/resolve/main/x.safetensors?download=true": FILE,
    "https://huggingface.co/o/m/raw/main/x.safetensors": FILE,
    "https://huggingface.co/o/m/blame/main/x.safetensors": FILE,
    "https://huggingface.co/o/m/resolve/main/a%20b/x.safetensors": DEEP,
    "https://huggingface.co/o/m/blob/refs%2Fpr%2F1/x.safetensors": PULL,
    "https://huggingface.co/o/m/blob/refs/pr/1/x.safetensors": PULL,
    "https://huggingface.co/o/m/blob/feature%2Fnew/x.safetensors": HubFile("o/m", "feature/new", "x.safetensors"),
    "http://huggingface.co/o/m": ROOT,
    "HTTPS://HuggingFace.co/o/m": ROOT,
    "https://www.huggingface.co/o/m": ROOT,
    "https://huggingface.co:443/o/m": ROOT,
    "huggingface.co/o/m": ROOT,
    "huggingface.co/o/m/blob/main/x.safetensors": FILE,
    "hf.co/o/m": ROOT,
    "https://hf.co/o/m/resolve/main/x.safetensors": FILE,
    "  hf:o/m \n": ROOT,
}

CIVITAI = {
    "civitai:290640": CivitaiFile(290640),
    "civitai:0290640": CivitaiFile(290640),
    "civitai:257749@290640": CivitaiFile(290640),
    "civitai:290640+7": CivitaiFile(290640, file=7),
    "civitai:290640?size=pruned&fp=fp16": CivitaiFile(290640, size="pruned", fp="fp16"),
    "civitai:models/257749": CivitaiFile(model=257749),
    "https://civitai.com/models/257749": CivitaiFile(model=257749),
    "civitai.com/models/257749": CivitaiFile(model=257749),
    "https://civitai.com/models/257749/pony-style-xl": CivitaiFile(model=257749),
    "https://civitai.com/models/257749?modelVersionId=290640": CivitaiFile(290640),
    "https://civitai.com/models/257749/pony-style-xl?modelVersionId=290640": CivitaiFile(290640),
    "https://civitai.green/models/257749/a/?modelVersionId=290640": CivitaiFile(290640),
    "https://civitai.red/models/257749": CivitaiFile(model=257749),
    "https://www.civitai.com/models/257749": CivitaiFile(model=257749),
    "https://civitai.com/api/download/models/290640": CivitaiFile(290640),
    "civitai.com/api/download/models/290640": CivitaiFile(290640),
    "https://civitai.com/api/download/models/290640?type=Model&format=SafeTensor&size=full&fp=fp16": CivitaiFile(
        290640, size="full", fp="fp16"
    ),
    "https://civitai.com/api/v1/model-versions/290640": CivitaiFile(290640),
    "https://civitai.com/api/v1/models/257749": CivitaiFile(model=257749),
    "urn:air:sdxl:lora:civitai:257749@290640": CivitaiFile(290640),
    "air:sdxl:lora:civitai:257749@290640": CivitaiFile(290640),
    "sdxl:lora:civitai:257749@290640": CivitaiFile(290640),
    "URN:AIR:flux1:LORA:civitai:257749@290640": CivitaiFile(290640),
    "urn:air:sdxl:lora:civitai:257749": CivitaiFile(model=257749),
    "urn:air:sdxl:lycoris:civitai:257749@290640+7.safetensors": CivitaiFile(290640, file=7),
}

REPLICATE = {
    "replicate:o/m": ReplicateModel("o/m"),
    f"replicate:o/m:{VERSION}": ReplicateModel("o/m", VERSION),
    f"o/m:{VERSION}": ReplicateModel("o/m", VERSION),
    f"o/m/{VERSION}": ReplicateModel("o/m", VERSION),
    f"o/m/versions/{VERSION}": ReplicateModel("o/m", VERSION),
    "https://replicate.com/o/m": ReplicateModel("o/m"),
    "https://replicate.com/o/m?input=json": ReplicateModel("o/m"),
    "replicate.com/o/m/": ReplicateModel("o/m"),
    "https://replicate.com/o/m/_weights": ReplicateModel("o/m"),
    f"https://replicate.com/o/m:{VERSION}": ReplicateModel("o/m", VERSION),
    f"replicate.com/o/m:{VERSION}": ReplicateModel("o/m", VERSION),
    f"https://replicate.com/o/m/versions/{VERSION}": ReplicateModel("o/m", VERSION),
    f"https://replicate.com/o/m/versions/{VERSION}/_weights": ReplicateModel("o/m", VERSION),
    f"https://replicate.com/o/m/{VERSION}": ReplicateModel("o/m", VERSION),
    "owner/name": Bare("owner/name"),
    "my_name-1/SDXL.v2_lora": Bare("my_name-1/SDXL.v2_lora"),
}

LOCAL = {
    "x.safetensors": Local("x.safetensors"),
    "./x.safetensors": Local("x.safetensors"),
    "a/b/x.safetensors": Local("a/b/x.safetensors"),
    "o/x.safetensors": Local("o/x.safetensors"),
    "a/./b//x.tar": Local("a/b/x.tar"),
    "./folder/without suffix": Local("folder/without suffix"),
    "X.SafeTensors": Local("X.SafeTensors"),
    "./a:b": Local("a:b"),
    "evil.com/x.safetensors": Local("evil.com/x.safetensors"),
}


@pytest.mark.parametrize(("text", "meant"), {**HUB, **CIVITAI, **REPLICATE, **LOCAL}.items())
def test_every_form_is_understood(text: str, meant: object) -> None:
    """H9, C1, C2, C3."""
    assert parse(text) == meant


URLS = {
    "https://example.com/x.safetensors": "https://example.com/x.safetensors",
    "HTTPS://Example.COM:443/X.bin.safetensors": "https://example.com/X.bin.safetensors",
    "https://example.com:8443/x": "https://example.com:8443/x",
    "http://127.0.0.1:80/x": "http://127.0.0.1/x",
    "https://[2606:4700::1111]:444/x": "https://[2606:4700::1111]:444/x",
    "https://example.com": "https://example.com/",
    "https://example.com/a b/ü.tar": "https://example.com/a%20b/%C3%BC.tar",
    "https://example.com/a%20b": "https://example.com/a%20b",
    "https://example.com/x?b=2&a=1&a=0": "https://example.com/x?a=1&a=0&b=2",
    "https://evil.example/x?y=https://huggingface.co/o/m": "https://evil.example/x?y=https://huggingface.co/o/m",
    "https://weights.replicate.delivery/default/a/x.tar": "https://weights.replicate.delivery/default/a/x.tar",
    "replicate.delivery/pbxt/a/trained_model.tar": "https://replicate.delivery/pbxt/a/trained_model.tar",
    "https://cdn-lfs.huggingface.co/a/b": "https://cdn-lfs.huggingface.co/a/b",
}


@pytest.mark.parametrize(("text", "canonical"), URLS.items())
def test_an_address_that_is_nobodys_page_is_a_url(text: str, canonical: str) -> None:
    url = parse(text)
    assert isinstance(url, Url)
    assert (str(url), url.secret) == (canonical, "")


@pytest.mark.parametrize("text", [*HUB, *CIVITAI, *REPLICATE, *LOCAL, *URLS])
def test_what_is_written_again_means_the_same(text: str) -> None:
    reference = parse(text)
    assert parse(str(reference)) == reference
    assert str(parse(str(reference))) == str(reference)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("hf:o/m@main", "https://huggingface.co/o/m/tree/main"),
        ("civitai:2", "https://civitai.com/models/1?modelVersionId=2"),
        ("o/m:abc", "https://replicate.com/o/m/versions/abc"),
        ("https://a.example/x?a=1&b=2", "https://A.example:443/x?b=2&a=1"),
    ],
)
def test_equal_references_have_one_key(one: str, other: str) -> None:
    assert len({parse(one), parse(other)}) == len({str(parse(one)), str(parse(other))}) == 1


def test_a_bare_name_is_replicates_first_and_then_the_hubs() -> None:
    pinned = parse(f"o/m#sha256={PIN}")
    assert isinstance(pinned, Bare)
    assert pinned.candidates() == (ReplicateModel("o/m", pin=PIN), HubFile("o/m", pin=PIN))


# Pins.


@pytest.mark.parametrize(
    "text",
    ["hf:o/m", "civitai:1?fp=fp16", "replicate:o/m", "o/m", "https://a.example/x?a=1", "x.tar", "huggingface.co/o/m"],
)
def test_any_reference_can_be_pinned(text: str) -> None:
    pinned = parse(f"{text}#sha256={PIN.upper()}")
    assert (parse(text).pin, pinned.pin) == (None, PIN)
    assert pinned != parse(text)
    assert str(pinned) == f"{parse(text)}#sha256={PIN}"
    assert parse(str(pinned)) == pinned


@pytest.mark.parametrize("fragment", ["", "readme", "sha256=", "sha256=abc", f"sha1={PIN}", f"sha256={PIN}0", f"{PIN}"])
def test_a_fragment_that_is_no_pin_is_refused(fragment: str) -> None:
    assert "Expected #sha256= and 64 hex digits." in refusal(f"hf:o/m#{fragment}")


# Secrets.

SIGNED = {
    "AWS": "X-Amz-Algorithm=A&X-Amz-Credential=CANARY&X-Amz-Date=1&X-Amz-Security-Token=CANARY&X-Amz-Signature=CANARY",
    "AWS 2": "AWSAccessKeyId=CANARY&Expires=1&Signature=CANARY",
    "Google": "x-goog-signature=CANARY&X-Goog-Credential=CANARY",
    "Google 2": "GoogleAccessId=CANARY&Expires=1&Signature=CANARY",
    "CloudFront": "Policy=CANARY&Key-Pair-Id=CANARY&Signature=CANARY&Hash-Algorithm=SHA256",
    "Azure": "sv=2024&st=1&se=2&sr=b&sp=r&sig=CANARY",
    "Discord": "ex=1&is=2&hm=CANARY",
    "own": "token=CANARY&access_token=CANARY&key=CANARY&api_key=CANARY&apikey=CANARY&auth=CANARY&Authorization=CANARY",
    "others": "hf_token=CANARY&client_secret=CANARY&password=CANARY&jwt=CANARY&X-Auth-Token=CANARY&%74oken=CANARY",
    "nameless": "CANARY-0123456789-0123456789",
}


@pytest.mark.parametrize("query", SIGNED.values(), ids=SIGNED)
def test_what_grants_access_is_kept_for_the_request_and_nowhere_else(query: str) -> None:
    url = parse(f"https://a.example/x.tar?versionId=2&{query}&author=me")
    assert isinstance(url, Url)
    assert str(url) == "https://a.example/x.tar?author=me&versionId=2"
    assert url.request == f"https://a.example/x.tar?versionId=2&{query}&author=me"
    assert sorted(url.secret.split("&")) == sorted(query.split("&"))
    assert "CANARY" not in f"{url} {url!r} {hash(url)}"
    assert url == parse("https://a.example/x.tar?versionId=2&author=me")


CANARY = "CANARYc0ffee"


@pytest.mark.parametrize(
    "text",
    [
        f"https://me:{CANARY}@a.example/x",
        f"https://me:{CANARY}/@a.example/x",
        f"https://me:{CANARY}@a.example:bad/x",
        f"https://[me:{CANARY}@a.example/x",
        f"huggingface.co:{CANARY}@evil.example/x",
        f"ftp://me:{CANARY}@a.example/x",
        f"https://a.example/../x?token={CANARY}",
        f"https://civitai.com/api/download/models/1?token={CANARY}",
        f"https://civitai.com/models/1?API_KEY={CANARY}",
        f"https://huggingface.co/o?token={CANARY}",
        f"https://a.example/x#{CANARY}",
        f"hf_{CANARY}",
        f"r8_{CANARY}",
        f"data:text/plain,{CANARY}",
        f"data:;base64,{CANARY}=",
        f"nothing {'z' * 80} {CANARY}",
    ],
)
def test_a_refusal_repeats_no_secret(text: str) -> None:
    """D2, X1."""
    assert "CANARY" not in refusal(text).removesuffix(text)


def test_a_refusal_of_a_key_pasted_by_mistake_does_not_repeat_it() -> None:
    assert "0123" not in refusal("0123456789abcdef0123456789abcdef")


def test_a_refusal_has_no_other_error_in_its_chain() -> None:
    with pytest.raises(SourceError) as error:
        parse("https://[me:secret@a.example/x")
    assert error.value.__cause__ is None and error.value.__suppress_context__


# What is refused.

REFUSED = {
    "": "none of the forms",
    "word": "none of the forms",
    "two words": "none of the forms",
    "a/b/c": "none of the forms",
    "owner.with.dots/name": "none of the forms",
    "huggingface.com/o/n": "none of the forms",
    "hf:o": "names no model repository",
    "hf:": "names no model repository",
    "hf:o/m@/x": "names no model repository",
    "huggingface.co": "no page of a model's files",
    "huggingface.co/o": "no page of a model's files",
    "https://huggingface.co/o/m/commit/main": "no page of a model's files",
    "https://huggingface.co/o/m/discussions/1": "no page of a model's files",
    "https://huggingface.co/o/m/tree": "no page of a model's files",
    "https://huggingface.co/datasets/o/m": "no page of a model's files",
    "https://huggingface.co/datasets/o": "the hub's datasets",
    "hf:datasets/o/m": "the hub's datasets",
    "hf:spaces/o/m": "the hub's spaces",
    "hf://buckets/o": "the hub's buckets",
    "hf:o/-m": "a name that none can have",
    "hf:o/a--b": "a name that none can have",
    "hf:o/a b": "a name that none can have",
    "hf:o/m@a..b": "its revision is none",
    "hf:o/m@a b": "its revision is none",
    "hf:o/m@-rf": "its revision is none",
    "hf:o/m/../x.safetensors": "'..'",
    "hf:o/m/%2e%2e/x.safetensors": "'..'",
    "hf:o/m/a%2F..%2Fx": "'..'",
    "hf:o/..": "a name that none can have",
    "https://huggingface.co/o/m/blob/main/%2E%2E/x": "'..'",
    "https://huggingface.co/o/m/blob/../x": "its revision is none",
    "hf:o/m/a%00b": "control character",
    "hf:o/m/a%5Cb": "backslash",
    "hf:o/m/x.ckpt": "a pickle by its name",
    "https://huggingface.co/o/m/resolve/main/pytorch_model.BIN": "a pickle by its name",
    "https://huggingface.co:8443/o/m": "its port is 8443",
    "civitai:": "no number of a version",
    "civitai:abc": "no number of a version",
    "civitai:-1": "no number of a version",
    "civitai:٣": "no number of a version",
    "civitai:1234567890123": "no number of a version",
    "civitai:1+": "no number of a version",
    "civitai.com/123": "no model's page",
    "https://civitai.com/images/1": "no model's page",
    "https://civitai.com/models/train": "no model's page",
    "https://civitai.com/models/1?modelVersionId=x": "no number",
    "https://civitai.com/api/download/models/1?type=Training%20Data": "another type or format",
    "https://civitai.com/api/download/models/1?format=PickleTensor": "another type or format",
    "https://civitai.com/api/download/models/1?fp=a/b": "no word",
    "https://civitai.com/api/download/models/1?token=abc": "a token in it",
    "urn:air:sdxl:checkpoint:civitai:1@2": "an AIR of type checkpoint",
    "urn:air:sdxl:lora:civitai:1@2.ckpt": "a pickle by its name",
    "urn:air:sdxl:lora:elsewhere:1@2": "its scheme is urn",
    "replicate:o": "names no model",
    "replicate:o/m/x": "names no model",
    "replicate:o/../m": "names no model",
    "https://replicate.com/o": "names no model",
    "https://replicate.com/../../versions/x": "names no model",
    "../../x": "'..'",
    "a/../x.safetensors": "'..'",
    "./../x.safetensors": "'..'",
    "./": "'.'",
    "/etc/passwd": "none of the forms",
    "/etc/x.safetensors": "not relative",
    "//evil.example/x.safetensors": "not relative",
    "~/x.safetensors": "not relative",
    "x.ckpt": "a pickle by its name",
    "owner/model.pt": "a pickle by its name",
    "./x.pth": "a pickle by its name",
    "a/x.bin": "a pickle by its name",
    "x.pickle": "a pickle by its name",
    "a\\x.safetensors": "a backslash or a control character",
    "https://a.example\\@evil.example/x": "a backslash or a control character",
    "https://a.example/\x00": "a backslash or a control character",
    "https://a.example/\r\nHost: b": "a backslash or a control character",
    "x\u202e.safetensors": "a backslash or a control character",
    "file:///etc/passwd": "its scheme is file",
    "ftp://a.example/x.safetensors": "its scheme is ftp",
    "gopher://a.example": "its scheme is gopher",
    "s3://bucket/x.safetensors": "its scheme is s3",
    "javascript:alert(1)": "its scheme is javascript",
    "C:/x.safetensors": "its scheme is C",
    "https://": "its host is none",
    "https:a.example/x": "its host is none",
    "https:///x": "its host is none",
    "https://a.example:bad/x": "malformed",
    "https://a.example:99999/x": "malformed",
    "https://[::1/x": "malformed",
    "https://a..example/x": "its host is none",
    "https://-a.example/x": "its host is none",
    "https://%61.example/x": "its host is none",
    "https://huggingfасe.co/o/m": "its host is none",
    "https://user@huggingface.co/o/m": "a user name in it",
    "https://huggingface.co@evil.example/o/m": "a user name in it",
    "https://huggingface.co.evil.example/o/m": "only looks like",
    "https://huggingface.com/o/m": "only looks like",
    "https://myhuggingface.co/o/m": "only looks like",
    "https://hf.co.evil.example/o/m": "only looks like",
    "https://civitai.org/models/1": "only looks like",
    "https://replicate.com.evil.example/o/m": "only looks like",
    "https://xreplicate.delivery/x.tar": "only looks like",
    "https://a.example/x/../y": "'..'",
    "https://a.example/x/%2e%2E/y": "'..'",
    "https://a.example/x.ckpt": "a pickle by its name",
    "https://a.example/x.bin?token=1": "a pickle by its name",
}


@pytest.mark.parametrize(("text", "why"), REFUSED.items())
def test_what_cannot_be_fetched_is_refused_in_a_sentence(text: str, why: str) -> None:
    """H9, T10, R for names: what was seen, what was wrong, what is accepted."""
    sentence = refusal(text)
    assert why in sentence
    assert " cannot be used: " in sentence and ". Expected " in sentence
    assert len(sentence) < 300 and sentence.isprintable()


def test_a_reference_may_be_two_thousand_characters_long() -> None:
    start = "https://a.example/"
    assert parse(start + "x" * (MAX_CHARACTERS - len(start)))
    assert "Expected at most 2000." in refusal(start + "x" * (MAX_CHARACTERS - len(start) + 1))


# Data URIs.


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


# Whatever is written.

FRAGMENTS = st.sampled_from(
    [
        *("hf:", "hf://", "civitai:", "replicate:", "https://", "HTTP://", "data:", ";base64,", "urn:air:", "sdxl:"),
        *("lora:", "huggingface.co/", "hf.co", "civitai.com/models/", "replicate.com/", "replicate.delivery", "o/m"),
        *("/blob/main/", "/tree/", "@", "refs/pr/1", "%2F", "%", "%00", "..", ".", "/", "//", "./", ":", "?", "&"),
        *("=", "#", f"#sha256={PIN}", "[", "]", "::1", "127.0.0.1", "token=x", "modelVersionId=", "+", "~", " "),
        *(".tar", ".safetensors", ".ckpt", "1", "290640", "é", "\u202e", "\x00", "\n", "\\", "AAAA", "a=1", ";"),
    ]
)
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.one_of(FRAGMENTS, st.text(max_size=3)), max_size=9).map("".join))


@settings(max_examples=1000, deadline=None)
@given(TEXTS)
def test_a_text_is_a_reference_that_can_be_written_again_or_a_refusal(text: str) -> None:
    try:
        reference = parse(text)
    except SourceError as error:
        assert str(error).isprintable()
        return
    assert hash(reference) == hash(parse(text))
    if not isinstance(reference, Data):
        assert parse(str(reference)) == reference
        assert str(parse(str(reference))) == str(reference)


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=40), st.sampled_from(["hf:o/m/", "./", "https://a.example/", "https://a.example/x?", "hf:o/m@"])
)
def test_no_path_climbs_and_no_address_leaves_its_host(text: str, start: str) -> None:
    try:
        reference = parse(start + text)
    except SourceError:
        return
    path = reference.address.removeprefix("https://") if isinstance(reference, Url) else getattr(reference, "path", "")
    assert not {".", ".."} & set(path.partition("?")[0].split("/"))
    assert not isinstance(reference, Url) or reference.request.startswith("https://a.example/")
