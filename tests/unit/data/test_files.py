"""Files of every kind: read alike, or refused by name and line."""

import bz2
import gzip
import json
import lzma

import pytest

from rltrain.data.files import BadLine, read_file
from rltrain.data.hub import HubConfig, hub
from rltrain.errors import ConfigError

ROWS = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in ROWS)


def zst(data: bytes) -> bytes:
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def arrow(*, stream: bool) -> bytes:
    import pyarrow

    table, sink = pyarrow.Table.from_pylist(ROWS), pyarrow.BufferOutputStream()
    writer = (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(sink, table.schema)
    with writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), sink)
    return sink.getvalue().to_pybytes()


FILES = {
    "x.jsonl": LINES.encode(),
    "x.JSONL": LINES.encode(),
    "x.ndjson": LINES.encode(),
    "lines.json": LINES.encode(),
    "x.json": json.dumps(ROWS, indent=1).encode(),
    "array.jsonl": json.dumps(ROWS).encode(),
    "pretty.jsonl": json.dumps(ROWS, indent=1).encode(),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}).encode(),
    "pandas.json": json.dumps({name: {str(i): r[name] for i, r in enumerate(ROWS)} for name in ROWS[0]}).encode(),
    "mark.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "mark.json": b"\xef\xbb\xbf" + json.dumps(ROWS).encode(),
    "mark.csv": b"\xef\xbb\xbf" + CSV.encode(),
    "joined.jsonl": (LINES[: len(LINES) // 2].rpartition("\n")[0] + "\n").encode()
    + b"\xef\xbb\xbf"
    + LINES[len(LINES[: len(LINES) // 2].rpartition("\n")[0]) + 1 :].encode(),
    "windows.jsonl": LINES.replace("\n", "\r\n").encode(),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf16.csv": CSV.encode("utf-16"),
    "gaps.jsonl": ("\n" + LINES.replace("\n", "\n\n")).encode(),
    "x.csv": CSV.encode(),
    "x.CSV": CSV.replace("\n", "\r\n").encode(),
    "x.tsv": CSV.replace(",", "\t").encode(),
    "x.jsonl.gz": gzip.compress(LINES.encode()),
    "two.jsonl.gz": gzip.compress(LINES[:50].encode()) + gzip.compress(LINES[50:].encode()),
    "x.csv.gz": gzip.compress(CSV.encode()),
    "x.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "x.jsonl.xz": lzma.compress(LINES.encode()),
    "x.jsonl.zst": zst(LINES.encode()),
    "x.JSONL.GZ": gzip.compress(LINES.encode()),
    "file.arrow": arrow(stream=False),
    "stream.arrow": arrow(stream=True),
    "x.feather": arrow(stream=False),
    "x.parquet": parquet(),
    "x.PARQUET": parquet(),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    assert list(read_file(tmp_path / name)) == ROWS


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.txt", b"1+1", ".txt is no format to read; use .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow"),
        ("x.xlsx", b"PK", ".xlsx is no format to read"),
        ("x.parquet.gz", b"PK", ".parquet.gz is no format to read"),
        ("x.gz", b"PK", ".gz is no format to read"),
        ("problems", b"{}", "a name without a suffix is no format to read"),
        ("x.jsonl", b"", "the file is empty (0 bytes)"),
        ("x.parquet", b"", "the file is empty (0 bytes)"),
        ("x.jsonl", b"{}\n\xff", "line 2 is not utf-8; save the file as UTF-8"),
        ("x.csv", "q,a\né,1".encode("latin-1"), "line 2 is not utf-8; save the file as UTF-8"),
        ("x.json", b"[1, 2", "cannot be read as json (JSONDecodeError: Expecting ',' delimiter: line 1 column 6"),
        ("x.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "cannot be read as jsonl.gz (EOFError: "),
        ("x.jsonl.gz", LINES.encode(), "cannot be read as jsonl.gz (BadGzipFile: "),
        ("x.jsonl.zst", LINES.encode(), "cannot be read as jsonl.zst ("),
        ("x.parquet", LINES.encode(), "cannot be read as parquet (ArrowInvalid: "),
        ("x.arrow", LINES.encode(), "cannot be read as arrow (ArrowInvalid: "),
        ("x.csv", b'q,a\n"1,2\n3,4\n', "cannot be read as csv (ValueError: line 3: unexpected end of data"),
        ("x.csv", b"q,a,q\n1,2,3\n", "the header names column 'q' twice"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError) as error:
        read_file(tmp_path / name)
    assert str(error.value).startswith(f"data.path={tmp_path / name}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_lines_that_are_no_rows_are_counted_from_one(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a":\n\n[1]\n5\n{"a": 2}\n')
    assert read_file(tmp_path / "x.jsonl") == [
        {"a": 1},
        BadLine(line=2, reason="not JSON"),
        BadLine(line=4, reason="no JSON object"),
        BadLine(line=5, reason="no JSON object"),
        {"a": 2},
    ]
    (tmp_path / "x.csv").write_text('q,a\n1,2\n"two\nlines",3\n4\n5,6,7\n')
    assert read_file(tmp_path / "x.csv") == [
        {"q": "1", "a": "2"},
        {"q": "two\nlines", "a": "3"},
        BadLine(line=5, reason="not the 2 fields of the header"),
        BadLine(line=6, reason="not the 2 fields of the header"),
    ]


def test_deep_json_is_a_bad_line(tmp_path):
    (tmp_path / "x.jsonl").write_text("[" * 10**5 + '\n{"a": 1}\n')
    assert read_file(tmp_path / "x.jsonl") == [BadLine(line=1, reason="not JSON"), {"a": 1}]


def test_csv_fields_are_the_text_that_they_are(tmp_path):
    (tmp_path / "x.csv").write_text('question,answer\na,05\nb,5.0\nc,NaN\nd,"1,000"\ne,' + "x" * 200_000 + "\n")
    problems = hub(HubConfig(path=str(tmp_path / "x.csv"), prompt="{question}", holdout=1e-9), "train")
    assert [problem.answer for problem in problems] == ["05", "5.0", "NaN", "1,000", "x" * 200_000]


def test_one_object_that_is_a_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "Hi"}], "answer": ["5"]}
    (tmp_path / "x.json").write_text(json.dumps(row))
    assert read_file(tmp_path / "x.json") == [row]


def test_the_home_folder_and_folders_named_like_files(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.jsonl").write_text(LINES)
    config = HubConfig(path="~/x.jsonl", prompt="{question}", holdout=1e-9)
    assert [problem.answer for problem in hub(config, "train")] == [row["answer"] for row in ROWS]
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved.parquet")
    config = HubConfig(path="~/saved.parquet", prompt="{question}", holdout=1e-9)
    assert [problem.answer for problem in hub(config, "train")] == [row["answer"] for row in ROWS]


@pytest.mark.parametrize("path", ["~/none.jsonl", "./none", "/no/such/folder", "a/b/c", "none.jsonl.gz", "x.tsv"])
def test_a_path_that_is_not_there(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no such file( or folder)?; give a file, a folder or a hub name"):
        hub(HubConfig(path=path, prompt="{question}"), "train")


@pytest.mark.parametrize(("name", "text"), [("x.jsonl", "\n \n"), ("x.json", "[]"), ("x.csv", "question,answer\n")])
def test_a_file_without_rows_says_so(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match="holds no row; give a file with at least one"):
        hub(HubConfig(path=str(tmp_path / name), prompt="{question}"), "train")


def test_every_split_reports_lines_that_are_no_rows(tmp_path):
    (tmp_path / "x.jsonl").write_text(LINES * 20 + '{"question": "b", "answer":\n')
    for split in ("train", "validation", "test"):
        found = hub(HubConfig(path=str(tmp_path / "x.jsonl"), prompt="{question}", holdout=0.2), split)
        assert [(row.id, row.reason) for row in found.left_out] == [("line 121", "not JSON")]
