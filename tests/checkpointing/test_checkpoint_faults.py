"""Does a checkpoint survive kills, full disks, flipped bits, lost files, second trainers and hostile folders?

Each fault is real: processes are killed, files cut, limits set. Where a fault has many moments, all of them are tried.
"""

import contextlib
import errno
import itertools
import json
import os
import pickle
import random
import resource
import shutil
import signal
import time
import traceback
import zlib

import pytest
import torch

from checkpointing import save_folder
from checkpointing.load import Resolved, load_model, load_state, resolve_checkpoint
from checkpointing.retention import remove_optimizer
from checkpointing.save_folder import list_checkpoints, verify_checkpoint
from errors import UserError
from tests.checkpointing.test_checkpoints import assert_same_bits, everything, load, save, tiny_run, train
from tests.ranks import run_ranks

ALL_FILES = (
    "config.json",
    "generation_config.json",
    "manifest.json",
    "model.safetensors",
    "optimizer.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
)


def trained_run(steps=1, seed=0):
    torch.manual_seed(seed)
    run = tiny_run(seed=seed)
    train(*run, range(steps))
    return run


def in_child(action):
    """Start `action` in a forked process; the process id. Its exit code is 0, or 1 after an exception."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        action()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@contextlib.contextmanager
def living_child(action):
    """A forked process that runs `action` for the length of the block and is killed (-9) at its end."""
    pid = in_child(action)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        killed(pid)


def killed(pid):
    """Wait for a child: True if it was killed, False if it ended by itself and well."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith((".tmp_", ".old_", ".del_")))


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def newest_step(folder):
    return max((step for step, _ in list_checkpoints(folder)), default=0)


# ---- killed ----------------------------------------------------------------------------------------------------------


def killed_before_storage_call(number, action):
    """Run `action` in a child that kills itself (-9) just before its `number`-th call that changes the file system."""

    def doomed():
        calls = itertools.count(1)

        def guarded(call):
            def guard(*args, **kwargs):
                if next(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kwargs)

            return guard

        for name in ("open", "mkdir", "fsync", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, guarded(getattr(os, name)))
        action()

    return killed(in_child(doomed))


@pytest.mark.parametrize(
    ("case", "hardest"),
    [
        ("a new step", {(".del",)}),
        ("the same step with other weights", {(".old", ".tmp"), (".old",)}),
        ("the same step, broken", {(".del", ".tmp"), (".del",)}),
        ("an old optimizer", {(".tmp",)}),
    ],
)
def test_killed_between_any_two_storage_calls_of_a_save(tmp_path, case, hardest):
    """Whatever the moment: a whole checkpoint is found, of no earlier step than before; the next start cleans up."""
    old, new = trained_run(seed=0), trained_run(seed=1)
    step = 2 if case in ("a new step", "an old optimizer") else 1
    keep = {"keep_checkpoints": 0, "keep_optimizer": "last"} if case == "an old optimizer" else {"keep_checkpoints": 1}
    if case == "the same step, broken":
        save(tmp_path, 0, old)
    moments = set()
    for number in itertools.count(1):
        shutil.rmtree(tmp_path / "checkpoint_step_2", ignore_errors=True)
        shutil.rmtree(tmp_path / "checkpoint_step_1", ignore_errors=True)
        save(tmp_path, 1, old, keep_checkpoints=0)
        if case == "the same step, broken":
            os.truncate(tmp_path / "checkpoint_step_1" / "config.json", 5)
        was_killed = killed_before_storage_call(number, lambda: save(tmp_path, step, new, **keep))
        moments.add(tuple(sorted(name.split("_")[0] for name in leftovers(tmp_path))))
        if case == "an old optimizer":
            assert [verify_checkpoint(path) for _, path in list_checkpoints(tmp_path)] in ([None], [None, None])
        with save_folder.lock(tmp_path):
            save_folder.clean(tmp_path)
        assert leftovers(tmp_path) == []
        found = resolve_checkpoint("latest", tmp_path, to_go_on=True)
        assert found.path is not None
        again = tiny_run(seed=9)
        load(found.path, again)
        found_step = load_state(found.path)["step"]
        new_is_there = everything(again)["model.norm.weight"].equal(everything(new)["model.norm.weight"])
        assert_same_bits(everything(again), everything(new if new_is_there else old))
        assert found_step >= (0 if case == "the same step, broken" else 1)
        if not was_killed:
            assert found_step == step and new_is_there
            assert case != "an old optimizer" or not (tmp_path / "checkpoint_step_1/optimizer.safetensors").exists()
            break
    assert number > 25
    assert moments >= {(), (".tmp",), *hardest}


