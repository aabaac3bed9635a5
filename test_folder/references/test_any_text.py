"""Whatever is written is a reference that leads nowhere else, or a refusal."""

from hypothesis import given, settings
from hypothesis import strategies as st

from klora.errors import SourceError
from klora.sources.kinds import Data, Url
from klora.sources.reference import parse
from test_folder.references.parsing import PIN

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


@settings(max_examples=1000)
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


@settings(max_examples=300)
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
