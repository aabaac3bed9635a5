"""Every spelling of a reference comes to one value, which can be written again."""

import pytest

from klora.sources.kinds import Bare, CivitaiFile, HubFile, Local, ReplicateModel, Url
from klora.sources.reference import parse
from test_folder.references.parsing import PIN

COMMIT = "0123456789abcdef0123456789abcdef01234567"
VERSION = "6f7a773af6fc3e8de9d5a3c00be77c17308914bf67772726aff83496ba1e3bbe"

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
    "https://huggingface.co/o/m/tree/main?show_file_info=x.safetensors": FILE,
    "https://huggingface.co/o/m?show_file_info=a%20b%2Fx.safetensors": DEEP,
    "https://huggingface.co/o/m/tree/main/a%20b?show_file_info=a+b%2Fx.safetensors": DEEP,
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
    "huggingface.co/o/m/x.safetensors": FILE,  # as flux-dev-lora is given it
    "https://huggingface.co/o/m/a%20b/x.safetensors": DEEP,
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
    "o/m/_weights": ReplicateModel("o/m"),
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
