"""What grants access is kept for the request alone, and no refusal repeats it."""

import pytest

from klora.errors import SourceError
from klora.sources.kinds import Url
from klora.sources.reference import parse
from test_folder.references.parsing import refusal

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
    "Microsoft": "authkey=CANARY&tempauth=CANARY",
    "Bunny": "AccessKey=CANARY&passkey=CANARY&verify=CANARY&pw=CANARY",
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
