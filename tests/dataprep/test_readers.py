"""Does every kind of file give its documents exactly, and is everything else skipped with its place and reason?"""

import gzip
import json
import os
import random
from collections import Counter

import pytest

from dataprep import readers
from dataprep.readers import Document, Skipped, discover, read_documents
from errors import UserError


def read(folder, **settings):
    """All documents' texts in order and all that was skipped as (kind, path, line)."""
    found = discover(folder, **settings)
    items = [item for file in found.files for item in read_documents(folder, file, 0, file.size, "text")]
    texts = ["".join(item.chunks()) for item in items if isinstance(item, Document)]
    skipped = [*found.skipped, *(item for item in items if isinstance(item, Skipped))]
    return texts, [(one.kind, one.path, one.line) for one in skipped]


def test_text_files_come_as_they_are_in_the_order_of_their_paths(tmp_path):
    (tmp_path / "b").mkdir()
    contents = {
        "a.txt": "one\r\ntwo\rthree\n\n",
        "b/a.MD": "# é 日本 👍\n",
        "b.txt": "\u00a0 x \u2028",
        "z.txt.gz": "packed",
    }
    for name, text in contents.items():
        data = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    texts, skipped = read(tmp_path)
    assert texts == [contents[name] for name in ("a.txt", "b.txt", "b/a.MD", "z.txt.gz")] and skipped == []


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json"])
def test_a_byte_order_mark_is_obeyed_and_left_out(tmp_path, encoding, name):
    text = "naïve 日本 👍\r\nzweite"
    content = text if name == "x.txt" else json.dumps({"text": text}, ensure_ascii=False) + "\n"
    (tmp_path / name).write_bytes(content.encode(encoding))
    assert read(tmp_path) == ([text], [])


def test_json_in_every_shape(tmp_path):
    (tmp_path / "array.json").write_text(
        json.dumps([{"text": "a"}, "b", {"text": "c \ud83d\ude00", "n": [1, {"x": 2}]}])
    )
    (tmp_path / "lines.json").write_text('{"text": "d"}\n{"text": "e"}\n')
    (tmp_path / "object.json").write_text('  {"meta": {"text": "no"}, "text": "f"}  ')
    (tmp_path / "packed.json.gz").write_bytes(gzip.compress(b'[\n"g",\t"h"]'))
    (tmp_path / "empty.json").write_text("[]")
    assert read(tmp_path) == (["a", "b", "c 😀", "d", "e", "f", "g", "h"], [])


def test_a_json_value_may_be_cut_anywhere_by_the_blocks_it_is_read_in(tmp_path, monkeypatch):
    values = [
        {"text": 'q"uo\\te\u00e9 \n' * 3, "n": -12.5e3, "t": True},
        "x" * 40,
        {"text": "日" * 11, "a": [1, 22, None]},
    ]
    (tmp_path / "a.json").write_bytes(json.dumps(values, ensure_ascii=False).encode())
    for block in (1, 2, 3, 7, 64):
        monkeypatch.setattr(readers, "_BLOCK", block)
        assert read(tmp_path) == ([values[0]["text"], values[1], values[2]["text"]], [])


