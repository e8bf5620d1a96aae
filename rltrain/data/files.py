"""Data files as rows: JSON, JSON lines, CSV, TSV (plain or compressed), parquet and arrow."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rltrain.data.columns import Row
from rltrain.errors import ConfigError, require

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TEXT_FORMATS = (".jsonl", ".ndjson", ".json", *DELIMITERS)
TABLE_FORMATS = (".parquet", ".arrow", ".feather")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
FORMATS = f"{', '.join((*TEXT_FORMATS, *TABLE_FORMATS))}, and text compressed as {', '.join(COMPRESSIONS)}"
LONGEST_FIELD = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line of a file that is no row, counted from 1, and why."""

    line: int
    reason: str


def split_suffixes(path: Path) -> tuple[str, str]:
    """Format and compression by name, in lower case: ``x.JSONL.gz`` is (".jsonl", ".gz")."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-1] if suffixes else ""), compression


def names_a_file(path: Path) -> bool:
    """Whether a path is a file, or is spelled like one that could be read."""
    suffix, compression = split_suffixes(path)
    spelled = suffix in (*TEXT_FORMATS, *TABLE_FORMATS) or bool(compression)
    return path.is_file() or (spelled and not path.is_dir())


def read_file(path: Path) -> Any:
    """The rows of a file, of text formats with a :class:`BadLine` for each line that is none; ConfigError otherwise."""
    suffix, compression = split_suffixes(path)
    require(path.is_file(), f"data.path={path}: no such file; give a file, a folder or a hub name")
    known = suffix in TEXT_FORMATS or (suffix in TABLE_FORMATS and not compression)
    written = "".join(path.suffixes[-2:]) if compression else path.suffix
    require(known, f"data.path={path}: {written or 'a name without a suffix'} is no format to read; use {FORMATS}")
    require(path.stat().st_size > 0, f"data.path={path}: the file is empty (0 bytes)")
    try:
        if suffix in TABLE_FORMATS:
            return _table(path, suffix)
        text = _decoded(_unpacked(path, compression), path)
        return _delimited(text, DELIMITERS[suffix]) if suffix in DELIMITERS else _json_rows(text, suffix)
    except ConfigError:
        raise
    except Exception as error:  # readers fail in many ways; the message must be one line
        cause = (str(error).splitlines() or [""])[0]
        raise ConfigError(
            f"data.path={path}: cannot be read as {(suffix + compression)[1:]} ({type(error).__name__}: {cause}); "
            "mend the file, or name it by its format"
        ) from error


def _unpacked(path: Path, compression: str) -> bytes:
    if compression == ".zst":
        import pyarrow

        require(pyarrow.Codec.is_available("zstd"), f"data.path={path}: this pyarrow reads no zstd; unpack the file")
        with pyarrow.input_stream(str(path), compression="zstd") as stream:
            return stream.read()
    unpack: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".bz2": bz2.decompress}
    unpack |= {".xz": lzma.decompress, "": bytes}
    return unpack[compression](path.read_bytes())


def _decoded(data: bytes, path: Path) -> str:
    """UTF-8, or UTF-16 where a byte order mark says so; the mark is no text."""
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf_16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"data.path={path}: line {line} is not {error.encoding}; save the file as UTF-8") from error


def _json_rows(text: str, suffix: str) -> list[Row | BadLine]:
    """One array of objects, one object, an object of columns, or an object a line, whatever the name says."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        if suffix == ".json" and text.lstrip().startswith("["):
            raise
        lines = enumerate(text.split("\n"), start=1)
        return [_json_line(line, number) for number, line in lines if line.strip()]
    values = whole if isinstance(whole, list) else _by_column(whole) or [whole]
    return [
        value if isinstance(value, dict) else BadLine(line=number, reason="no JSON object")
        for number, value in enumerate(values, start=1)
    ]


def _by_column(whole: Any) -> list[Row]:
    """The rows of ``{column: [values]}`` or ``{column: {"0": value}}``, as pandas writes them; [] of another object."""
    columns = list(whole.values()) if isinstance(whole, dict) else []
    numbered = [column for column in columns if isinstance(column, dict) and all(map(str.isdecimal, column))]
    if columns and len(numbered) == len(columns) and all(column.keys() == columns[0].keys() for column in columns):
        return [{name: column[row] for name, column in whole.items()} for row in columns[0]]
    lists = [column for column in columns if isinstance(column, list) and len(column) == len(columns[0])]
    scalars = all(not isinstance(value, (list, dict)) for column in lists for value in column)
    if len(lists) < len(columns) or not scalars:
        return []
    return [dict(zip(whole, values, strict=True)) for values in zip(*lists, strict=True)]


def _json_line(line: str, number: int) -> Row | BadLine:
    try:
        value = json.loads(line.lstrip("\ufeff"))  # files joined end to end have a mark inside, too
    except (ValueError, RecursionError):
        return BadLine(line=number, reason="not JSON")
    return value if isinstance(value, dict) else BadLine(line=number, reason="no JSON object")


def _delimited(text: str, delimiter: str) -> list[Row | BadLine]:
    """Every field as the text it is. A line with more or fewer fields than the header is none."""
    csv.field_size_limit(LONGEST_FIELD)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [(reader.line_num, fields) for fields in reader if fields]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error
    if not lines:
        return []
    header = lines[0][1]
    if repeated := sorted({name for name in header if header.count(name) > 1}):
        raise ValueError(f"the header names column {repeated[0]!r} twice")
    return [
        dict(zip(header, fields, strict=True))
        if len(fields) == len(header)
        else BadLine(line=number, reason=f"not the {len(header)} fields of the header")
        for number, fields in lines[1:]
    ]


def _table(path: Path, suffix: str) -> Any:
    """Not through the builder, which would write a second copy of the file to the cache."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    if suffix == ".parquet":
        return datasets.Dataset(pyarrow.parquet.read_table(path))
    with pyarrow.memory_map(str(path)) as source:
        try:
            table = pyarrow.ipc.open_file(source).read_all()
        except pyarrow.ArrowInvalid:  # what datasets writes is a stream, without a footer
            source.seek(0)
            table = pyarrow.ipc.open_stream(source).read_all()
    return datasets.Dataset(table)


def column_names(rows: Sequence[Row | BadLine]) -> list[str]:
    """The columns of a table; of objects, every name that one has."""
    if hasattr(rows, "column_names"):
        return list(rows.column_names)  # type: ignore[attr-defined]
    return sorted({name for row in rows if not isinstance(row, BadLine) for name in row})
