import gzip
import io

import pyarrow
import pyarrow.parquet
import pytest

from aoe_jax.data import documents as data_documents
from aoe_jax.data.documents import Piece, documents, find_files, pieces_of
from aoe_jax.errors import UserError
from tests.data.texts import (
    json_lines,
    texts,
    write_everything,
    write_gzip,
    write_json_lines,
    write_parquet,
    write_zstd,
    zstd,
)


def read(path, piece_bytes=2**30, field="text"):
    """Returns a list of documents for each piece of a file."""
    pieces = [piece for piece, _ in pieces_of(path, path.stat().st_size, piece_bytes)]
    return [list(documents(piece, field)) for piece in pieces]


def joined(pieces):
    return [text for piece in pieces for text in piece]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n", "\n \n"])
@pytest.mark.parametrize("piece_bytes", [1, 7, 100, 1000, 10**6])
def test_pieces_of_json_lines_have_each_document_once_and_in_order(tmp_path, piece_bytes, end):
    expected = texts(12, longest=20)
    write_json_lines(tmp_path / "a.jsonl", expected, end=end)
    pieces = read(tmp_path / "a.jsonl", piece_bytes)
    assert joined(pieces) == expected
    assert len(pieces) == -(-(tmp_path / "a.jsonl").stat().st_size // piece_bytes)


def test_last_line_needs_no_end(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "two"}')
    for piece_bytes in range(1, 40):
        assert joined(read(tmp_path / "a.jsonl", piece_bytes)) == ["one", "two"]


@pytest.mark.parametrize(
    ("write", "name"), [(write_zstd, "a.jsonl.zst"), (write_gzip, "a.ndjson.gz")]
)
def test_compressed_json_lines(tmp_path, write, name):
    write(tmp_path / name, texts(50))
    assert read(tmp_path / name, piece_bytes=10) == [texts(50)]


@pytest.mark.parametrize(("piece_bytes", "count"), [(1, 8), (10**9, 1)])
def test_pieces_of_parquet_are_row_groups(tmp_path, piece_bytes, count):
    write_parquet(tmp_path / "a.parquet", texts(50), field="body")
    pieces = read(tmp_path / "a.parquet", piece_bytes, "body")
    assert joined(pieces) == texts(50) and len(pieces) == count


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_text_is_one_document(tmp_path, name):
    text, mark = "several\r\nlines 你好\n", b"\xef\xbb\xbf"
    compress = {".gz": gzip.compress, ".zst": zstd}.get((tmp_path / name).suffix, bytes)
    (tmp_path / name).write_bytes(compress(mark + text.encode()))
    assert read(tmp_path / name, piece_bytes=1) == [[text]]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", []),
        ("a.txt", b"", [""]),
        ("a.jsonl", rb'{"text": "\ud83d\ude80 a \ud83d b"}', ["🚀 a \ufffd b"]),
    ],
)
def test_special_contents(tmp_path, name, content, expected):
    """Among the cases are empty files, and half of a surrogate pair, which is not valid text."""
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == [expected]