def test_killed_at_random_moments_while_saving_again_and_again(tmp_path):
    """Twenty trainers, each resuming where the last was killed: the step never falls, nothing broken is published."""
    run = trained_run()
    chance = random.Random(0)
    newest = 0
    partial = 0
    for _ in range(20):

        def trainer():
            with save_folder.lock(tmp_path):
                save_folder.clean(tmp_path)
                path = resolve_checkpoint("latest", tmp_path).path
                step = load_state(path)["step"] if path else 0
                while True:
                    step += 1
                    assert save(tmp_path, step, run, keep_checkpoints=2).ok

        with living_child(trainer):
            wait_for(lambda: newest_step(tmp_path) > newest)  # noqa: B023 - called at once
            time.sleep(chance.random() * 0.02)
        partial += bool(leftovers(tmp_path))
        found = resolve_checkpoint("latest", tmp_path)
        assert found.skipped == []
        step = load_state(found.path)["step"]
        assert step > newest
        newest = step
    assert partial > 2  # or no kill fell into a save
    with save_folder.lock(tmp_path):
        save_folder.clean(tmp_path)
    assert leftovers(tmp_path) == []


def test_everything_is_flushed_before_the_name_appears_and_the_name_before_anything_is_deleted(tmp_path, monkeypatch):
    """A power cut keeps only what was flushed. The calls are recorded and carried out."""
    run = trained_run()
    save(tmp_path, 1, run)
    events = []

    def record(name, describe):
        call = getattr(os, name)

        def recorded(*args, **kwargs):
            events.append((name, describe(*args)))
            return call(*args, **kwargs)

        monkeypatch.setattr(os, name, recorded)

    record("fsync", lambda descriptor: os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
    record("rename", lambda source, target: os.path.basename(target).split("_step")[0])
    record("replace", lambda source, target: os.path.basename(target))
    path = save(tmp_path, 2, run, keep_checkpoints=1).path
    published = events.index(("rename", "checkpoint"))
    flushed = [name for call, name in events[:published] if call == "fsync"]
    assert sorted(flushed[:-1]) == sorted(file.name for file in path.iterdir())
    assert flushed[-2] == "manifest.json" and flushed[-1].startswith(".tmp_step_2_")
    assert events[published + 1] == ("fsync", tmp_path.name)
    assert [event for event in events[published + 2 :] if event[0] != "fsync"] == [
        ("replace", "latest"),
        ("rename", ".del_checkpoint"),
    ]


# ---- damaged ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_checkpoints(tmp_path):
    """A folder with checkpoints 1 and 2; the newer one is for the test to break."""
    run = trained_run()
    for step in (1, 2):
        save(tmp_path, step, run)
    return tmp_path


def assert_falls_back(folder, reason):
    """The newest is passed over for `reason` and the one before used; asked for by name, it is an error saying so."""
    broken = folder / "checkpoint_step_2"
    found = resolve_checkpoint("latest", folder)
    assert found.path == folder / "checkpoint_step_1"
    ((path, why),) = found.skipped
    assert path == broken
    assert reason in why
    with pytest.raises(UserError) as refused:
        resolve_checkpoint(broken, folder)
    assert str(refused.value) == f"checkpoint {broken} cannot be used: {why}"


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_truncated_file_is_named_and_the_one_before_is_used(two_checkpoints, name):
    file = two_checkpoints / "checkpoint_step_2" / name
    size = file.stat().st_size
    os.truncate(file, size - 2)
    assert_falls_back(two_checkpoints, f"{name}: ")
    if name != "manifest.json":
        assert f"{name}: {size - 2} bytes, manifest.json says {size}" in verify_checkpoint(file.parent)
        assert verify_checkpoint(file.parent, deep=False) is not None


@pytest.mark.parametrize("name", [name for name in ALL_FILES if name != "manifest.json"])
def test_one_flipped_bit_is_named_and_the_one_before_is_used(two_checkpoints, name):
    file = two_checkpoints / "checkpoint_step_2" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)
    assert_falls_back(two_checkpoints, f"{name}: checksum mismatch")


