"""Rows of a parquet file are pictures with captions; without pyarrow the sentence says what to do."""

import io
import sys
import types
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
    """What pyarrow.parquet.ParquetFile is asked for, over rows of our own."""

    rows: list[dict[str, Any]]

    def __init__(self, _: io.BytesIO) -> None:
        self.schema_arrow = types.SimpleNamespace(names=list(self.rows[0]))

    def iter_batches(self, batch_size: int, columns: list[str]) -> list[Any]:
        rows = [{name: row[name] for name in columns} for row in self.rows]
        return [types.SimpleNamespace(to_pylist=lambda: rows[:1]), types.SimpleNamespace(to_pylist=lambda: rows[1:])]


PARQUETS = [
    [{"image": {"bytes": PNG, "path": "x"}, "text": "one"}, {"image": {"bytes": None, "path": "y"}, "text": "two"}],
    [{"id": 1, "image": PNG, "action": "one"}, {"id": 2, "image": None, "action": None}],
]


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("rows", PARQUETS)
def test_rows_of_a_parquet_file_are_pictures_with_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], real: bool
) -> None:
    if real:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        buffer = io.BytesIO()
        parquet.write_table(arrow.Table.from_pylist(rows), buffer)
        data = buffer.getvalue()
    else:
        table = type("Table", (Table,), {"rows": rows})
        monkeypatch.setitem(sys.modules, "pyarrow", types.ModuleType("pyarrow"))
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", types.SimpleNamespace(ParquetFile=table))
        data = b"PAR1"
    pictures, skipped = read_upload(in_zip(tmp_path, {"t.parquet": data}))
    assert [(p.name, p.data, p.caption) for p in pictures] == [("t.parquet/000000", PNG, "one")]
    assert "t.parquet/000001" in reasons(skipped)


def test_a_damaged_parquet_file_is_reported(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    _, skipped = read_upload(in_zip(tmp_path, {"a.png": PNG, "t.parquet": b"PAR1" + bytes(100)}))
    assert reasons(skipped)["t.parquet"].startswith("is damaged: ")
