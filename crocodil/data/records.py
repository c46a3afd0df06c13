"""What a corpus takes from one row of a table or one document: its text, and the columns asked for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from crocodil.data.corpora import SkipCount, fit_text

Record = dict[str, Any]
"""A document: "text", "name" (stable, relative, with forward slashes), "folder", and the columns asked for."""

BYTE_ORDER_MARK = "\ufeff"
OWN_KEYS = frozenset({"text", "name", "folder"})


@dataclass(frozen=True)
class Wanted:
    """What is wanted of each record, and where those are counted that do not have it.

    Args:
        text_column: where rows of a table have their text.
        columns: further columns, which every record must have.
        max_bytes: bytes of a record at most: of a line of JSON lines, else of a text.
        skipped: counts what is left out.

    Raises:
        ValueError: if a column has a name that every record has by itself.
    """

    text_column: str
    columns: Sequence[str]
    max_bytes: int
    skipped: SkipCount

    def __post_init__(self) -> None:
        if taken := sorted(OWN_KEYS.intersection(self.columns)):
            raise ValueError(
                f"columns must not be named {', '.join(sorted(OWN_KEYS))}, which records have by themselves, "
                f"got {taken[0]!r}: leave it out or rename it in the files."
            )

    def of_document(self, content: bytes) -> Record | None:
        """The record of a file or a member of an archive, or None if it is unfit.

        Args:
            content: the document, or more than `max_bytes` bytes of it.
        """
        if self.columns:
            self.skipped.missing_values += 1
            return None
        text = fit_text(content, self.skipped, self.max_bytes)
        return None if text is None else {"text": text}

    def of_row(self, row: Mapping[str, Any]) -> Record | None:
        """The record of a row of a table, or None if it is unfit.

        Args:
            row: values by column.
        """
        text = row.get(self.text_column)
        if isinstance(text, str):
            text = text.removeprefix(BYTE_ORDER_MARK)
        if not self.skipped.accepts(text, self.max_bytes):
            return None
        record = {"text": text}
        for column in self.columns:
            if column not in row or not _is_plain(row[column]):
                self.skipped.missing_values += 1
                return None
            record[column] = row[column]
        return record


def _is_plain(value: object) -> bool:
    """Whether this is a string, a number, a truth value, None or a list of those, and its strings are UTF-8."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            if not item.isascii() and item.encode(errors="ignore").decode() != item:
                return False
        elif not isinstance(item, int | float | None):
            return False
    return True


@contextmanager
def damage_counted(skipped: SkipCount, *errors: type[Exception]) -> Iterator[None]:
    """Ends what is being read at one of these errors, and counts the damage."""
    try:
        yield
    except errors:
        skipped.damaged += 1