@pytest.mark.parametrize("without_optimizer", [False, True])
def test_no_flipped_bit_of_the_manifest_goes_unnoticed(two_checkpoints, without_optimizer):
    """One random bit of every byte. The checksums of the files stand in it, so nothing else protects it."""
    folder = two_checkpoints / "checkpoint_step_2"
    if without_optimizer:
        remove_optimizer(folder)
    good = (folder / "manifest.json").read_bytes()
    chance = random.Random(0)
    for position in range(len(good) - 1):  # the newline at the end says nothing
        bad = bytearray(good)
        bad[position] ^= 1 << chance.randrange(8)
        (folder / "manifest.json").write_bytes(bad)
        assert verify_checkpoint(folder) is not None, (position, bytes(bad[position - 20 : position + 20]))
    (folder / "manifest.json").write_bytes(good)
    assert verify_checkpoint(folder) is None


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_missing_file_is_named_and_the_one_before_is_used(two_checkpoints, name):
    (two_checkpoints / "checkpoint_step_2" / name).unlink()
    assert_falls_back(two_checkpoints, f"{name}: missing")


def test_no_whole_checkpoint_at_all_is_reported_not_hidden(two_checkpoints):
    for step in (1, 2):
        os.truncate(two_checkpoints / f"checkpoint_step_{step}" / "model.safetensors", 100)
    found = resolve_checkpoint("latest", two_checkpoints)
    assert found.path is None and [path.name for path, _ in found.skipped] == ["checkpoint_step_2", "checkpoint_step_1"]
    with pytest.raises(UserError, match=r"is whole: checkpoint_step_2: model\.safetensors: 100 bytes"):
        resolve_checkpoint(two_checkpoints, two_checkpoints)


def test_stale_files_beside_the_listed_ones_are_ignored(tmp_path):
    """A shard of another checkpoint, left by a copy, must not be merged in (torch's DCP reader would)."""
    run, other = trained_run(seed=0), trained_run(seed=1)
    path = save(tmp_path, 1, run, max_shard_bytes=10_000).path
    stale = save(tmp_path, 2, other).path
    shutil.copy(stale / "model.safetensors", path / "model-00099-of-00099.safetensors")
    shutil.copy(stale / "model.safetensors", path / "model.safetensors")
    assert resolve_checkpoint(path, tmp_path).path == path
    again = tiny_run(seed=9)
    load(path, again)
    assert_same_bits(everything(again), everything(run))


def test_folders_that_only_look_like_checkpoints_are_none(two_checkpoints):
    (two_checkpoints / "checkpoint_step_9").write_text("a file")
    (two_checkpoints / "checkpoint_step_10.bak").mkdir()
    (two_checkpoints / "old_checkpoint_step_11").mkdir()
    os.symlink(two_checkpoints / "checkpoint_step_1", two_checkpoints / "checkpoint_step_12")
    expected = Resolved(two_checkpoints / "checkpoint_step_2", [])
    assert resolve_checkpoint("latest", two_checkpoints) == expected


# ---- no space, no folder, no permission ------------------------------------------------------------------------------


def save_under_a_file_size_limit(rank, world_size, folder, limit):
    """Save step 2 while no file may exceed `limit` bytes (as on a full disk, without root), and step 3 after that."""
    run = trained_run()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    refused = save(folder, 2, run, keep_checkpoints=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    during = leftovers(folder), [step for step, _ in list_checkpoints(folder)]
    torch.distributed.barrier()
    return refused, during, save(folder, 3, run, keep_checkpoints=1)


@pytest.mark.parametrize("limit", [10, 1000, 60_000])
def test_no_space_leaves_the_old_checkpoint_and_nothing_else_and_the_next_save_works(tmp_path, limit):
    run = trained_run()
    save(tmp_path, 1, run)
    needed = sum(tensor.nbytes for tensor in everything(run).values())
    for refused, during, later in run_ranks(save_under_a_file_size_limit, 2, tmp_path, limit):
        assert not refused.ok and refused.path is None
        assert refused.message.startswith(f"{tmp_path}: File too large (the checkpoint needs {needed:,} bytes, ")
        assert during == ([], [1])
        assert later.ok
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3]
    assert verify_checkpoint(tmp_path / "checkpoint_step_3") is None


