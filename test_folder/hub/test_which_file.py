"""Of a repository's files the LoRA is found, or all are named."""

import pytest

from klora.errors import SourceError
from klora.sources.download import NotFound
from klora.sources.network import Network
from test_folder.fakes import CONTENT
from test_folder.fakes.hub import Hub
from test_folder.hub.readers import Resolve


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
        (["d_000000250.safetensors", "d.safetensors", "d_000000500.safetensors"], "hf:o/m", "d.safetensors"),
        (["in/d-000010.safetensors", "in/d.safetensors", "in/d-step00000500.safetensors"], "hf:o/m/in", "in/d.safe"),
        (["d_000000250.safetensors", "d.safetensors"], "hf:o/m/d_000000250.safetensors", "d_000000250."),
        (["d_000000250.safetensors"], "hf:o/m", "d_000000250."),
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


LORA = "pytorch_lora_weights.safetensors"
LONG = "x" * 90


@pytest.mark.parametrize(
    ("files", "asked", "names"),
    [
        ([LORA, "dog_emb.safetensors"], "hf:o/m", [LORA, "dog_emb.safetensors"]),
        ([f"in/{LORA}", "dog_emb.safetensors", "in/a b_emb.safetensors"], "hf:o/m/in", [LORA, "a_b_emb.safetensors"]),
        ([LORA, "dog_emb.safetensors", "m_emb.safetensors"], "hf:o/m", [LORA, "m_emb.safetensors"]),
        ([LORA, "dog_emb.safetensors", "cat_emb.safetensors"], "hf:o/m", [LORA]),
        (["dog.safetensors", "dog_emb.safetensors"], "hf:o/m", ["dog.safetensors", "dog_emb.safetensors"]),
        (
            [LORA, "dog.safetensors", "dog_emb.safetensors"],
            "hf:o/m/dog.safetensors",
            ["dog.safetensors", "dog_emb.saf"],
        ),
        ([LORA, "dog.safetensors", "dog_emb.safetensors"], "hf:o/m", [LORA, "dog_emb.safetensors"]),
        (["dog.safetensors", "cat_emb.safetensors"], "hf:o/m/dog.safetensors", ["dog.safetensors"]),
        (["dog_emb.safetensors"], "hf:o/m", ["dog_emb.safetensors"]),
        (["水墨.safetensors", "水墨_emb.safetensors"], "hf:o/m", ["_.safetensors", "__emb.safetensors"]),
        ([f"{LONG}.safetensors", f"{LONG}_emb.safetensors"], "hf:o/m", [f"{'x' * 64}.safe", f"{'x' * 64}_emb.safe"]),
        (
            [f"{LONG}.-{'y' * 62}.safetensors", f"{LONG}.-{'y' * 62}_emb.safetensors"],
            "hf:o/m",
            [f"{'y' * 62}.safe", f"{'y' * 62}_emb.safe"],
        ),
    ],
)
def test_the_words_that_lie_beside_a_lora_come_with_it(
    authority: Hub, resolve: Resolve, files: list[str], asked: str, names: list[str]
) -> None:
    """As diffusers' advanced trainers leave them, and call them on the disk as the LoRA is called there."""
    authority.publish("o/m", dict.fromkeys(files, CONTENT))
    found = resolve(asked)
    assert all(download.name.startswith(name) for download, name in zip(found, names, strict=True))


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


@pytest.mark.parametrize(
    "names",
    [
        ("d_000000250", "d_000000500"),  # the last is gone
        ("d", "d_000000250", "cat"),
        ("d", "cat_000000250"),
        ("d", "d_2"),
        ("d", "d-v2000000"),
        ("d", "d000000250"),
    ],
)
def test_files_of_which_none_is_what_the_others_became_are_named(
    authority: Hub, resolve: Resolve, names: tuple[str, ...]
) -> None:
    authority.publish("o/m", {f"{name}.safetensors": CONTENT for name in names})
    with pytest.raises(SourceError, match=f"^hf:o/m has {len(names)} files: "):
        resolve("hf:o/m")


def test_of_several_files_at_most_twenty_are_listed(authority: Hub, resolve: Resolve) -> None:
    """H8: three, and many."""
    for count, listed in ((3, "'00.safetensors', '01.safetensors', '02.safetensors'. "), (25, "and 5 more. ")):
        authority.publish("o/m", {f"{n:02}.safetensors": CONTENT for n in range(count)})
        with pytest.raises(SourceError, match=f"^hf:o/m has {count} files: ") as error:
            resolve("hf:o/m")
        assert type(error.value) is SourceError
        assert listed in str(error.value) and str(error.value).count(".safetensors'") == min(count, 20)
