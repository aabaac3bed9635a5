"""What cannot be fetched, or hides something, is refused in a sentence."""

import pytest

from klora.sources.reference import MAX_CHARACTERS, parse
from test_folder.references.parsing import refusal

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
    "https://huggingface.co/datasets/o/x.safetensors": "the hub's datasets",
    "https://huggingface.co/o/m/x.bin": "no page of a model's files",
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
    "https://huggingface.co/o/m?show_file_info=../x.safetensors": "'..'",
    "https://huggingface.co/o/m/tree/main?show_file_info=x.bin": "a pickle by its name",
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


@pytest.mark.parametrize("text", ["o/m@main", "replicate:o/m@1", "civitai:1@x", "hf:o@main"])
def test_what_has_a_revision_is_shown_whole(text: str) -> None:
    assert refusal(text).startswith(f"{text!r} cannot be used: ")


def test_a_name_without_its_ending_is_told_that_paths_have_one() -> None:
    assert refusal("dog").endswith(" or the path of a .safetensors file.")


def test_a_reference_may_be_two_thousand_characters_long() -> None:
    start = "https://a.example/"
    assert parse(start + "x" * (MAX_CHARACTERS - len(start)))
    assert "Expected at most 2000." in refusal(start + "x" * (MAX_CHARACTERS - len(start) + 1))
