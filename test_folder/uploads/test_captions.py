"""Whose a caption is, in a text, a table or metadata, and what is said of those that are nobody's."""

import json
from pathlib import Path

import pytest

from klora.training.dataset import CAPTION_KEYS, FILE_KEYS, read_upload
from test_folder.uploads.packing import PNG, Files, in_tar, in_zip, reasons


def captions(path: Path, files: Files) -> dict[str, str | None]:
    return {picture.name: picture.caption for picture in read_upload(in_zip(path, files))[0]}


def test_a_caption_belongs_to_the_picture_of_its_name_or_stem_in_its_folder(tmp_path: Path) -> None:
    files = dict.fromkeys(["a/1.png", "b/1.png", "a/2.v2.png", "B/X.PNG"], PNG)
    texts = {"a/1.txt": b"a one", "b/1.png.txt": b" b\r\none ", "a/2.v2.txt": b"two", "B/x.TXT": b"x"}
    assert captions(tmp_path, {**files, **texts}) == {
        "a/1.png": "a one", "a/2.v2.png": "two", "b/1.png": "b one", "B/X.PNG": "x",
    }  # fmt: skip


def test_case_tells_files_apart_where_both_exist(tmp_path: Path) -> None:
    files = {"A.png": PNG, "a.png": PNG}
    table = b"caption,image\nlarge,A.png\nsmall,a.png\n"
    for texts in ({"A.txt": b"large", "a.txt": b"small"}, {"captions.csv": table}):
        assert captions(tmp_path, {**files, **texts}) == {"A.png": "large", "a.png": "small"}
    assert captions(tmp_path, {**files, "a.txt": b"small"}) == {"A.png": None, "a.png": "small"}


@pytest.mark.parametrize(
    ("data", "caption"),
    [
        ("smörgås".encode(), "smörgås"), (b"\xef\xbb\xbf" + "smörgås".encode(), "smörgås"),
        ("smörgås".encode("latin-1"), "smörgås"), ("smörgås".encode("utf-16"), "smörgås"),
        ("smörgås".encode("utf-16-le"), "smörgås"), ("smörgås".encode("utf-16-be"), "smörgås"),
        ("‘smörgås’".encode("cp1252"), "‘smörgås’"), (b"a\x81b", "a�b"),
        (b"BMW on a road", "BMW on a road"), (b" \n", None),
    ],
)  # fmt: skip
def test_a_text_is_read_whatever_wrote_it(tmp_path: Path, data: bytes, caption: str | None) -> None:
    assert captions(tmp_path, {"a.png": PNG, "a.txt": data}) == {"a.png": caption}


def test_metadata_and_tables_name_files_in_their_own_folder(tmp_path: Path) -> None:
    pictures = dict.fromkeys(["a.png", "x/a.png", "x/b, c.png", "x/d.png", "x/y/e.png"], PNG)
    table = 'caption,image_file\n"one, two",a.png\n"a ""quoted"" word","b, c.png"\n'.encode("utf-8-sig")
    lines = [{"file_name": "d.png", "text": "dee"}, {"file_name": "./y/e.png", "prompt": "eee"}]
    metadata = "\n\n".join(json.dumps(line) for line in lines).encode()
    assert captions(tmp_path, {**pictures, "x/My_Captions.csv": table, "x/metadata.jsonl": metadata}) == {
        "a.png": None, "x/a.png": "one, two", "x/b, c.png": 'a "quoted" word', "x/d.png": "dee", "x/y/e.png": "eee",
    }  # fmt: skip


@pytest.mark.parametrize("column", ["image_file", "file_name", "image", "filename"])
def test_a_table_may_call_its_files_so(tmp_path: Path, column: str) -> None:
    table = f"{column},caption\na.png,here\n".encode()
    assert captions(tmp_path, {"a.png": PNG, "caption.csv": table}) == {"a.png": "here"}


def test_captions_are_found_where_other_trainers_look_for_them(tmp_path: Path) -> None:
    files = {**dict.fromkeys(["a.png", "b.png", "x/c.png"], PNG), "a.caption": b"ay", "b.png.caption": b"bee"}
    table = b"file_name,text\na.png,another\nc.png,see\n"
    assert captions(tmp_path, {**files, "x/metadata.csv": table}) == {"a.png": "ay", "b.png": "bee", "x/c.png": "see"}


@pytest.mark.parametrize("name", ["captions.csv", "metadata.csv"])
@pytest.mark.parametrize(
    ("table", "lacking"),
    [(b"a.png,a dog\n", FILE_KEYS), (b"", FILE_KEYS), (b"text\nx\n", FILE_KEYS), (b"file_name,x\n", CAPTION_KEYS)],
)
def test_a_table_without_a_header_is_reported(
    tmp_path: Path, name: str, table: bytes, lacking: tuple[str, ...]
) -> None:
    _, skipped = read_upload(in_zip(tmp_path, {"a.png": PNG, name: table}))
    said = f"cannot be read: its first line names no column {', '.join(lacking)}"
    assert reasons(skipped) == {name: " or ".join(said.rsplit(", ", 1))}


