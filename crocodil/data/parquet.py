"""Rows of parquet files, a few at a time. Damage costs one row group."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from crocodil.data.records import Record, Wanted, damage_counted

PARQUET_ERRORS = (OSError, pa.ArrowException, UnicodeDecodeError, OverflowError)
BATCH_BYTES = 2**20
BATCH_ROWS = (16, 1024)
BUFFER_BYTES = 2**20


def row_group_ranges(path: Path, shard_bytes: int) -> list[tuple[int, int, int]]:
    """Consecutive row groups of about `shard_bytes` together.

    Args:
        path: a parquet file.
        shard_bytes: bytes of a range, compressed; one row group may have more.

    Returns:
        First row group, the one behind the last, and bytes, of each range; nothing if the file is damaged.
    """
    try:
        metadata = pq.read_metadata(path)
        sizes = [max(metadata.row_group(group).total_byte_size, 0) for group in range(metadata.num_row_groups)]
    except PARQUET_ERRORS:
        return []
    # Of columns pyarrow tells compressed sizes, but at a damaged one it ends the process.
    compression = path.stat().st_size / max(sum(sizes), 1)
    ranges: list[tuple[int, int, int]] = []
    first, num_bytes = 0, 0.0
    for group, size in enumerate(sizes, 1):
        num_bytes += size * compression
        if num_bytes >= shard_bytes or group == len(sizes):
            ranges.append((first, group, round(num_bytes)))
            first, num_bytes = group, 0.0
    return ranges


def read_parquet(
    file: BinaryIO, wanted: Wanted, start: int = 0, first: int = 0, stop: int | None = None
) -> Iterator[tuple[int, str, Record]]:
    """Records of the rows of a range of row groups.

    Args:
        file: a parquet file.
        wanted: of each row.
        start: rows of the range that are passed over, whole row groups without being read.
        first: the range begins with this row group.
        stop: the range ends before this row group; None for the end of the file.

    Yields:
        Index of the row in the range; ":" and the number of the row in the file; the record.

    Raises:
        ValueError: if the file lacks a column or has something else than text in it.
    """
    with damage_counted(wanted.skipped, *PARQUET_ERRORS):
        table = pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
        _check_columns(table.schema_arrow, wanted, getattr(file, "name", "the file"))
        sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
        last = len(sizes) if stop is None else stop
        if last > len(sizes):
            raise OSError("the file has fewer row groups than when it was listed")
        row_in_file, index = sum(sizes[:first]), 0
        for group in range(first, last):
            passed = max(start - index, 0)
            if passed < sizes[group]:
                for row, record in _rows_of_group(table, group, wanted, passed):
                    yield index + row, f":{row_in_file + row}", record
            row_in_file, index = row_in_file + sizes[group], index + sizes[group]


def _rows_of_group(table: pq.ParquetFile, group: int, wanted: Wanted, start: int) -> Iterator[tuple[int, Record]]:
    columns = list(dict.fromkeys((wanted.text_column, *wanted.columns)))
    first_row = 0
    with damage_counted(wanted.skipped, *PARQUET_ERRORS):
        size = _batch_size(table.metadata.row_group(group))
        for batch in table.iter_batches(size, row_groups=[group], columns=columns, use_threads=False):
            passed = min(max(start - first_row, 0), batch.num_rows)
            values = [_values(batch.column(name).slice(passed)) for name in columns]
            for row, cells in enumerate(zip(*values, strict=True), first_row + passed):
                if (record := _of_cells(columns, cells, wanted)) is not None:
                    yield row, record
            first_row += batch.num_rows


def _batch_size(group: pq.RowGroupMetaData) -> int:
    fewest, most = BATCH_ROWS
    return min(max(BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1), fewest), most)


def _values(column: pa.Array) -> list[Any]:
    """Python values, strings as bytes: pyarrow decodes them without asking whether they are UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_text(column.type):
        column = column.cast(pa.large_binary())
    elif _is_list(column.type) and _is_text(column.type.value_type):
        column = column.cast(pa.list_(pa.large_binary()))
    return column.to_pylist()


def _of_cells(columns: list[str], cells: tuple[Any, ...], wanted: Wanted) -> Record | None:
    try:
        row = {column: _decoded(cell) for column, cell in zip(columns, cells, strict=True)}
    except UnicodeDecodeError:
        wanted.skipped.not_utf8 += 1
        return None
    return wanted.of_row(row)


def _decoded(cell: Any) -> Any:
    if isinstance(cell, bytes):
        return cell.decode()
    return [_decoded(item) for item in cell] if isinstance(cell, list) else cell


def _check_columns(schema: pa.Schema, wanted: Wanted, name: str) -> None:
    for column in (wanted.text_column, *wanted.columns):
        if schema.names.count(column) != 1:
            raise ValueError(f"{name} must have one column {column!r}, got {', '.join(schema.names)}: name another.")
        kind = schema.field(column).type
        if column == wanted.text_column and not (_is_text(_plain_type(kind)) or pa.types.is_null(kind)):
            raise ValueError(f"column {column!r} of {name} must hold text, got {kind}: name another.")
        if not _is_plain(kind) and not (_is_list(kind) and _is_plain(kind.value_type)):
            raise ValueError(f"column {column!r} of {name} must hold strings, numbers or lists of them, got {kind}.")


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_plain(kind: pa.DataType) -> bool:
    kind = _plain_type(kind)
    tests = (_is_text, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_null)
    return any(test(kind) for test in tests)


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return any(test(kind) for test in (*tests, *binary))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)
