"""A LoRA file that is another one under the same name: its images are not mixed with those of the first."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import Result

from klora.bulk.batches import Bulk
from klora.bulk.folder import Folder
from klora.bulk.run import Digests, run
from klora.cache import Borrowed
from klora.errors import RequestError
from klora.form.request import Request
from klora.studio import Check, Studio
from klora.studio.digests import digests
from test_folder.bulk.prompting import contents, generated, pictures, read, unchecked, written
from test_folder.fakes import Storage
from test_folder.fakes.hub import Hub


def swapped(file: Path) -> tuple[str, str]:
    """Replace a LoRA by one with other bytes and the same layers. Its sha256 before and after."""
    before = file.read_bytes()
    after = (file.parent / "content.safetensors").read_bytes()
    assert before != after
    file.write_bytes(after)
    return hashlib.sha256(before).hexdigest(), hashlib.sha256(after).hexdigest()


@pytest.mark.parametrize("count", ["1", "2"], ids=["all is there", "one is lacking"])
def test_images_of_a_file_that_was_replaced_are_refused(shell: Path, count: str) -> None:
    written(shell / "p.txt", "a dog", "a cat")
    mine = ("p.txt", "--style-lora", "style.safetensors", "--batch-size", "1")
    assert generated(*mine, "--count", "1").exit_code == 0
    before, first = contents(shell / "out"), (shell / "style.safetensors").read_bytes()
    old, new = swapped(shell / "style.safetensors")
    result = generated(*mine, "--count", count)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: out/00000.json was made with a file of another sha256: its style_lora is ['{old}'], and that of line "
        f"1 is ['{new}']. Expected the same, or another folder.\n"
    )
    assert contents(shell / "out") == before
    (shell / "style.safetensors").write_bytes(first)
    assert generated(*mine, "--count", count).stdout.splitlines()[-1].endswith("1 were there before.")


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def test_images_of_a_fetched_lora_that_has_changed_are_refused(
    shell: Path, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(shell / "p.txt", "a dog", "a cat")
    first, other = shell / "style.safetensors", shell / "content.safetensors"
    mine = ("p.txt", "--style-lora", "hf:o/oil", "--batch-size", "1")
    with Hub(storage) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("KLORA_TRUSTED_HOSTS", storage.host)

        def generated_of(file: Path, cache: str, *arguments: str) -> Result:
            """With another cache, which is as if the hub were asked again after ten minutes."""
            hub.publish("o/oil", {"oil.safetensors": file.read_bytes()})
            monkeypatch.setenv("KLORA_CACHE", str(shell / cache))
            return generated(*mine, *arguments)

        assert generated_of(first, "one", "--count", "1").exit_code == 0
        before = contents(shell / "out")
        with monkeypatch.context() as patch:
            patch.setattr(Studio, "_drawn", None)  # nothing is drawn
            result = generated_of(other, "two", "--on-error", "skip")
        assert result.exit_code == 1
        assert result.stdout.splitlines()[-2:] == [
            "0 images made in out, 1 were there before.",
            f"Not made: line 2: out has images of another LoRA file: its style_lora is ['{sha256(first)}'], and that "
            f"of line 2 is ['{sha256(other)}']. Expected the same, or another folder.",
        ]
        assert contents(shell / "out") == before
        assert generated_of(first, "three").stdout.splitlines()[-1] == "1 images made in out, 1 were there before."


@pytest.mark.parametrize("known", [digests, lambda references: {}], ids=["local", "fetched"])
def test_images_of_a_lora_that_changes_on_the_way_are_refused(shell: Path, studio: Studio, known: Digests) -> None:
    file, said = shell / "style.safetensors", list[str]()

    def draw(asked: Sequence[Request], check: Check) -> Mapping[int, Image.Image]:
        images = studio.draw(asked, {"style_lora": Borrowed(file)}, check)
        if file.read_bytes() != (shell / "content.safetensors").read_bytes():
            swapped(file)
        return images

    prompts = read(written(shell / "p.txt", "a dog", "a cat"), style_lora=file.name)
    run(prompts, Bulk(batch_size=1, on_error="skip"), shell / "out", lambda: draw, said.append, known)
    assert said[-1].startswith(f"Not made: line 2: {shell / 'out'} has images of another LoRA file: its style_lora is")
    assert [*pictures(shell / "out")] == ["00000.png"]


def test_a_folder_in_which_files_of_one_reference_are_mixed_is_refused(shell: Path, studio: Studio) -> None:
    [first, second] = read(written(shell / "p.txt", "a dog", "a cat"), style_lora="hf:o/oil").jobs()
    for job, name in ((first, "style"), (second, "content")):
        file = {"style_lora": Borrowed(shell / f"{name}.safetensors")}
        Folder(shell).keep(job, studio.draw([job.request], file, unchecked)[0])
    folder = Folder(shell)
    assert folder.done(first)
    with pytest.raises(RequestError, match=r"00001\.json was made with a file of another sha256: its style_lora is"):
        folder.done(second)
    assert Folder(shell).done(second)


def test_a_file_that_was_written_again_as_it_was_is_the_same(shell: Path) -> None:
    written(shell / "p.txt", "a dog")
    assert generated("p.txt", "--style-lora", "style.safetensors").exit_code == 0
    (shell / "style.safetensors").write_bytes((shell / "style.safetensors").read_bytes())
    assert generated("p.txt", "--style-lora", "style.safetensors").stdout.splitlines()[-1].startswith("0 images made")


def test_a_file_that_is_named_by_another_path_is_the_same(shell: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(shell / "p.txt", "a dog")
    for at, (prompts, lora, out) in (
        (shell, ("p.txt", "style.safetensors", "out")),
        (shell, ("p.txt", str(shell / "style.safetensors"), "out")),
        (shell.parent, [f"{shell.name}/{name}" for name in ("p.txt", "style.safetensors", "out")]),
        (shell / "out", ("../p.txt", "../style.safetensors", ".")),
    ):
        monkeypatch.chdir(at)
        result = generated(prompts, "--style-lora", lora, "--out", out)
        assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "0 images made in ., 1 were there before."
    result = generated("../p.txt", "--style-lora", "../content.safetensors", "--out", ".")
    assert "its style_lora is 'style.safetensors', and that of line 1 is 'content.safetensors'." in result.stderr


def test_a_withheld_image_is_withheld_of_that_file_alone(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    [job] = read(written(tmp_path / "p.txt", "a dog"), content_lora=str(file)).jobs()
    file.write_bytes(b"one")
    Folder(tmp_path, digests([str(file)])).withhold(job)
    assert Folder(tmp_path, digests([str(file)])).done(job)
    file.write_bytes(b"another")
    with pytest.raises(RequestError, match="was made with a file of another sha256: its content_lora is"):
        Folder(tmp_path, digests([str(file)])).done(job)


def test_records_without_files_are_still_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"one")
    [job] = read(written(tmp_path / "p.txt", "a dog"), content_lora=str(file)).jobs()
    folder = Folder(tmp_path, digests([str(file)]))
    folder.withhold(job)
    record = tmp_path / "00000.json"
    told = json.loads(record.read_text())
    record.write_text(json.dumps({name: value for name, value in told.items() if name != "loras"}))
    assert folder.done(job)
    record.write_text(json.dumps({**told, "loras": {"content_lora": "no mapping"}}))
    with pytest.raises(RequestError, match="is no record of klora generate"):
        folder.done(job)


def test_what_is_no_readable_lora_on_this_machine_has_no_digest(tmp_path: Path) -> None:
    two, file = tmp_path / "two", tmp_path / "mine.safetensors"
    two.mkdir()
    for place in (file, two / "a.safetensors", two / "b.safetensors"):
        place.write_bytes(b"weights")
    pinned = f"{file}#sha256={hashlib.sha256(b'weights').hexdigest()}"
    odd = (str(two), str(tmp_path / "none"), "hf:owner/name", "data:;base64," + "A" * 10_000, "a\0b")
    digest = (hashlib.sha256(b"weights").hexdigest(),)
    assert digests([str(file), pinned, *odd]) == {str(file): digest, pinned: digest}