def test_an_empty_cell_is_no_caption_and_another_table_is_none(tmp_path: Path) -> None:
    files = {"a.png": PNG, "caption.csv": b"caption,image\n ,a.png\n", "table.csv": b"caption,image\nx,a.png\n"}
    pictures, skipped = read_upload(in_zip(tmp_path, files))
    assert [p.caption for p in pictures] == [None]
    assert [item.name for item in skipped] == ["table.csv"]


def test_the_nearest_caption_stays_and_the_others_are_reported(tmp_path: Path) -> None:
    files = {
        "z.png": PNG, "z.txt": b"text", "metadata.jsonl": b'{"file_name": "z.png", "caption": "metadata"}',
        "captions.csv": b"caption,image\ntable,z.png\n",
    }  # fmt: skip
    pictures, skipped = read_upload(in_zip(tmp_path, files))
    assert [p.caption for p in pictures] == ["text"]
    assert reasons(skipped) == dict.fromkeys(
        ["metadata.jsonl", "captions.csv"], "has a caption for 'z.png', which has one"
    )


def test_a_caption_for_no_picture_is_reported(tmp_path: Path) -> None:
    files = {"a.png": PNG, "b.txt": b"lost", "x/a.txt": b"elsewhere", "captions.csv": b"caption,image\nlost,c.png\n"}
    pictures, skipped = read_upload(in_zip(tmp_path, files))
    assert [p.caption for p in pictures] == [None]
    assert reasons(skipped) == {
        "b.txt": "has a caption for 'b', which is no picture here",
        "captions.csv": "has a caption for 'c.png', which is no picture here",
        "x/a.txt": "has a caption for 'x/a', which is no picture here",
    }


def test_a_record_that_cannot_be_read_is_left_out_alone(tmp_path: Path) -> None:
    table = b"file_name,text\na.png,ay\nb.png\nc.png,see\n"
    pictures, skipped = read_upload(
        in_zip(tmp_path, {"captions.csv": table, **dict.fromkeys(["a.png", "b.png", "c.png"], PNG)})
    )
    assert [p.caption for p in pictures] == ["ay", None, "see"]
    assert reasons(skipped) == {"captions.csv": "record 2 is one without caption, text or prompt"}


def test_a_caption_is_not_cut_at_a_comma_that_no_quotes_keep(tmp_path: Path) -> None:
    table = b'image_file, caption\na.png, "a robot, at night"\nb.png, a robot, in snow\nc.png,a robot,,\n'
    files = {**dict.fromkeys(["a.png", "b.png", "c.png"], PNG), "captions.csv": table}
    pictures, skipped = read_upload(in_zip(tmp_path, files))
    assert [p.caption for p in pictures] == ["a robot, at night", None, "a robot"]
    said = "record 2 is one of more cells than the first line names, where a text with separators needs quotes"
    assert reasons(skipped) == {"captions.csv": said}


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_table_may_be_parted_as_a_spreadsheet_does_where_decimals_have_commas(tmp_path: Path, separator: str) -> None:
    rows = ["\ufefffile_name,text", 'a.png,"a robot; at night"', "b.png,snow"]
    table = "\r\n".join(row.replace(",", separator) for row in rows)
    table = table.replace("snow", words := "snow, ice, fog, rain, hail, wind")  # more commas than separators
    files = {**dict.fromkeys(["a.png", "b.png"], PNG), "captions.csv": table.encode()}
    assert captions(tmp_path, files) == {"a.png": "a robot; at night", "b.png": words}


def test_a_file_may_be_named_as_windows_does(tmp_path: Path) -> None:
    files = {"x/a.png": PNG, "metadata.jsonl": b'{"file_name": "x\\\\a.png", "text": "here"}'}
    assert captions(tmp_path, files) == {"x/a.png": "here"}


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_a_line_of_metadata_ends_where_json_lines_do(tmp_path: Path, separator: str) -> None:
    lines = [{"file_name": name, "text": f"one{separator}two"} for name in ("a.png", "b.png")]
    metadata = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
    files = {**dict.fromkeys(["a.png", "b.png"], PNG), "metadata.jsonl": metadata}
    assert captions(tmp_path, files) == {"a.png": "one two", "b.png": "one two"}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("metadata.jsonl", b"not json"), ("metadata.jsonl", b'["a.png", "x"]'), ("metadata.jsonl", b"[" * 100_000),
        ("metadata.jsonl", b'{"file_name": "a.png"}'), ("metadata.jsonl", b'{"file_name": 1, "text": "x"}'),
        ("caption.csv", b"name,words\na.png,x\n"), ("caption.csv", b"caption,image\n" + b"x" * 200_000 + b",a.png\n"),
        ("caption.csv", b"caption,image\nonly\n"), ("a.json", b'{"caption": 3}'), ("a.cls", b"7"), ("a.CLS", b"7"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "\\ud800"}'), ("a.json", b'{"caption": "a \\udfff"}'),
        ("a.txt", b"x" * ((16 << 20) + 1)),
    ],
)  # fmt: skip
def test_a_caption_file_that_cannot_be_read_is_reported(tmp_path: Path, name: str, data: bytes) -> None:
    pictures, skipped = read_upload(in_tar(tmp_path, {"a.png": PNG, name: data}))
    assert [p.caption for p in pictures] == [None]
    assert [(item.name, item.reason.split(":")[0]) for item in skipped] == [(name, "cannot be read")]
