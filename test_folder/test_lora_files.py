"""The LoRA files that requests name: which paths are taken, what the environment says of the others, what is lent."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import weights
from klora.cache import Borrowed
from klora.errors import BaseModelError, KLoRAError, LoRAError, RequestError, SourceError
from klora.files.container import files_of
from klora.files.shelf import Shelf
from klora.models import load_shapes
from klora.sources.authorities import Authorities
from klora.sources.download import Denied, NotFound
from test_folder.fakes import Storage, tarred
from test_folder.fakes.civitai import Civitai, File
from test_folder.fakes.hub import Hub
from test_folder.fakes.replicate import Replicate
from test_folder.lending import CONTENT, STYLE, sha256
from test_folder.tiny import BASES
from test_folder.variants import VARIANTS

SETTINGS = (
    *weights.AUTHORITIES.values(),
    *weights.TOKENS.values(),
    "KLORA_CACHE",
    "KLORA_CACHE_GB",
    "KLORA_TRUSTED_HOSTS",
)


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None but a cache of one's own."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KLORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A LoRA folder with dog.safetensors, beside it elsewhere.safetensors."""
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "dog.safetensors").write_bytes(CONTENT)
    (tmp_path / "elsewhere.safetensors").write_bytes(STYLE)
    return tmp_path / "loras"


