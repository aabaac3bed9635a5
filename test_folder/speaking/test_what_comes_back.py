"""Images, reports and samples are told apart in what a server gives."""

import base64
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from playground.outputs import Output, files_of, samples_in, sorted_out
from test_folder.fakes.tars import CHAIN, ENDLESS, crafted, endless_map
from test_folder.waiting import at_most


def uri(mime: str, data: bytes = b"x") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def test_the_report_is_told_from_the_images_by_its_place_where_files_have_no_names() -> None:
    output = [uri("image/webp", b"0"), uri("image/webp", b"1"), uri("image/png", b"map"), uri("application/json")]
    made = sorted_out(files_of(output, lambda url: b""), reported=True)
    assert [image.data for image in made.images] == [b"0", b"1"]
    assert made.heat_map and made.heat_map.data == b"map"
    assert made.table and made.table.mime == "application/json"
    assert len(sorted_out(files_of(output[:1], lambda url: b""), reported=False).images) == 1


def test_the_report_is_told_by_its_name_and_uploads_are_put_in_order() -> None:
    urls = [f"https://files.example/up/{name}?sig=1" for name in ("report.png", "klora_8_1.webp", "klora_7_0.webp")]
    made = sorted_out(files_of(urls, lambda url: url.encode()), reported=True)
    assert [image.name for image in made.images] == ["klora_7_0.webp", "klora_8_1.webp"]
    assert made.heat_map and made.heat_map.name == "report.png"


def test_a_file_of_prompts_comes_back_as_one_tar() -> None:
    made = sorted_out(files_of([uri("application/x-tar", b"tar")], lambda url: b""), reported=False)
    assert made.tar and made.tar.data == b"tar"
    assert (made.images, made.heat_map, made.table) == ([], None, None)


def test_a_training_gives_one_file_and_its_samples_are_in_it(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in (
            ("lora.safetensors", b"w"),
            ("samples/20_0.png", b"late"),
            ("../samples/10_0.png", b"early"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    [tar_file] = files_of({"weights": uri("application/x-tar", packed.getvalue())}, lambda url: b"")
    samples = samples_in(tar_file.data)
    assert [(file.name, file.data) for file in samples] == [("10_0.png", b"early"), ("20_0.png", b"late")]
    assert Path(samples[0].saved(tmp_path)).is_relative_to(tmp_path)


@pytest.mark.parametrize("member", [*ENDLESS.values(), lambda name: CHAIN, endless_map], ids=[*ENDLESS, "chain", "map"])
def test_a_crafted_tar_ends_the_search_for_samples(member: Callable[[str], bytes]) -> None:
    with at_most(5):
        assert len(samples_in(crafted(member("samples/10_0.png")))) <= 1


def test_a_file_keeps_its_bytes(tmp_path: Path) -> None:
    assert Path(Output("klora_7_0.png", "image/png", b"png").saved(tmp_path)).read_bytes() == b"png"