def test_no_space_for_the_pointer_alone_is_only_a_warning(tmp_path, monkeypatch):
    real_replace = os.replace

    def full(source, target):
        if os.path.basename(target) == "latest":
            raise OSError(errno.ENOSPC, "No space left on device", target)
        real_replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    result = save(tmp_path, 1, trained_run())
    assert result.ok and "No space left on device" in result.message
    assert resolve_checkpoint("latest", tmp_path).path == result.path
    assert leftovers(tmp_path) == []


def test_a_folder_that_vanished_is_reported_and_not_made_again(tmp_path):
    """It may have been a mount: writing under its mount point would fill the wrong disk."""
    folder = tmp_path / "gone"
    result = save(folder, 1, trained_run())
    assert not result.ok and result.message == f"{folder}: the folder is gone"
    assert not folder.exists()


def test_the_probe_makes_the_folder_and_leaves_nothing(tmp_path):
    save_folder.write_probe(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_the_probe_refuses_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=r"--save_dir cannot hold checkpoints: .*file"):
            save_folder.write_probe(path)


def test_the_probe_refuses_a_folder_without_permission(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir(mode=0o555)

    def probe():
        if os.geteuid() == 0:
            os.seteuid(65534)  # root may write everywhere
        with pytest.raises(UserError, match=f"{folder}: permission is denied"):
            save_folder.write_probe(folder)

    for parent in folder.parents:  # pytest's folders are closed to others
        if parent.stat().st_uid == os.geteuid() and parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(parent.stat().st_mode | 0o055)
    assert not killed(in_child(probe))


def probe_on_rank(rank, world_size, folder):
    with pytest.raises(UserError, match="cannot hold checkpoints"):
        save_folder.write_probe(folder / "file")
    (held,) = [save_folder.lock(folder)]
    with pytest.raises(UserError, match="there is no checkpoint"):
        resolve_checkpoint(folder / "none", folder)
    held.close()
    return True


def test_what_rank_0_finds_wrong_every_rank_raises(tmp_path):
    (tmp_path / "file").write_text("")
    assert run_ranks(probe_on_rank, 2, tmp_path) == [True, True]


# ---- a second trainer ------------------------------------------------------------------------------------------------


def test_a_second_trainer_is_refused_until_the_first_is_dead_even_if_its_helpers_live(tmp_path):
    helper_file = tmp_path / "helper"

    def trainer():
        _lock = save_folder.lock(tmp_path)
        helper = in_child(lambda: time.sleep(10))  # as a data worker would be
        helper_file.write_text(str(helper))
        signal.pause()

    with living_child(trainer) as pid:
        wait_for(lambda: helper_file.exists() and helper_file.read_text())
        with pytest.raises(UserError, match=rf"another trainer is writing to {tmp_path} .pid {pid} on .* since 20"):
            save_folder.lock(tmp_path)
    helper = int(helper_file.read_text())
    try:
        os.kill(helper, 0)  # it lives
        save_folder.lock(tmp_path).close()
    finally:
        os.kill(helper, signal.SIGKILL)


def test_a_lock_is_free_after_it_is_closed_and_other_folders_have_their_own(tmp_path):
    with save_folder.lock(tmp_path / "one"), save_folder.lock(tmp_path / "two"), pytest.raises(UserError):
        save_folder.lock(tmp_path / "one")
    with save_folder.lock(tmp_path / "one"):
        pass


def test_cleaning_spares_what_a_live_process_is_writing(tmp_path):
    with living_child(signal.pause) as pid:
        names = {
            f".tmp_step_7_{pid}_0123abcd": "kept",
            f".tmp_step_7_{os.getpid()}_0123abcd": "an earlier life of this process id, as in a container",
            ".tmp_step_7_999999999_0123abcd": "dead",
            ".tmp_odd": "nobody's",
            ".del_checkpoint_step_3_0123abcd": "half deleted",
        }
        for name in names:
            (tmp_path / name).mkdir()
            (tmp_path / name / "model.safetensors").write_bytes(b"x")
        (tmp_path / ".tmp_latest_999999999_0123abcd").write_text("checkpoint_step_1\n")
        (tmp_path / "notes.txt").write_text("the user's")
        touched = save_folder.clean(tmp_path)
    assert len(touched) == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".tmp_step_7_{pid}_0123abcd", "notes.txt"]


