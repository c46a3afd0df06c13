"""Rows of JSON files: one object a line, or a file that is one array."""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from crocodil.data.records import BYTE_ORDER_MARK, Record, Wanted
from crocodil.data.streams import bounded_lines

MAX_ARRAY_BYTES = 2**26
NOT_JSON = (ValueError, RecursionError)  # UnicodeDecodeError is a ValueError


def read_json_lines(
    file: BinaryIO, wanted: Wanted, start: int = 0, first: int = 0, stop: int | None = None
) -> Iterator[tuple[int, str, Record]]:
    """Records of the lines that begin in a range of bytes.

    Args:
        file: JSON lines, uncompressed.
        wanted: of each line.
        start: lines of the range that are passed over without being parsed.
        first: see `bounded_lines`.
        stop: see `bounded_lines`.

    Yields:
        Index of the line in the range; "@" and the byte at which the line begins in the file; the record.
    """
    for index, (place, line) in enumerate(bounded_lines(file, wanted.max_bytes, first, stop)):
        if index < start:
            continue
        if line is None:
            wanted.skipped.too_large += 1
        elif (record := _of_line(line, wanted)) is not None:
            yield index, f"@{place}", record


def _of_line(line: bytes, wanted: Wanted) -> Record | None:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        wanted.skipped.not_utf8 += 1
        return None
    if "\0" in text:
        wanted.skipped.null_bytes += 1
        return None
    if text.isspace():
        wanted.skipped.empty += 1
        return None
    try:
        return _of_value(json.loads(text.removeprefix(BYTE_ORDER_MARK)), wanted)
    except NOT_JSON:
        wanted.skipped.not_json += 1
        return None


def _of_value(value: Any, wanted: Wanted) -> Record | None:
    if not isinstance(value, dict):
        wanted.skipped.not_json += 1
        return None
    return wanted.of_row(value)


def read_values(values: list[Any], wanted: Wanted, start: int = 0) -> Iterator[tuple[int, str, Record]]:
    """Records of the items of an array.

    Args:
        values: the items.
        wanted: of each item.
        start: items that are passed over.

    Yields:
        Index of the item; ":" and the index; the record.
    """
    for index, value in enumerate(values[start:], start):
        if (record := _of_value(value, wanted)) is not None:
            yield index, f":{index}", record


def values_of_file(file: BinaryIO, name: str) -> list[Any] | None:
    """The items of a file that is one JSON array, or the one object that it is; None if it has JSON lines.

    Args:
        file: at its beginning; it is read up to `MAX_ARRAY_BYTES`.
        name: of the file, for messages.

    Raises:
        ValueError: if it is one array or object, and larger.
    """
    head = file.readline(MAX_ARRAY_BYTES)
    if is_object(head):
        return None
    content = head + file.read(MAX_ARRAY_BYTES + 1 - len(head))
    if len(content) > MAX_ARRAY_BYTES:
        if content.lstrip().startswith(b"[") or head.strip() == b"{":
            raise ValueError(
                f"{name} must have one JSON object a line, got one array or object of more than {MAX_ARRAY_BYTES} "
                "bytes: write it as JSON lines, for example with `jq -c '.[]'`."
            )
        return None
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except NOT_JSON:
        return None
    return value if isinstance(value, list) else [value]


def is_object(line: bytes) -> bool:
    """Whether a line is one JSON object.

    Args:
        line: any bytes.
    """
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except NOT_JSON:
        return False