def test_files_are_found_once_and_sorted(tmp_path):
    write_everything(tmp_path)
    for hidden in (".a.txt", ".sub/a.txt"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_text("hidden")
    names = ["a.jsonl", "b.jsonl.zst", "c.json.gz", "d.parquet", *(f"sub/{i}.txt" for i in "012")]
    patterns = [str(tmp_path / "sub" / "*.txt"), str(tmp_path / "sub" / ".." / "**")]
    assert [*find_files(patterns, tmp_path / "out")] == [tmp_path / name for name in names]


def test_files_below_a_hidden_folder(tmp_path, monkeypatch):
    (tmp_path / ".data").mkdir()
    (tmp_path / ".data" / "a.txt").touch()
    for folder, pattern in ((tmp_path, ".data/*.txt"), (tmp_path / ".data", "*.txt")):
        monkeypatch.chdir(folder)
        assert [*find_files([pattern], tmp_path / "out")] == [tmp_path / ".data" / "a.txt"]
    copies = tmp_path / ".data" / "[1]" / ".copies" / "a.txt"  # found only if it is named
    copies.parent.mkdir(parents=True)
    copies.touch()
    for pattern in ("**", "*.txt", str(tmp_path / ".data")):
        assert copies not in find_files([pattern], tmp_path / "out")
    for pattern in ("[[]1]/.copies/*", "**/.copies/*", copies.parent):
        assert [*find_files([pattern], tmp_path / "out")] == [copies]
    (copies.parent / ".more.txt").touch()
    assert [*find_files([copies.parent], tmp_path / "out")] == [copies]


def damaged(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


def parquet(**columns):
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file, row_group_size=7)
    return file.getvalue()


LINES = json_lines(texts(99))
NULL = parquet(id=range(21), text=[*texts(20), None])
NO_UTF8 = pyarrow.StringArray.from_buffers(1, *pyarrow.array([b"caf\xe9"]).buffers()[1:])
MISTAKES = [
    (
        "a.jsonl",
        b'{"text": "one"}\n{"text": "tw\n',
        r"the line at byte 16 of .*a\.jsonl is no JSON",
    ),
    ("a.jsonl", b'{"text": "caf\xe9"}\n', r"the line at byte 0 of .*a\.jsonl is no JSON .*mend or"),
    ("a.jsonl", b'["text"]\n', "is no JSON object; each line must be one, with a field 'text'"),
    ("a.jsonl", b'{"body": "x"}\n', r"--text_field='text': .*has no such field; it has \['body'\]"),
    ("a.jsonl", b'{"text": null}\n', "--text_field='text': .*has a NoneType in this field"),
    ("a.jsonl", b'{"text": ' + 9999 * b"[" + b"\n", r"is no JSON \(maximum recursion depth"),
    (
        "a.json.gz",
        gzip.compress(b"x\n", mtime=0),
        r"byte 0 of .*a\.json\.gz, decompressed, is no JSON",
    ),
    ("a.json.gz", gzip.compress(LINES)[:-20], r"a\.json\.gz cannot be read \(Truncated.*mend or"),
    ("a.jsonl.zst", zstd(LINES)[:-20], r"a\.jsonl\.zst cannot be read \(Truncated"),
    ("a.jsonl.gz", damaged(gzip.compress(LINES, mtime=0)), r"gz (cannot be read|, decompressed)"),
    ("a.txt.zst", b"no zstd", r"a\.txt\.zst cannot be read \(ZSTD"),
    ("a.txt", b"caf\xe9", r"a\.txt cannot be read \('utf-8' codec can't decode .*position 3.*mend"),
    ("a.parquet", b"no parquet", r"a\.parquet cannot be read \(.*[Pp]arquet"),
    ("a.parquet", parquet(body=["x"]), r"'text': .*has no such column; it has \['body'\]"),
    ("a.parquet", parquet(text=[["a"], ["b"]]), r"a\.parquet has a list in this field"),
    ("a.parquet", NULL, r"'text': row group 2 of .*a\.parquet has a NoneType in this field"),
    ("a.parquet", NULL[:10] + bytes(200) + NULL[210:], r"a\.parquet cannot be read"),
    ("a.parquet", parquet(text=NO_UTF8), r"a\.parquet cannot be read \('utf-8' codec"),
]


@pytest.mark.parametrize(("name", "content", "message"), MISTAKES)
def test_mistakes_in_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        joined(read(tmp_path / name))


def test_output_and_broken_links_are_no_input(tmp_path):
    (tmp_path / "store" / "units").mkdir(parents=True)
    for name in ("a.jsonl", "store/plan.json", "store/units/00000.json"):
        (tmp_path / name).touch()
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    assert [*find_files([str(tmp_path / "**")], tmp_path / "store")] == [tmp_path / "a.jsonl"]
    with pytest.raises(UserError, match="matches no file"):
        find_files([str(tmp_path / "b*")], tmp_path / "store")


def test_file_that_goes_away(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl cannot be read \(.*[Nn]o such file"):
        list(documents(Piece(str(tmp_path / "gone.jsonl"), 0, 10), "text"))


@pytest.mark.parametrize("name", ["a.csv", "b.gz", "c", "d.parquet.gz", "e.jsonl.gz", "f.txt.zst"])
def test_files_that_are_no_input(tmp_path, name):
    with pytest.raises(UserError, match=r"--input='.*/\*': matches no file"):
        find_files([str(tmp_path / "*")], tmp_path / "out")
    (tmp_path / name).touch()
    unknown = "is in no known format; give files that end in .jsonl"
    words = "is empty, so it is truncated" if name[0] in "ef" else unknown
    with pytest.raises(UserError, match=f"{name} {words}"):
        find_files([str(tmp_path / "*")], tmp_path / "out")


def test_a_line_is_read_once_and_has_a_longest_length(tmp_path, monkeypatch):
    """A piece that begins and ends within a line has no document, and only its bytes are read."""
    monkeypatch.setattr(data_documents, "DOCUMENT_BYTES", 1000)
    line = json_lines(["x" * 900])
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b'{"text": "b"}')
    assert joined(read(tmp_path / "a.jsonl", 100)) == ["a", "x" * 900, "b"]
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "' + bytes(10**5))
    first, *others = [piece for piece, _ in pieces_of(tmp_path / "b.jsonl", 10 + 10**5, 1000)]
    assert [list(documents(piece, "text")) for piece in others] == [[]] * 100
    with pytest.raises(UserError, match=r"the line at byte 0 of .*b\.jsonl is longer than 0 MiB"):
        list(documents(first, "text"))


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_longest_text(tmp_path, monkeypatch, name):
    monkeypatch.setattr(data_documents, "DOCUMENT_BYTES", 1000)
    compress = gzip.compress if name.endswith("gz") else bytes
    (tmp_path / name).write_bytes(compress(bytes(1000)))
    assert read(tmp_path / name) == [["\0" * 1000]]
    (tmp_path / name).write_bytes(compress(bytes(1001)))
    with pytest.raises(UserError, match=rf"{name} is longer than .* split or remove it"):
        read(tmp_path / name)


def test_long_rows_of_parquet_are_read_in_small_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(data_documents, "_BATCH_BYTES", 10**4)
    texts, seen = [f"{n}" * 2000 for n in range(10)], []
    table, path = pyarrow.table({"id": range(10), "text": texts}), tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path, use_dictionary=False)
    iter_batches = pyarrow.parquet.ParquetFile.iter_batches

    def watched(self, size, **settings):
        seen.append(size)
        return iter_batches(self, size, **settings)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", watched)
    assert read(path) == [texts] and seen == [4]