# ---- hostile or foreign ----------------------------------------------------------------------------------------------


class Payload:
    """Unpickling it creates the file `path`."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def rewrite_manifest(folder, change):
    """Apply `change` to the manifest and make it agree with the files again, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    for name, entry in manifest["files"].items():
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            entry.update(bytes=len(data), crc32=f"{zlib.crc32(data):08x}")
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_pickle_is_never_run(tmp_path):
    touched = tmp_path / "touched"
    payload = pickle.dumps(Payload(touched))
    file = tmp_path / "checkpoint_step_1000.pt"
    file.write_bytes(payload)
    torch.save({"x": Payload(touched)}, tmp_path / "zip.pt")
    for path in (file, tmp_path / "zip.pt"):
        with pytest.raises(UserError, match=r"pickle files such as \.pt can run code"):
            resolve_checkpoint(path, tmp_path)

    run = trained_run()
    for name in ("model.safetensors", "optimizer.safetensors", "trainer_state.json"):
        folder = save(tmp_path, 1, run).path
        (folder / name).write_bytes(payload)
        rewrite_manifest(folder, lambda manifest: None)
        with pytest.raises(UserError):
            load(resolve_checkpoint(folder, tmp_path).path, run)
    assert not touched.exists()


@pytest.mark.parametrize(
    "name", ["../../outside", "/etc/hostname", "a/../b", "..", "", "sub/file", ".hidden", "a\\b", "a\0b"]
)
def test_a_manifest_cannot_name_a_file_elsewhere(two_checkpoints, name):
    folder = two_checkpoints / "checkpoint_step_2"
    rewrite_manifest(folder, lambda manifest: manifest["files"].update({name: {"bytes": 0, "crc32": "00000000"}}))
    assert_falls_back(two_checkpoints, "unsafe file name")


def test_an_index_cannot_name_a_file_elsewhere(tmp_path):
    run = trained_run()
    path = save(tmp_path, 1, run, max_shard_bytes=10_000).path
    index = json.loads((path / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = "../outside.safetensors"
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names the file '\.\./outside"):
        load_model(path, run[0])


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_link_is_not_followed_out_of_the_folder(two_checkpoints, name):
    file = two_checkpoints / "checkpoint_step_2" / name
    file.rename(two_checkpoints / "elsewhere")
    file.symlink_to(two_checkpoints / "elsewhere")
    assert_falls_back(two_checkpoints, name)


def test_a_pipe_in_the_place_of_a_file_does_not_hang(two_checkpoints):
    file = two_checkpoints / "checkpoint_step_2" / "config.json"
    file.unlink()
    os.mkfifo(file)
    assert_falls_back(two_checkpoints, "config.json: not a plain file")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "written by a newer version of groundup (format 2; this one reads up to 1)"),
        ({"format": 0}, "format 0 is unknown"),
        ({"format": "1"}, "format '1' is unknown"),
        ({"files": {}}, "does not list config.json"),
        ({"files": []}, "unreadable"),
        ({"files": {"config.json": 3}}, "unreadable"),
        ({"step": 3}, "step 3 is not the step of trainer_state.json"),
    ],
)
def test_a_manifest_of_another_kind_is_refused_with_a_sentence(two_checkpoints, change, reason):
    file = two_checkpoints / "checkpoint_step_2" / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert_falls_back(two_checkpoints, reason)


def test_anything_but_an_object_in_a_manifest_is_refused(two_checkpoints):
    for text in ("[]", "null", "3", '"x"', "", "{", "\x00" * 50, "[" * 100_000):
        (two_checkpoints / "checkpoint_step_2" / "manifest.json").write_text(text)
        assert_falls_back(two_checkpoints, "manifest.json: unreadable")