def test_what_cannot_be_read_is_skipped_with_its_place(tmp_path):
    rows = [
        b'{"text": "good 1"}',
        b"{broken",
        b'{"no_text": 1}',
        b'{"text": "\xff"}',
        b'{"text": 5}',
        b'{"text": " \\n"}',
        b"",
        b'{"text": "\\ud800"}',
        b"[" * 100_000,
        b'"good 2"',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    (tmp_path / "binary.txt").write_bytes(b"text\0text")
    (tmp_path / "blank.txt").write_bytes(b"\xef\xbb\xbf \n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(random.Random(0).randbytes(5000))[:-900])
    (tmp_path / "latin.md").write_bytes("café".encode("latin-1"))
    (tmp_path / "open.json").write_bytes(b'["good 3", "good 4" "lost"]')
    (tmp_path / "wrong.txt.gz").write_bytes(b"not packed")
    (tmp_path / "zero.txt").write_bytes(b"")
    texts, skipped = read(tmp_path)
    assert texts == ["good 1", "good 2", "good 3", "good 4"]
    skipped = [one for one in skipped if one[0] != readers.ENCODING or one[1] != "cut.jsonl.gz"]
    assert Counter(skipped) == Counter(
        [
            (readers.BROKEN_JSON, "a.jsonl", 2),
            (readers.NO_TEXT, "a.jsonl", 3),
            (readers.ENCODING, "a.jsonl", 4),
            (readers.NO_TEXT, "a.jsonl", 5),
            (readers.EMPTY, "a.jsonl", 6),
            (readers.SURROGATES, "a.jsonl", 8),
            (readers.BROKEN_JSON, "a.jsonl", 9),
            (readers.BINARY, "binary.txt", None),
            (readers.EMPTY, "blank.txt", None),
            (readers.BROKEN_GZIP, "cut.jsonl.gz", None),
            (readers.ENCODING, "latin.md", None),
            (readers.BROKEN_JSON, "open.json", 3),
            (readers.BROKEN_GZIP, "wrong.txt.gz", None),
            (readers.EMPTY, "zero.txt", None),
        ]
    )


def test_records_over_the_limit_are_skipped_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(readers, "_BLOCK", 100)
    big = json.dumps({"text": "x" * 3000})
    (tmp_path / "a.jsonl").write_text(f'{{"text": "before"}}\n{big}\n{{"text": "after"}}\n')
    (tmp_path / "b.json").write_text(f'["kept", {big}, "lost"]')
    texts, skipped = read(tmp_path)
    assert texts == ["before", "after", "kept"]
    assert skipped == [(readers.TOO_LARGE, "a.jsonl", 2), (readers.TOO_LARGE, "b.json", 2)]


@pytest.mark.parametrize("step", [1, 7, 64, 1000])
def test_byte_ranges_of_a_jsonl_file_share_out_its_lines(tmp_path, step):
    rows = [json.dumps({"text": "é" * (n % 13) + str(n)}, ensure_ascii=False) for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    [file] = discover(tmp_path).files
    texts = [
        document.text
        for start in range(0, file.size, step)
        for document in read_documents(tmp_path, file, start, min(start + step, file.size), "text")
    ]
    assert texts == [json.loads(row)["text"] for row in rows]


def test_links_pipes_and_the_output_folder(tmp_path):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    (folder / "out").mkdir()
    for path in (folder / "a.txt", folder / "deep" / "b.txt", folder / "out" / "c.txt", tmp_path / "d.txt"):
        path.write_text(path.name)
    (folder / "deep" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "link.txt").symlink_to(tmp_path / "d.txt")
    (folder / "gone.txt").symlink_to(tmp_path / "missing.txt")
    os.mkfifo(folder / "pipe.txt")
    texts, skipped = read(folder, exclude=[folder / "out"])
    assert texts == ["a.txt", "b.txt", "d.txt"]
    assert skipped == [
        (readers.LINK_LOOP, "deep/loop", None),
        (readers.NOT_A_FILE, "pipe.txt", None),
        (readers.UNREADABLE, "gone.txt", None),
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    assert read(tmp_path) == ([], [(readers.UNREADABLE, "a.txt", None)])


def test_large_documents_are_read_again_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_HELD_BYTES", 1000)
    monkeypatch.setattr(readers, "_BLOCK", 64)
    text = "日本 é\r\n" * 500
    (tmp_path / "a.txt").write_bytes(text.encode())
    [file] = discover(tmp_path).files
    [document] = read_documents(tmp_path, file, 0, file.size, "text")
    assert document.text is None and document.size == len(text.encode()) and "".join(document.chunks()) == text
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    with pytest.raises(UserError, match="changed while"):
        list(document.chunks())


def test_further_extensions_are_text(tmp_path):
    for name in ("a.py", "b.PY", "c.rst", "d.py.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b"x = 1") if name.endswith(".gz") else b"x = 1")
    assert read(tmp_path) == ([], [])
    assert read(tmp_path, text_extensions=(".py",)) == (["x = 1"] * 3, [])
    assert discover(tmp_path).other_suffixes == {".py": 2, ".rst": 1, ".py.gz": 1}
