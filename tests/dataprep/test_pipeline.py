"""Is the dataset the same bytes whoever makes it, however often it is killed, wherever it lies; and is nothing lost?"""

import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dataprep.pipeline import Options, check_options, prepare
from dataprep.progress import Progress
from dataprep.shards import load_metadata, open_split, verify_dataset
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from tests.tiers import grid

WORDS = [
    "the",
    "of",
    "model",
    "tokens",
    "reads",
    "small",
    "naïve",
    "日本",
    "<|endoftext|>",
    "x=1;",
    "don't",
    "42",
    "\r\n",
    "",
]


def text(rng, words):
    return " ".join(rng.choices(WORDS, k=words)) + "\n"


def make_corpus(folder, documents=150, seed=0):
    """Text, JSON lines and gzip files in two folders, some rows and files bad."""
    rng = random.Random(seed)
    (folder / "sub").mkdir(parents=True)
    for n in range(12):
        (folder / "sub" / f"{n}.txt").write_bytes(text(rng, 60).encode())
    rows = [json.dumps({"text": text(rng, rng.randint(1, 60))}) for _ in range(documents)]
    rows[documents // 2] = "{broken"
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress("\n".join(rows[:20]).encode(), mtime=0))
    (folder / "array.json").write_text(json.dumps([text(rng, 9) for _ in range(30)]))
    (folder / "bad.txt").write_bytes(b"\xff\xfe\xfa")
    return folder


def options(folder, **changes):
    settings = {"vocab_size": 320, "num_workers": 1, "val_fraction": 0.1, "task_bytes": 4000, "shard_tokens": 5000}
    return Options(**{"input_dir": folder / "in", "output_dir": folder / "out", **settings, **changes})


def run(*args, **changes):
    return prepare(options(*args, **changes), Progress())


def digests(folder):
    """{path: sha256} of everything below a folder."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A corpus and its dataset, made by one worker without interruption."""
    folder = tmp_path_factory.mktemp("reference")
    make_corpus(folder / "in")
    run(folder)
    return folder


@pytest.fixture
def corpus(reference, tmp_path):
    """A copy of the corpus elsewhere, with new times."""
    shutil.copytree(reference / "in", tmp_path / "in", copy_function=shutil.copy)
    return tmp_path


def test_every_document_comes_back_and_the_bad_ones_are_counted(reference):
    expected = []
    for path in sorted((reference / "in").rglob("*")):
        name, data = path.name, path.read_bytes() if path.is_file() else b""
        data = gzip.decompress(data) if name.endswith(".gz") else data
        if ".jsonl" in name:
            expected += [json.loads(row)["text"] for row in data.decode().splitlines() if row.startswith('{"')]
        elif name.endswith(".json"):
            expected += json.loads(data)
        elif name.endswith(".txt") and name != "bad.txt":
            expected.append(data.decode())
    tokenizer, found = load_tokenizer(reference / "out"), []
    for name in ("train", "val"):
        split = open_split(reference / "out", name)
        assert split.num_documents > 0
        for number in range(split.num_documents):
            origin = split.document(number)
            found.append(tokenizer.decode(split.read(origin.start, origin.stop - origin.start - 1), skip_special=False))
    assert sorted(found) == sorted(expected)
    assert any("<|endoftext|>" in one for one in found)
    skipped = load_metadata(reference / "out").skipped
    assert skipped == {
        "broken JSON": {"count": 1, "examples": ["rows.jsonl:76"]},
        "invalid UTF-8": {"count": 1, "examples": ["bad.txt"]},
    }
    assert verify_dataset(reference / "out") == []


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_at_any_place_gives_the_same_bytes(reference, corpus, workers):
    run(corpus, num_workers=workers, task_bytes=9000 if workers == 2 else 4000)
    expected, found = digests(reference / "out"), digests(corpus / "out")
    if workers == 2:  # the digest of a file that was read in ranges is the only trace of the size of tasks
        expected.pop("metadata.json"), found.pop("metadata.json")
    assert found == expected


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from dataprep.pipeline import Options, prepare
from dataprep.progress import Progress
kill_at, count, replace = int(sys.argv[3]), 0, os.replace
def counted(*paths):
    global count
    count += 1
    if count == kill_at and kill_at % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
    if count == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = counted
folder = Path(sys.argv[2])
prepare(Options(folder / "in", folder / "out", vocab_size=320, num_workers=1, val_fraction=0.1, task_bytes=4000,
                shard_tokens=5000), Progress())
