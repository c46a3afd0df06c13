"""Where the text of a corpus comes from: local files in many formats, or datasets of the Hugging Face hub."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from crocodil.data.corpora import SkipCount, SourceFile, Split, folder_files, split_of, standard_library_files
from crocodil.data.readers import Record, Shard, list_shards, read_shard

HUB_SHARD_BYTES = 2**28  # what a shard of a hub dataset is taken to hold, for progress bars


@dataclass(frozen=True)
class Source:
    """One source of documents: local files, or a dataset of the hub; without either, the standard library.

    Args:
        path: a file or folder: parquet, JSON lines, archives and plain text, compressed or not
            (docs/data.md lists the formats).
        pattern: glob pattern of the files below a folder.
        hub: id of a dataset of the Hugging Face hub, such as "bigcode/starcoderdata", or a format of `datasets` such as
            "parquet" together with `data_files`.
        config: name of a configuration of that dataset.
        data_dir: folder within that dataset, such as "python".
        data_files: files within that dataset.
        revision: of that dataset: a commit, tag or branch.
        hub_split: its split to read; validation and test texts are split off from it.
        column: where rows of a table have their text ("content" in StarCoder).
        keep: for each column the values that are kept, such as {"license": ["mit", "apache-2.0"]}; of a column that
            holds lists, one kept value is enough; numbers are compared as text.
        weight: share of the source, in units of the other sources' weights: of the rows of an epoch, of the documents
            of a stream; None in all of them reads every document once.

    Raises:
        ValueError: if path and hub are both given, or the weight is negative or not finite.
    """

    path: str | None = None
    pattern: str = "**/*"
    hub: str | None = None
    config: str | None = None
    data_dir: str | None = None
    data_files: list[str] | None = None
    revision: str | None = None
    hub_split: str = "train"
    column: str = "text"
    keep: dict[str, list[str]] = field(default_factory=dict)
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.path is not None and self.hub is not None:
            raise ValueError(f"a source is local or of the hub, got path {self.path!r} and hub {self.hub!r}.")
        if self.weight is not None and not 0 <= self.weight < inf:
            raise ValueError(f"the weight of a source must be finite and at least 0, got {self.weight}.")

    def files(self) -> list[SourceFile]:
        """The local files, sorted by name; none of a hub dataset.

        Raises:
            ValueError: if there are none.
        """
        if self.hub is not None:
            return []
        if self.path is None:
            return standard_library_files()
        path = Path(self.path).expanduser()
        if path.is_file():
            return [SourceFile(path.resolve(), path.name)]  # a link that is named is meant
        visible = [file for file in folder_files(path, self.pattern) if not _is_hidden(file.name)]
        if not visible:
            raise ValueError(f"path must hold files that match {self.pattern!r}, got none in {self.path!r}.")
        return visible

    def open(self) -> "Reader":
        """What reads the source.

        Raises:
            ValueError: if there is nothing to read, or no right to.
        """
        return HubReader(self) if self.hub is not None else FileReader(list_shards(self.files()))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


class Reader(Protocol):
    """Shards of a source, which can be read independently of one another. It can be pickled."""

    def names(self) -> list[str]:
        """Names of the shards, the same on every machine."""

    def sizes(self) -> list[int]:
        """Bytes of the shards, roughly."""

    def read(
        self, shard: int, column: str, columns: Sequence[str], skipped: SkipCount, start: int = 0
    ) -> Iterator[tuple[int, Record]]:
        """(index, record) of a shard from record `start` on; unfit ones are counted as skipped, but have an index."""


@dataclass(frozen=True)
class FileReader:
    """Reads local files."""

    shards: list[Shard]

    def names(self) -> list[str]:
        """See `Reader`."""
        return [shard.name for shard in self.shards]

    def sizes(self) -> list[int]:
        """See `Reader`."""
        return [shard.num_bytes for shard in self.shards]

    def read(
        self, shard: int, column: str, columns: Sequence[str], skipped: SkipCount, start: int = 0
    ) -> Iterator[tuple[int, Record]]:
        """See `Reader`."""
        return read_shard(self.shards[shard], column, columns, skipped, start)


class HubReader:
    """Streams a dataset of the hub; nothing is stored but what `datasets` keeps of its metadata.

    Args:
        source: names the dataset.

    Raises:
        ValueError: if the dataset is not there, gated, or cannot be reached.
    """

    def __init__(self, source: Source) -> None:
        from datasets import load_dataset  # a slow import

        assert source.hub is not None
        options = {"data_dir": source.data_dir, "data_files": source.data_files, "revision": source.revision}
        try:
            self.dataset = load_dataset(
                source.hub,
                source.config,
                split=source.hub_split,
                streaming=True,
                **{name: value for name, value in options.items() if value is not None},
            )
        except Exception as error:  # each back end of the hub client has errors of its own
            raise ValueError(explain(source.hub, error)) from error
        self.hub = source.hub

    def _rows(self, shard: int, start: int) -> Iterator[dict[str, Any]]:
        dataset = self.dataset.shard(num_shards=self.dataset.num_shards, index=shard)
        # Its own `__iter__` would deal the shard out to the workers of a DataLoader once more: most would get nothing.
        batches = (dataset.skip(start) if start else dataset).iter(batch_size=1)
        try:
            for batch in batches:
                yield {name: values[0] for name, values in batch.items()}
        except Exception as error:  # see above
            raise ValueError(explain(self.hub, error)) from error

    def names(self) -> list[str]:
        """See `Reader`."""
        return [f"{self.hub}, shard {i}" for i in range(self.dataset.num_shards)]

    def sizes(self) -> list[int]:
        """See `Reader`."""
        return [HUB_SHARD_BYTES] * self.dataset.num_shards

    def read(
        self, shard: int, column: str, columns: Sequence[str], skipped: SkipCount, start: int = 0
    ) -> Iterator[tuple[int, Record]]:
        """See `Reader`."""
        name = self.names()[shard]
        for index, row in enumerate(self._rows(shard, start), start):
            if absent := [wanted for wanted in (column, *columns) if wanted not in row]:
                raise ValueError(f"{self.hub} must have the column {absent[0]!r}, got {', '.join(row)}: name another.")
            text = row[column]
            if skipped.accepts(text):
                yield index, {**{c: row[c] for c in columns}, "text": text, "name": f"{name}:{index}", "folder": name}


def explain(hub: str, error: Exception) -> str:
    """One sentence about a dataset that cannot be read: what to do, above all where access is gated."""
    told = list(_causes(error))
    reason = next((lines[0] for lines in (str(each).strip().splitlines() for each in told) if lines), repr(error))
    terms = f"accept its terms at https://huggingface.co/datasets/{hub}, then run `hf auth login` or set HF_TOKEN"
    if any(isinstance(each, GatedRepoError) or "gated dataset" in str(each) for each in told):
        return f"the dataset {hub} is gated: {terms} to a token of that account ({reason})"
    if any(isinstance(each, RepositoryNotFoundError) or "cannot be accessed" in str(each) for each in told):
        return f"there is no dataset {hub}, or it is private: check its name, or run `hf auth login` ({reason})"
    return f"the dataset {hub} cannot be read ({reason}): check its name, or download it and give its folder as path"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class Document(NamedTuple):
    """A text of a corpus, and where it is from: a shard, counted over all sources, and a record of the shard."""

    text: str
    split: Split
    shard: int
    record: int


@dataclass(frozen=True)
class Splitting:
    """Which split a document is of: a stable hash of one of its values decides, so that new files move no old document.

    Args:
        split_by: "text", so that equal texts never part; "name" of the file or record; "folder", the first part of a
            file's name, so that a package stays together; or a column.
        val_percent: of the documents, in [0, 100].
        test_percent: likewise.
    """

    split_by: str = "text"
    val_percent: float = 5.0
    test_percent: float = 5.0

    def __call__(self, record: Mapping[str, Any]) -> Split:
        """The split of a record."""
        return split_of(str(record[self.split_by]), self.val_percent, self.test_percent)


class Corpus:
    """All sources of a corpus; their shards are counted through.

    Args:
        sources: in a fixed order.
        splitting: of their documents.
    """

    def __init__(self, sources: Sequence[Source], splitting: Splitting) -> None:
        self.sources, self.splitting = sources, splitting
        self.readers = [source.open() for source in sources]
        names = [reader.names() for reader in self.readers]
        self.shards = [(source, shard) for source, of_it in enumerate(names) for shard in range(len(of_it))]
        self.names = [name for of_it in names for name in of_it]
        self.sizes = [size for reader in self.readers for size in reader.sizes()]

    def shards_of(self, source: int) -> list[int]:
        """Numbers of a source's shards."""
        return [number for number, (of, _) in enumerate(self.shards) if of == source]

    def documents(self, shard: int, skipped: SkipCount, start: int = 0) -> Iterator[Document]:
        """The documents of one shard that its source keeps, in order.

        Args:
            shard: its number.
            skipped: what is left out is counted here.
            start: the first record to read.
        """
        source, place = self.shards[shard]
        settings = self.sources[source]
        own = {"text", "name", "folder"}
        columns = [name for name in dict.fromkeys((*settings.keep, self.splitting.split_by)) if name not in own]
        for index, record in self.readers[source].read(place, settings.column, columns, skipped, start):
            if keeps(record, settings.keep):
                yield Document(record["text"], self.splitting(record), shard, index)
            else:
                skipped.filtered += 1


def keeps(record: Mapping[str, Any], keep: Mapping[str, Sequence[str]]) -> bool:
    """Whether each of the columns holds one of its kept values; see `Source`."""
    for column, allowed in keep.items():
        value = record[column]
        values = value if isinstance(value, list | tuple) else [value]
        if not any(str(item) in allowed for item in values):
            return False
    return True