@pytest.fixture
def hub(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The one that HF_ENDPOINT names, its storage trusted."""
    with Hub(storage) as hub:
        hub.tokens_issued = {"hf_Ann"}
        monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/")
        monkeypatch.setenv("KLORA_TRUSTED_HOSTS", f" {storage.host} ,, 10.0.0.1:80")
        yield hub


def read(files: weights.LoRAFiles, reference: str, **tokens: str) -> bytes:
    with files.borrowed({"style_lora": reference}, tokens) as lent:
        return lent["style_lora"].path.read_bytes()


def refusal(files: weights.LoRAFiles, reference: str, kind: type[KLoRAError] = SourceError) -> str:
    with pytest.raises(kind) as error:
        read(files, reference)
    return str(error.value)


# Local files.


@pytest.mark.parametrize(
    "reference", ["dog.safetensors", "./dog.safetensors", f"dog.safetensors#sha256={sha256(CONTENT)}"]
)
def test_a_file_below_the_root_is_taken_and_needs_no_cache(root: Path, tmp_path: Path, reference: str) -> None:
    files = weights.LoRAFiles(root)
    assert read(files, reference) == CONTENT
    with files.borrowed({"style_lora": reference}, {}) as lent:
        assert lent == {"style_lora": Borrowed(root / "dog.safetensors")}
    assert not (tmp_path / "cache").exists()


def test_another_file_than_the_pinned_one_is_refused_naming_both(root: Path) -> None:
    assert refusal(weights.LoRAFiles(root), f"dog.safetensors#sha256={'0' * 64}") == (
        f"style_lora: dog.safetensors has the sha256 {sha256(CONTENT)}. Expected {'0' * 64}, its pin."
    )


@pytest.mark.parametrize(
    "reference", ["../elsewhere.safetensors", "/etc/hostname", "~/dog.safetensors", "none.safetensors"]
)
def test_a_server_takes_no_other_path(root: Path, tmp_path: Path, reference: str) -> None:
    assert refusal(weights.LoRAFiles(root), reference, KLoRAError).startswith("style_lora")
    assert refusal(weights.LoRAFiles(root), str(tmp_path / "elsewhere.safetensors"), KLoRAError).startswith(
        "style_lora"
    )


def test_without_a_root_it_takes_none() -> None:
    assert "KLORA_LORA_ROOT is not set" in refusal(weights.LoRAFiles(), "dog.safetensors", LoRAError)


def test_who_owns_the_machine_may_name_any_path(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    files = weights.LoRAFiles(anywhere=True)
    for path in ("../elsewhere.safetensors", str(tmp_path / "elsewhere.safetensors")):
        assert read(files, path) == read(files, f"{path}#sha256={sha256(STYLE).upper()}") == STYLE
        assert "has the sha256" in refusal(files, f"{path}#sha256={'0' * 64}")
    assert read(files, f"dog.safetensors#sha256={sha256(CONTENT)}") == CONTENT
    assert "has the sha256" in refusal(files, f"dog.safetensors#sha256={'0' * 64}")


@pytest.mark.parametrize(
    "reference",
    [
        *("none.safetensors", "./none", "folder/none.tar", "../none.safetensors", "folder/../none.safetensors"),
        *("~/dog", "/no/such/file.safetensors", "/no/such/folder", f"./none.safetensors#sha256={'0' * 64}"),
        *(f"{'a' * 300}.safetensors", f"/{'a' * 300}", ".\0", "..\\dog.safetensors"),
    ],
)
def test_a_path_at_which_nothing_lies_is_told_as_such(
    root: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.chdir(root)
    assert refusal(weights.LoRAFiles(anywhere=True), reference, LoRAError) == (
        f"style_lora is {reference!r:.200}, but there is no such file, or none that can be read. Expected the path of "
        "a LoRA, or a reference such as hf:owner/name or an https address."
    )


@pytest.mark.parametrize("reference", [" dog.safetensors\n", f"./dog.safetensors#SHA256={sha256(CONTENT)}"])
def test_a_path_is_taken_as_a_server_spells_it(root: Path, monkeypatch: pytest.MonkeyPatch, reference: str) -> None:
    monkeypatch.chdir(root)
    assert read(weights.LoRAFiles(anywhere=True), reference) == CONTENT


def test_there_a_path_that_exists_goes_before_what_else_it_may_mean(
    hub: Hub, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("o/m", {"x.safetensors": STYLE})
    monkeypatch.chdir(root)
    (root / "hf:o").mkdir()
    (root / "hf:o" / "m").write_bytes(CONTENT)
    assert read(weights.LoRAFiles(anywhere=True), "hf:o/m") == CONTENT
    assert read(weights.LoRAFiles(root), "hf:o/m") == STYLE


@pytest.mark.parametrize("text", ["", "ftp://x.org/a", "hf:o", "a" * 5000, "\0", "civitai:x"])
@pytest.mark.parametrize("anywhere", [False, True])
def test_what_is_no_reference_is_said_of_its_input(text: str, anywhere: bool) -> None:
    assert refusal(weights.LoRAFiles(anywhere=anywhere), text).startswith("style_lora: '")


# The environment.


def test_authorities_are_where_their_endpoints_say_and_lend_what_they_allow(
    hub: Hub, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("o/m", {"x.safetensors": CONTENT}, readers={"hf_Ann"})
    with Civitai(storage) as civitai, Replicate() as replicate:
        monkeypatch.setenv("CIVITAI_ENDPOINT", civitai.url)
        monkeypatch.setenv("REPLICATE_ENDPOINT", replicate.url)
        civitai.publish(1, 9, File(1, content=STYLE))
        replicate.weights["o/m"] = storage.signed("/x.tar", tarred({"lora.safetensors": STYLE}))
        files = weights.LoRAFiles()
        assert read(files, "hf:o/m", hf="hf_Ann") == CONTENT
        assert read(files, "civitai:9") == STYLE
        assert read(files, "replicate:o/m") == tarred({"lora.safetensors": STYLE})


def test_an_endpoint_that_is_left_blank_is_the_authoritys_own_and_one_may_end_in_a_slash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in weights.AUTHORITIES.values():
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("CIVITAI_ENDPOINT", "https://c.example/")
    found = weights._authorities()
    assert (found.hub, found.replicate) == (Authorities.hub, Authorities.replicate)
    assert (found.civitai, found.network.trusted) == ("https://c.example", {"c.example:443"})


def test_what_is_not_named_as_trusted_is_not_gone_to(
    hub: Hub, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("o/m", {"x.safetensors": CONTENT})
    monkeypatch.setenv("KLORA_TRUSTED_HOSTS", "127.0.0.1:1")
    files = weights.LoRAFiles()
    assert "is http to port" in refusal(files, "hf:o/m")
    assert "is http to port" in refusal(files, storage.signed("/y.safetensors", CONTENT))
    assert not storage.requests


def test_the_machines_own_tokens_are_used_only_where_they_are_handed_in(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """H4."""
    hub.publish("o/m", {"x.safetensors": CONTENT}, readers={"hf_Ann"})
    monkeypatch.setenv("HF_TOKEN", "hf_Ann")
    monkeypatch.setenv("CIVITAI_API_TOKEN", "c")
    monkeypatch.setenv("REPLICATE_API_TOKEN", "")
    assert weights.own_tokens() == {"hf": "hf_Ann", "civitai": "c"}
    monkeypatch.setenv("REPLICATE_API_TOKEN", "r8")
    assert weights.own_tokens()["replicate"] == "r8"
    files = weights.LoRAFiles()
    refusal(files, "hf:o/m", Denied)
    assert not hub.tokens()
    assert read(files, "hf:o/m", **weights.own_tokens()) == CONTENT


def test_the_cache_is_where_klora_cache_says_and_shared_by_all_who_say_so(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("o/m", {"x.safetensors": CONTENT})
    assert read(weights.LoRAFiles(), "hf:o/m") == CONTENT
    before = len(hub.requests)
    assert read(weights.LoRAFiles(), "hf:o/m") == CONTENT
    assert len(hub.requests) == before
    assert [path.name for path in (tmp_path / "cache" / "blobs").iterdir()] == [sha256(CONTENT)]
    monkeypatch.setenv("HOME", "/nobody")
    monkeypatch.setenv("KLORA_CACHE", "")
    assert weights.cache_folder() == Path("/nobody/.cache/klora/loras")


@pytest.mark.parametrize(
    ("text", "size"), [(None, 20_000_000_000), ("", 20_000_000_000), ("0.5", 500_000_000), ("1e3", 10**12)]
)
def test_its_size_is_in_gigabytes(monkeypatch: pytest.MonkeyPatch, text: str | None, size: int) -> None:
    if text is not None:
        monkeypatch.setenv("KLORA_CACHE_GB", text)
    assert weights.cache_bytes() == size


@pytest.mark.parametrize("text", ["0", "-1", "much", "20 GB", "nan", "inf", "1e-12"])
def test_a_size_that_is_none_is_refused_before_any_request(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("KLORA_CACHE_GB", text)
    with pytest.raises(RequestError) as error:
        weights.LoRAFiles()
    assert str(error.value) == (
        f"KLORA_CACHE_GB is {text!r}. Expected the size of the LoRA cache in gigabytes, as in 20."
    )


def test_a_file_that_is_larger_than_the_cache_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish("o/m", {"x.safetensors": CONTENT})
    monkeypatch.setenv("KLORA_CACHE_GB", "0.00001")
    assert "and the whole LoRA cache holds 10000. Expected a smaller file, or a larger cache." in refusal(
        weights.LoRAFiles(), "hf:o/m"
    )


def test_two_gigabytes_of_the_disk_are_left_to_others(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish("o/m", {"x.safetensors": CONTENT})
    free = 2_000_000_000 + len(CONTENT)
    monkeypatch.setattr("klora.cache.folder.Folder.free_bytes", lambda folder: free - 1)
    assert refusal(weights.LoRAFiles(), "hf:o/m").endswith(
        f": The disk of the LoRA cache is full: {len(CONTENT)} bytes more were asked for, and of its {free - 1} free "
        "bytes 2000000000 are to stay so. Expected 1 more of them, or a smaller file."
    )
    monkeypatch.setattr("klora.cache.folder.Folder.free_bytes", lambda folder: free)
    assert read(weights.LoRAFiles(), "hf:o/m") == CONTENT


# What is lent.


def test_of_two_files_the_local_one_and_the_fetched_one_come_together(hub: Hub, root: Path, tmp_path: Path) -> None:
    hub.publish("o/m", {"x.safetensors": STYLE}, card={"instance_prompt": "in zork style"})
    references = {"content_lora": "hf:o/m", "style_lora": "dog.safetensors"}
    with weights.LoRAFiles(root).borrowed(references, {}) as lent:
        assert [file.path.read_bytes() for file in lent.values()] == [STYLE, CONTENT] and [*lent] == [*references]
        assert lent["style_lora"] == Borrowed(root / "dog.safetensors")
        assert lent["content_lora"].triggers == ("in zork style",)
        assert lent["content_lora"].scores.parent == tmp_path / "cache" / "scores"
    assert not lent["content_lora"].path.exists() and lent["style_lora"].path.exists()


def test_what_is_for_no_base_of_the_request_is_refused_before_it_is_fetched(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C9."""
    with Civitai(storage) as civitai:
        monkeypatch.setenv("CIVITAI_ENDPOINT", civitai.url)
        monkeypatch.setenv("KLORA_TRUSTED_HOSTS", storage.host)
        civitai.publish(1, 9, File(1, content=STYLE), baseModel="Flux.1 D")
        files = weights.LoRAFiles()
        with pytest.raises(SourceError) as error, files.borrowed({"a": "civitai:9"}, {}, ("sdxl", "illustrious-xl")):
            pass
        assert str(error.value) == (
            "a: civitai:9 was made for 'Flux.1 D', as its page says. Expected a LoRA for sdxl or illustrious-xl."
        )
        with pytest.raises(SourceError) as error, files.borrowed({"a": "civitai.com/models/1"}, {}, ("sdxl",)):
            pass
        assert str(error.value).endswith("Expected a LoRA for sdxl, or the number of a version that is.")
        assert not storage.requests
        for bases in (("sdxl", "flux-schnell"), ()):
            with files.borrowed({"a": "civitai:9"}, {}, bases) as lent:
                assert lent["a"].path.read_bytes() == STYLE


def test_a_request_may_come_to_the_base_that_it_names_or_to_any_installed_one(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one which is not there is known before LoRAs are fetched for it."""
    (tmp_path / "sdxl").symlink_to(bases / "sdxl")
    monkeypatch.setenv("KLORA_MODELS", str(tmp_path))
    assert weights.runnable("sdxl") == weights.runnable(None) == ["sdxl"]
    with pytest.raises(BaseModelError, match=r"^flux-dev is not installed: "):
        weights.runnable("flux-dev")


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if "PEFT repository" in v.name], ids=lambda v: f"{v.family}, {v.name}"
)
def test_a_peft_repository_is_fetched_with_its_alphas(hub: Hub, bases: Path, tmp_path: Path, variant) -> None:
    """H8: its adapter_config.json is honoured, through the real fetch and the real reader."""
    model = load_shapes(variant.family, bases / BASES[variant.family])
    (tmp_path / "made").mkdir()
    folder, meant = variant.write(model, tmp_path / "made")
    hub.publish("o/m", {path.name: path.read_bytes() for path in folder.iterdir()})
    files = weights.LoRAFiles()
    for _ in range(2):  # fetched, and from the cache
        with files.borrowed({"lora": "hf:o/m"}, {}) as lent:
            assert set(files_of(lent["lora"].path)) == {"lora", "adapter"}
            assert hashlib.sha256((folder / "adapter_config.json").read_bytes()).hexdigest() in lent["lora"].scores.name
            lora = model.read_lora(lent["lora"].path)
        assert lora.keys() == meant.keys()
        for name, pair in lora.items():
            torch.testing.assert_close(pair.B.double() @ pair.A.double(), meant[name], rtol=1e-5, atol=1e-6)


def test_the_words_beside_a_lora_are_fetched_with_it(hub: Hub, bases: Path, tmp_path: Path) -> None:
    """Through the real fetch and the real reader; and both say which LoRA it is."""
    [variant] = [v for v in VARIANTS if "advanced" in v.name and v.family == "sdxl"]
    model = load_shapes("sdxl", bases / "sdxl")
    folder, _ = variant.write(model, tmp_path)
    hub.publish("o/m", {path.name: path.read_bytes() for path in folder.iterdir()})
    for _ in range(2):  # fetched, and from the cache
        with weights.LoRAFiles().borrowed({"lora": "hf:o/m"}, {}) as lent:
            taught = model.read_lora(lent["lora"].path).words
            assert Shelf().sha256(lent["lora"].path) == Shelf().sha256(lent["lora"].path, lent["lora"].scores)
        assert taught.keys() == model.read_lora(folder).words.keys() == {"<s0><s1>", "<s0>", "<s1>"}


def test_a_peft_repository_that_lost_its_config_is_no_longer_lent(hub: Hub, bases: Path) -> None:
    config = {"adapter_model.safetensors": CONTENT, "adapter_config.json": b'{"lora_alpha": 8, "r": 4}'}
    hub.publish("o/m", config)
    files = weights.LoRAFiles()
    with files.borrowed({"lora": "hf:o/m"}, {}) as lent:
        assert lent["lora"].path.with_name("adapter_config.json").read_bytes() == config["adapter_config.json"]
    (weights.cache_folder() / "blobs" / sha256(config["adapter_config.json"])).unlink()
    with files.borrowed({"lora": "hf:o/m"}, {}) as lent:
        assert lent["lora"].path.with_name("adapter_config.json").read_bytes() == config["adapter_config.json"]


@pytest.mark.parametrize("config", [b"<html>", b"", b"PK"])
def test_a_config_that_is_none_is_refused_and_the_weights_with_it(hub: Hub, config: bytes) -> None:
    hub.publish("o/m", {"adapter_model.safetensors": CONTENT, "adapter_config.json": config})
    assert refusal(weights.LoRAFiles(), "hf:o/m").startswith("style_lora: adapter_config.json looks like ")
    hub.publish("o/m", {})
    refusal(weights.LoRAFiles(), "hf:o/m", NotFound)


def test_a_file_that_was_published_in_half_is_not_lent(hub: Hub) -> None:
    hub.publish("o/m", {"x.safetensors": CONTENT[:-1]})
    assert "is damaged, or does not end where it says" in refusal(weights.LoRAFiles(), "hf:o/m")