"""


def test_killed_at_every_rename_it_goes_on_to_the_same_bytes(reference, corpus, root):
    """Run n is killed just before or just after its n-th rename, the only way in which results become visible."""
    for kill_at in range(1, 40):
        command = [sys.executable, "-c", KILLED, str(root), str(corpus), str(kill_at)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr
        if (corpus / "out" / "metadata.json").exists():  # a reader never sees half of a dataset
            assert verify_dataset(corpus / "out") == []
    assert kill_at > 6 and "continuing" in process.stdout
    assert digests(corpus / "out") == digests(reference / "out")


@pytest.fixture(scope="module")
def slow_corpus(tmp_path_factory):
    """12 MB and a WordPiece tokenizer: some seconds of encoding for two processes."""
    folder = tmp_path_factory.mktemp("slow")
    make_corpus(folder / "small" / "in")
    run(folder / "small", tokenizer_type="wordpiece", vocab_size=400)
    rng = random.Random(1)
    (folder / "in").mkdir()
    rows = [json.dumps({"text": text(rng, 300)}) for _ in range(200)]
    (folder / "in" / "a.jsonl").write_text("\n".join(rows * 35))
    return folder


def start_tool(root, folder, output, *more):
    flags = ["--tokenizer_type", "existing", "--tokenizer_dir", folder / "small" / "out", "--num_workers", "2", *more]
    command = [sys.executable, "data_prep_tool.py", "--input_dir", folder / "in", "--output_dir", output, *flags]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_workers(process, output, done_tasks=0, parts=0):
    """The process ids of the two workers once `done_tasks` tasks are done and `parts` parts begun."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        begun = len(list(output.glob(".prep/*/parts/*.bin.*.tmp")))
        if begun >= parts and len(list(output.glob(".prep/*/parts/*.done"))) >= done_tasks:
            spawned = [
                int(pid)
                for pid in children.read_text().split()
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
            if len(spawned) == 2:
                return spawned
        time.sleep(0.02)
    pytest.fail(f"the run ended before it could be killed: {process.communicate()}")


def wait_for_end(pids, seconds):
    deadline = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")
def test_workers_end_with_a_killed_run_even_within_a_long_task(slow_corpus, root, tmp_path):
    (tmp_path / "in").mkdir()
    rows = (slow_corpus / "in" / "a.jsonl").read_text()
    for name in "ab":  # a text file is one task, here of many seconds
        (tmp_path / "in" / f"{name}.txt").write_text(rows * 3)
    process = start_tool(root, slow_corpus, tmp_path / "out", "--input_dir", tmp_path / "in")
    workers = wait_for_workers(process, tmp_path / "out", parts=2)
    process.kill()
    process.communicate()
    wait_for_end(workers, 2)
    assert not list((tmp_path / "out").glob(".prep/*/parts/*.done"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers through /proc")
def test_kill_minus_9_of_a_worker_and_of_the_run(slow_corpus, root, tmp_path):
    output = tmp_path / "out"
    process = start_tool(root, slow_corpus, output)
    worker, _ = wait_for_workers(process, output, done_tasks=1)
    os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    _, error = process.communicate(timeout=30)
    assert time.monotonic() - killed < 10 and process.returncode == 2
    assert f"worker process {worker} was killed by SIGKILL while reading a.jsonl" in error and error.count("\n") == 1
    assert not (output / "metadata.json").exists() and not (output / "dataset").exists()

    before = {path.name: path.stat().st_mtime_ns for path in output.glob(".prep/*/parts/*.done")}
    process = start_tool(root, slow_corpus, output)
    workers = wait_for_workers(process, output, done_tasks=len(before) + 2)
    process.kill()
    process.communicate()
    wait_for_end(workers, 10)
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob(".prep/*/parts/*.done")}
    assert before.items() <= kept.items() and len(kept) >= len(before) + 2

    process = start_tool(root, slow_corpus, output)
    said, error = process.communicate()
    assert process.returncode == 0, error
    assert f"continuing the interrupted run: {len(kept)} of" in said
    process = start_tool(root, slow_corpus, tmp_path / "other")
    assert process.communicate() and process.returncode == 0
    assert digests(output) == digests(tmp_path / "other")


def test_changed_options_or_input_start_anew(corpus, reference, capsys, root):
    subprocess.run([sys.executable, "-c", KILLED, str(root), str(corpus), "8"], capture_output=True)
    assert (corpus / "out" / ".prep").is_dir()
    (corpus / "in" / "rows.jsonl").write_text('{"text": "' + "other text " * 50 + '"}\n')
    run(corpus)
    assert "starting anew" in capsys.readouterr().out
    clean = corpus / "clean"
    run(corpus, output_dir=clean)
    assert digests(clean) == digests(corpus / "out") != digests(reference / "out")
    assert not (corpus / "out" / ".prep").exists()


def test_a_finished_dataset_is_kept_replaced_or_refused(corpus, capsys):
    run(corpus, task_bytes=None)
    before = {path: path.stat().st_mtime_ns for path in (corpus / "out").rglob("*")}
    run(corpus, task_bytes=None)
    os.utime(corpus / "in" / "rows.jsonl")  # a newer time alone changes nothing
    run(corpus, task_bytes=None, num_workers=3)
    assert capsys.readouterr().out.count("is up to date") == 2
    assert before == {path: path.stat().st_mtime_ns for path in (corpus / "out").rglob("*")}

    with pytest.raises(UserError, match=r"vocab_size was 320 and is 300.*--overwrite"):
        run(corpus, task_bytes=None, vocab_size=300)
    rows = (corpus / "in" / "rows.jsonl").read_text()
    (corpus / "in" / "rows.jsonl").write_text(rows.replace("model", "ledom"))  # the same size
    with pytest.raises(UserError, match=r"rows.jsonl has another content.*--overwrite"):
        run(corpus, task_bytes=None)
    (corpus / "in" / "new.txt").write_text("a new file")
    with pytest.raises(UserError, match=r"new file new.txt"):
        run(corpus, task_bytes=None)
    run(corpus, task_bytes=None, overwrite=True, shard_tokens=10**6)
    run(corpus, task_bytes=None, shard_tokens=10**6, output_dir=corpus / "clean")
    assert digests(corpus / "out") == digests(corpus / "clean")

    shard = corpus / "out" / "dataset" / "train_00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    run(corpus, task_bytes=None, shard_tokens=10**6)
    assert "damaged" in capsys.readouterr().out and digests(corpus / "out") == digests(corpus / "clean")


def test_the_split_does_not_move_when_files_are_added(corpus):
    def held_out(output):
        split = open_split(output, "val")
        return {split.document(number).content_hash for number in range(split.num_documents)}

    run(corpus)
    make_corpus(corpus / "in" / "more", seed=9)
    (corpus / "in" / "rows.jsonl").rename(corpus / "in" / "zzz.jsonl")
    run(corpus, output_dir=corpus / "more")
    before, after = held_out(corpus / "out"), held_out(corpus / "more")
    assert before < after
    train = open_split(corpus / "more", "train")
    assert not after & {train.document(number).content_hash for number in range(train.num_documents)}


def test_one_text_file_has_its_end_held_out(tmp_path):
    (tmp_path / "in").mkdir()
    content = "".join(f"line {n} of a book\r\n" for n in range(2000))
    (tmp_path / "in" / "book.txt").write_bytes(b"\xef\xbb\xbf" + content.encode())
    for held, output in ((8 << 20, "out"), (1000, "streamed")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dataprep.readers.MAX_HELD_BYTES", held)
            run(tmp_path, val_fraction=0.05, output_dir=tmp_path / output)
    assert digests(tmp_path / "out") == digests(tmp_path / "streamed")
    tokenizer = load_tokenizer(tmp_path / "out")
    train, val = (open_split(tmp_path / "out", name) for name in ("train", "val"))
    head, tail = (tokenizer.decode(split.read(0, split.num_tokens)) for split in (train, val))
    assert head + tail == content and head.endswith("\n") and 0.04 < len(tail) / len(content) < 0.06
    assert val.document_at(0).position == len(head.encode())


def test_some_document_is_held_out_when_no_hash_is_low_enough(tmp_path):
    (tmp_path / "in").mkdir()
    rng = random.Random(0)
    for n in range(30):
        (tmp_path / "in" / f"{n}.txt").write_text(text(rng, 20 + n))
    metadata = run(tmp_path, val_fraction=1e-9, shard_tokens=300)
    assert metadata.splits["val"].documents == 1 and metadata.splits["train"].documents == 29
    assert verify_dataset(tmp_path / "out") == []
    val, train = open_split(tmp_path / "out", "val"), open_split(tmp_path / "out", "train")
    hashes = [train.document(number).content_hash for number in range(29)]
    assert val.document(0).content_hash < min(hashes)
    assert run(tmp_path, val_fraction=0.0, output_dir=tmp_path / "none").splits["val"].documents == 0


def test_documents_that_all_hash_to_validation_are_trained_on(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text('"one text"\n"another text"\n')
    metadata = run(tmp_path, val_fraction=1 - 1e-12)
    assert (metadata.splits["train"].documents, metadata.splits["val"].documents) == (2, 0)


def test_a_20_mb_line_goes_through(tmp_path):
    (tmp_path / "in").mkdir()
    line = "".join(f"word{n % 9973} 日本 " for n in range(1_300_000))
    assert len(line.encode()) > 20 * 10**6
    (tmp_path / "in" / "rows.jsonl").write_text(json.dumps({"text": line}) + '\n{"text": "short"}\n')
    changes = {"tokenizer_train_bytes": 10**6, "task_bytes": None, "shard_tokens": 10**9, "val_fraction": 0.0}
    run(tmp_path, **changes)
    split = open_split(tmp_path / "out", "train")
    assert split.num_documents == 2 and verify_dataset(tmp_path / "out") == []
    tokenizer = load_tokenizer(tmp_path / "out")
    for number, expected in enumerate((line, "short")):
        origin = split.document(number)
        assert tokenizer.decode(split.read(origin.start, origin.stop - origin.start - 1)) == expected


MEMORY = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from dataprep.pipeline import Options, prepare
from dataprep.progress import Progress
prepare(Options(Path(sys.argv[2]), Path(sys.argv[3]), tokenizer_type="existing", tokenizer_dir=Path(sys.argv[4]),
                num_workers=1), Progress(sys.stderr))
# not ru_maxrss: that one survives exec, so it would be the peak of the process that runs the tests
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("kind", grid(["txt", "jsonl"], quick=["txt"]))
def test_memory_does_not_grow_with_the_corpus(reference, root, tmp_path, kind):
    """25 MB more text in one file, 33 MB for 8 MB, may take 20 MB more; the allocator alone moves by some 8.

    Both are above the size up to which a document is encoded in one piece.
    """
    rng = random.Random(0)
    paragraph = text(rng, 2000)
    peaks = []
    for name, copies in (("small", 750), ("large", 3000)):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / f"a.{kind}", "w") as file:
            for n in range(copies):
                file.write(f"{n} {paragraph}" if kind == "txt" else json.dumps({"text": f"{n} {paragraph}"}) + "\n")
        arguments = [str(root), tmp_path / name, tmp_path / f"{name}_out", reference / "out"]
        process = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True)
        peaks.append(int(process.stdout) / 1000)
    assert peaks[1] - peaks[0] < 20, peaks


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(reference, corpus, root):
    """A limit on the size of files stands in for a full disk: writing fails in the same place with another number."""
    script = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
    script += KILLED.replace("prepare(Options", "from errors import run_script\nrun_script(lambda: prepare(Options")
    script = script.rstrip() + ")\n"
    process = subprocess.run(
        [sys.executable, "-c", script, str(root), str(corpus), "0"], capture_output=True, text=True
    )
    assert process.returncode == 2 and process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert "run the same command again" in process.stderr
    assert not (corpus / "out" / "metadata.json").exists() and not (corpus / "out" / "dataset").exists()
    run(corpus)
    assert digests(corpus / "out") == digests(reference / "out")


def test_two_runs_cannot_write_to_one_folder(corpus):
    import fcntl

    (corpus / "out").mkdir()
    descriptor = os.open(corpus / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another run"):
        run(corpus)
    os.close(descriptor)


def test_an_output_folder_inside_the_input_is_not_read(tmp_path):
    make_corpus(tmp_path / "in")
    first = run(tmp_path, output_dir=tmp_path / "in" / "out", task_bytes=None)
    assert run(tmp_path, output_dir=tmp_path / "in" / "out", task_bytes=None) == first
    with pytest.raises(UserError, match="is the input folder"):
        run(tmp_path, output_dir=tmp_path / "in")


def test_an_existing_tokenizer_is_taken_over(reference, corpus):
    metadata = run(corpus, tokenizer_type="existing", tokenizer_dir=reference / "out")
    assert metadata.tokenizer == load_metadata(reference / "out").tokenizer
    assert digests(corpus / "out" / "dataset") == digests(reference / "out" / "dataset")
    with pytest.raises(UserError, match="no token 'nope'"):
        run(
            corpus,
            tokenizer_type="existing",
            tokenizer_dir=reference / "out",
            eos_token="nope",
            output_dir=corpus / "2",
        )


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stride": 2048}, "--stride 2048"),
        ({"stride": -1}, "--stride -1"),
        ({"max_length": 0, "stride": 0}, "--stride 0"),
        ({"val_fraction": 1.0}, "--val_fraction"),
        ({"num_workers": 0}, "--num_workers"),
        ({"shard_tokens": 0}, "--shard_tokens"),
        ({"vocab_size": 256}, "--vocab_size 256"),
        ({"tokenizer_type": "existing"}, "--tokenizer_dir"),
        ({"tokenizer_dir": Path(".")}, "--tokenizer_dir"),
        ({"tokenizer_type": "tiktoken", "eos_token": "x"}, "--eos_token"),
        ({"tokenizer_type": "wordpiece", "eos_token": "END"}, "--eos_token 'END': write it as <NAME>"),
        ({"text_extensions": ("py",)}, "--text_extensions py"),
        ({"tokenizer_train_bytes": 1 << 40}, "--tokenizer_train_bytes"),
    ],
)
def test_impossible_options_are_refused_by_name(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        check_options(Options(tmp_path, tmp_path / "out", **changes))
