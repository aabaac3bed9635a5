"""Rows of a parquet file are pictures with captions; without pyarrow the sentence says what to do."""

import io
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from klora.training.dataset import read_upload
from test_folder.uploads.packing import PNG, in_zip, reasons, refusal


def test_parquet_without_pyarrow_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert refusal(in_zip(tmp_path, {"t.parquet": b"PAR1"})) == (
        "input_images holds a parquet file, and pyarrow is not installed. Install it, or send images and captions."
    )


class Table:
    """What pyarrow.parquet.ParquetFile is asked for, over rows of our own.

    chunks: bytes that each column is said to unpack to, by its path.   read: the rows that were unpacked.
    """

    rows: list[dict[str, Any]]
    chunks: dict[str, int]
    read: list[dict[str, Any]]

    def __init__(self, _: io.BytesIO) -> None:
        sizes = [types.SimpleNamespace(path_in_schema=k, total_uncompressed_size=n) for k, n in self.chunks.items()]
        group = types.SimpleNamespace(num_columns=len(sizes), column=sizes.__getitem__)
        self.metadata = types.SimpleNamespace(num_row_groups=1, row_group=[group].__getitem__)
        self.schema_arrow = types.SimpleNamespace(names=list(self.rows[0]))

    def iter_batches(self, batch_size: int, columns: list[str]) -> Iterator[Any]:
        rows = [{name: row[name] for name in columns} for row in self.rows]
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            self.read.extend(batch)
            yield types.SimpleNamespace(to_pylist=batch.copy)


Install = Callable[..., type[Table]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """A pyarrow that finds these rows in whatever it opens."""

    def installed(rows: list[dict[str, Any]], **chunks: int) -> type[Table]:
        table = type("Table", (Table,), {"rows": rows, "chunks": chunks, "read": []})
        monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=table))
        return table

    return installed


PARQUETS = [
    [{"image": {"bytes": PNG, "path": "x"}, "text": "one"}, {"image": {"bytes": None, "path": "y"}, "text": "two"}],
    [{"id": 1, "image": PNG, "action": "one"}, {"id": 2, "image": None, "action": None}],
    [{"image": PNG, "prompt": "one"}, {"image": None, "prompt": None}],
]


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("rows", PARQUETS)
def test_rows_of_a_parquet_file_are_pictures_with_captions(
    tmp_path: Path, install: Install, rows: list[dict[str, Any]], real: bool
) -> None:
    if real:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        buffer = io.BytesIO()
        parquet.write_table(arrow.Table.from_pylist(rows), buffer)
        data = buffer.getvalue()
    else:
        install(rows)
        data = b"PAR1"
    pictures, skipped = read_upload(in_zip(tmp_path, {"t.parquet": data}))
    assert [(p.name, p.data, p.caption) for p in pictures] == [("t.parquet/000000", PNG, "one")]
    assert "t.parquet/000001" in reasons(skipped)


def test_a_damaged_parquet_file_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    _, skipped = read_upload(in_zip(tmp_path, {"a.png": PNG, "t.parquet": b"PAR1" + bytes(100)}))
    assert reasons(skipped)["t.parquet"].startswith("is damaged: ")


def test_rows_that_share_a_value_are_unpacked_one_at_a_time(tmp_path: Path, install: Install) -> None:
    """A dictionary holds it once, and says nothing of the copies that its rows become."""
    table = install([{"image": bytes(9 << 20)}] * 16, image=9 << 20)
    assert "Expected at most 100 for each" in refusal(in_zip(tmp_path, {"t.parquet": b"PAR1"}))
    assert len(table.read) == 2


def test_a_parquet_file_that_says_to_be_too_large_is_refused_unread(tmp_path: Path, install: Install) -> None:
    table = install([{"image": PNG, "vector": PNG}], **{"image.bytes": 20 << 20, "vector": 0})
    assert "Expected at most 100 for each" in refusal(in_zip(tmp_path, {"t.parquet": b"PAR1"}))
    assert not table.read


def test_columns_that_are_not_read_count_for_nothing(tmp_path: Path, install: Install) -> None:
    install([{"image": PNG, "vector": PNG}], image=len(PNG), vector=20 << 20)
    assert len(read_upload(in_zip(tmp_path, {"t.parquet": b"PAR1"}))[0]) == 1


def test_a_parquet_file_of_one_shared_value_is_refused_by_the_library_itself(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for size in (9 << 20, 20 << 20):
        buffer, shared = io.BytesIO(), arrow.array([bytes(size)], arrow.binary())
        images = arrow.DictionaryArray.from_arrays(arrow.array([0] * 16, arrow.int32()), shared)
        parquet.write_table(arrow.table({"image": images}), buffer, compression="zstd", store_schema=False)
        assert "Expected at most 100 for each" in refusal(in_zip(tmp_path, {"t.parquet": buffer.getvalue()}))
