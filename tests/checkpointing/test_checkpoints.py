"""Is a checkpoint complete, open to other tools, the same from any number of ranks, and enough to go on bit for bit?"""

import json
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from checkpointing.background import HostRoom
from checkpointing.load import Resolved, load_model, load_optimizers, load_state, resolve_checkpoint
from checkpointing.save import MAX_SHARD_BYTES, SaveResult, collect, mark_best, save_checkpoint
from checkpointing.save_folder import list_checkpoints, verify_checkpoint
from checkpointing.tensors import model_tensors, optimizer_tensors, rng_state, set_rng_state
from errors import UserError
from model import Transformer, load_pretrained
from model_config import ModelConfig
from ranks import unwrap
from tests.ranks import run_ranks
from tests.tiers import grid
from training.optimizers import OPTIMIZERS, build_optimizers

TOKENIZER_FILES = {"tokenizer.json": b'{"version": "1.0"}', "tokenizer_config.json": b"{}"}


def tiny_model(seed=0, tied=False, qk_norm=False, vocab_size=64, hidden_size=32):
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        qk_norm=qk_norm,
        eos_token_id=3,
    )
    model = Transformer(config)
    model.init_weights(seed, zero_residual=False)
    return model


def tiny_run(name="muon", **options):
    model = tiny_model(**options)
    return model, build_optimizers(model, name=name, learning_rate=3e-3, weight_decay=0.1)


def train(model, optimizers, steps, rows=slice(None)):
    """One optimizer step for each of `steps`; the batch comes from the global generator, so its state matters."""
    losses = []
    for _ in steps:
        ids = torch.randint(0, 64, (4, 17))[rows]
        raw = unwrap(model)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = F.cross_entropy(raw.logits(model(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def save(folder, step, run, **options):
    options = {"state": {}, "files": TOKENIZER_FILES, "keep_checkpoints": 0} | options
    return save_checkpoint(folder, step, model=run[0], optimizers=run[1], **options)


def everything(run):
    """Every number of a run, by name."""
    return {**model_tensors(run[0]), **optimizer_tensors(*run)}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def load(path, run):
    load_model(path, run[0])
    load_optimizers(path, *run)
    set_rng_state(load_state(path)["rng"][0])


# ---- what a run gets back --------------------------------------------------------------------------------------------


CELLS = [(tied, name) for name in OPTIMIZERS for tied in (False, True)]


@pytest.mark.parametrize("tied,name", grid(CELLS, quick=[(True, "adamw"), (False, "muon"), (False, "adamw8bit")]))
def test_thirty_steps_equal_fifteen_saved_loaded_and_fifteen_more_bit_for_bit(tmp_path, name, tied):
    # of width 64 the largest weights have as many values as adamw8bit wants to keep bytes
    torch.manual_seed(1)
    uninterrupted = tiny_run(name, tied=tied, hidden_size=64)
    losses = train(*uninterrupted, range(30))

    torch.manual_seed(1)
    first = tiny_run(name, tied=tied, hidden_size=64)
    train(*first, range(15))
    path = save(tmp_path, 15, first).path

    torch.manual_seed(2)  # anything else than the state that was saved
    resumed = tiny_run(name, tied=tied, hidden_size=64, seed=5)
    load(path, resumed)
    assert_same_bits(everything(resumed), everything(first))
    assert train(*resumed, range(15, 30)) == losses[15:]
    assert_same_bits(everything(resumed), everything(uninterrupted))


def test_the_state_of_the_loop_comes_back(tmp_path):
    state = {"tokens": 10**15, "best_val_loss": 1.2345678901234567, "config": {"lr": 3e-4, "name": "ä"}, "none": None}
    path = save(tmp_path, 7, tiny_run(), state=state).path
    loaded = load_state(path)
    assert {name: loaded[name] for name in state} == state
    assert (loaded["step"], loaded["world_size"], loaded["format"], len(loaded["rng"])) == (7, 1, 1, 1)


def test_all_random_generators_come_back_through_json():
    def draw():
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            np.random.randn(),
            random.random(),
            random.gauss(0, 1),
        )

    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    draw()  # leaves half a pair of normal numbers in NumPy and in Python
    state = json.loads(json.dumps(rng_state()))
    first = draw()
    assert draw() != first
    set_rng_state(state)
    assert draw() == first


def test_learning_rate_and_options_of_this_run_win_over_the_saved_ones(tmp_path):
    first = tiny_run()
    train(*first, range(2))
    path = save(tmp_path, 2, first).path
    model = tiny_model()
    optimizers = build_optimizers(model, name="muon", learning_rate=7e-4, weight_decay=0.3)
    load_optimizers(path, model, optimizers)
    assert {group["base_lr"] for optimizer in optimizers for group in optimizer.param_groups} == {7e-4}
    assert optimizers[0].param_groups[0]["weight_decay"] == 0.3


# ---- what others can open --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"qk_norm": True}], ids=["plain", "tied", "qk_norm"])
@pytest.mark.parametrize("max_shard_bytes", [MAX_SHARD_BYTES, 10_000], ids=["one file", "shards"])
def test_the_folder_is_a_hugging_face_model(tmp_path, options, max_shard_bytes):
    """fp32 logits against transformers: 1e-5, the rounding of two implementations of the same two layers."""
    transformers = pytest.importorskip("transformers")
    run = tiny_run(**options)
    torch.manual_seed(0)
    train(*run, range(3))
    path = save(tmp_path, 3, run, max_shard_bytes=max_shard_bytes).path
    assert (len(list(path.glob("model*.safetensors"))) > 1) == (max_shard_bytes == 10_000)

    peer = transformers.AutoModelForCausalLM.from_pretrained(path)
    ids = torch.randint(0, 64, (2, 12))
    with torch.no_grad():
        expected = run[0].logits(run[0](ids))
        torch.testing.assert_close(peer(ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(load_pretrained(path).eval()(ids), run[0](ids))
    assert peer.generation_config.eos_token_id == 3
    again = tiny_run(seed=9, **options)
    load(path, again)
    assert_same_bits(everything(again), everything(run))


def test_every_tensor_is_in_the_safetensors_files_by_its_name(tmp_path):
    run = tiny_run("adamw", tied=True)
    train(*run, range(2))
    path = save(tmp_path, 2, run).path
    weights = safetensors.torch.load_file(path / "model.safetensors")
    assert_same_bits(weights, dict(run[0].named_parameters()))
    assert "lm_head.weight" not in weights
    state = safetensors.torch.load_file(path / "optimizer.safetensors")
    assert state["model.norm.weight.step"].shape == () and state["model.norm.weight.step"] == 2
    expected = {f"{n}.{kind}" for n, _ in run[0].named_parameters() for kind in ("step", "exp_avg", "exp_avg_sq")}
    assert state.keys() == expected
    assert (path / "tokenizer.json").read_bytes() == TOKENIZER_FILES["tokenizer.json"]


def test_a_shared_weight_is_stored_once_though_nothing_in_the_config_says_so(tmp_path):
    run = tiny_run()
    run[0].lm_head.weight = run[0].model.embed_tokens.weight
    path = save(tmp_path, 1, run).path
    assert "lm_head.weight" not in safetensors.torch.load_file(path / "model.safetensors")
    again = tiny_run(seed=1)
    again[0].lm_head.weight = again[0].model.embed_tokens.weight
    load_model(path, again[0])
    assert torch.equal(again[0].lm_head.weight, run[0].lm_head.weight)


def test_other_dtypes_keep_their_bits(tmp_path):
    run = tiny_run("adamw")
    run[0].register_buffer("in_half", torch.randn(3).half())
    run[0].register_buffer("in_bfloat", torch.randn(2, 3).bfloat16())
    run[0].register_buffer("flags", torch.tensor([True, False, True]))
    run[0].register_buffer("in_double", torch.randn(2).double())
    run[0].register_buffer("counter", torch.tensor(2**40 + 1))
    run[0].register_buffer("nothing", torch.zeros(0, 4))
    run[0].register_buffer("nothing_else", torch.zeros(0, 4))
    path = save(tmp_path, 1, run).path
    expected = {name: tensor.detach() for name, tensor in run[0].state_dict().items()}
    assert_same_bits(safetensors.torch.load_file(path / "model.safetensors"), expected)
    data = (path / "model.safetensors").read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    assert header.pop("__metadata__") == {"format": "pt"}
    for name, tensor in expected.items():  # aligned, so that it can be mapped as it is
        assert (8 + header_bytes + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_a_checkpoint_written_by_other_hands_to_the_documented_format_loads(tmp_path):
    """The first format must load for ever: this one is made of safetensors, json and zlib alone."""
    import zlib

    run = tiny_run("adamw")
    torch.manual_seed(0)
    train(*run, range(1))
    folder = tmp_path / "checkpoint_step_1"
    folder.mkdir()
    weights = {name: parameter.detach() for name, parameter in run[0].named_parameters()}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    optimizer_metadata = {"format": "pt", "optimizers": "AdamW"}
    state = {
        f"{name}.{kind}": value
        for name, parameter in run[0].named_parameters()
        for kind, value in run[1][0].state[parameter].items()
    }
    safetensors.torch.save_file(state, folder / "optimizer.safetensors", metadata=optimizer_metadata)
    (folder / "config.json").write_text(json.dumps(run[0].config.to_hf()))
    trainer_state = {"format": 1, "step": 1, "world_size": 1, "rng": [rng_state()]}
    (folder / "trainer_state.json").write_text(json.dumps(trainer_state))
    files = {
        file.name: {"bytes": file.stat().st_size, "crc32": f"{zlib.crc32(file.read_bytes()):08x}"}
        for file in folder.iterdir()
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 1, "files": files}))

    again = tiny_run("adamw", seed=4)
    found = resolve_checkpoint("latest", tmp_path)
    assert (found.path, found.skipped) == (folder, [])
    load(found.path, again)
    assert_same_bits(everything(again), everything(run))


# ---- any number of ranks ---------------------------------------------------------------------------------------------


def save_on_rank(rank, world_size, folder):
    """The same training on every rank, with the model inside DDP when there are several."""
    torch.manual_seed(0)
    run = tiny_run()
    wrapped = DistributedDataParallel(run[0]) if world_size > 1 else run[0]
    train(wrapped, run[1], range(3))
    torch.manual_seed(100 + rank)
    return save(folder, 3, (wrapped, run[1]))


def test_two_ranks_write_the_same_bytes_as_one(tmp_path):
    """Both ranks see the same batch, so the mean of their gradients is the gradient: (g + g) / 2 is exact."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    alone = save_on_rank(0, 1, one)
    both = run_ranks(save_on_rank, 2, two)
    assert both[0] == both[1] and both[0].ok
    names = sorted(file.name for file in alone.path.iterdir())
    assert names == sorted(file.name for file in both[0].path.iterdir())
    differing = [name for name in names if (alone.path / name).read_bytes() != (both[0].path / name).read_bytes()]
    assert differing == ["manifest.json", "trainer_state.json"]  # the generators of two ranks instead of one
    rng = load_state(both[0].path)["rng"]
    assert len(rng) == 2 and rng[0]["torch"] != rng[1]["torch"]


def continue_on_rank(rank, world_size, save_dir):
    """Resume with this rank's share of four rows and train three steps; (mean losses, all weights as bytes)."""
    path = resolve_checkpoint("latest", save_dir).path
    run = tiny_run(seed=rank)
    wrapped = DistributedDataParallel(run[0]) if world_size > 1 else run[0]
    load_model(path, wrapped)
    load_optimizers(path, wrapped, run[1])
    torch.manual_seed(11)
    share = 4 // world_size
    losses = train(wrapped, run[1], range(3), slice(rank * share, (rank + 1) * share))
    return losses, b"".join(tensor.detach().numpy().tobytes() for tensor in everything(run).values())


def test_a_checkpoint_of_two_ranks_goes_on_with_one_two_or_four(tmp_path):
    """Sums of gradients in another order: 1e-5 on the losses of three steps; all ranks of a run agree to the bit."""
    run_ranks(save_on_rank, 2, tmp_path)
    alone, weights = continue_on_rank(0, 1, tmp_path)
    for world_size in (2, 4):
        results = run_ranks(continue_on_rank, world_size, tmp_path)
        assert np.mean([losses for losses, _ in results], axis=0) == pytest.approx(alone, abs=1e-5)
        assert {state for _, state in results} == {results[0][1]}
        close = np.frombuffer(results[0][1], dtype=np.float32), np.frombuffer(weights, dtype=np.float32)
        np.testing.assert_allclose(*close, atol=1e-5)


# ---- names and misuse ------------------------------------------------------------------------------------------------


def test_a_model_compiled_in_place_has_clean_names_and_a_compiled_copy_is_refused(tmp_path):
    run = tiny_run()
    names = list(model_tensors(run[0]))
    with pytest.raises(ValueError, match=r"model\.compile\(\)"):
        save(tmp_path, 1, (torch.compile(run[0]), run[1]))
    assert not list(tmp_path.iterdir())
    run[0].compile()
    assert list(model_tensors(run[0])) == names


def test_a_model_that_does_not_fit_is_refused_with_the_vocabularies_and_stays_as_it_was(tmp_path):
    path = save(tmp_path, 1, tiny_run()).path
    other = tiny_model(seed=2, vocab_size=96)
    before = {name: tensor.clone() for name, tensor in model_tensors(other).items()}
    with pytest.raises(UserError, match="its vocabulary has 64 tokens and the model's 96"):
        load_model(path, other)
    with pytest.raises(UserError, match=r"lacks model\.layers\.0\.self_attn\.k_norm.* and 1 more"):
        load_model(path, tiny_model(qk_norm=True))
    with pytest.raises(UserError, match=r"the model has no lm_head\.weight"):
        load_model(path, tiny_model(tied=True))
    with pytest.raises(UserError, match=r"shapes differ: .* is \(64, 32\) there, \(64, 64\) here"):
        load_model(path, tiny_model(hidden_size=64))
    assert_same_bits(model_tensors(other), before)


def test_another_optimizer_or_model_is_refused(tmp_path):
    run = tiny_run("muon")
    train(*run, range(1))
    path = save(tmp_path, 1, run).path
    with pytest.raises(UserError, match=r"written with Muon\+AdamW, this run uses AdamW: set --optimizer"):
        load_optimizers(path, *tiny_run("adamw"))
    with pytest.raises(UserError, match=r"momentum_buffer is \(32, 32\) there, \(64, 64\) here"):
        load_optimizers(path, *tiny_run("muon", hidden_size=64))
    frozen = tiny_model()
    frozen.lm_head.requires_grad_(False)
    with pytest.raises(UserError, match=r"does not train: lm_head\.weight"):
        optimizers = build_optimizers(frozen, name="muon", learning_rate=1e-3, weight_decay=0.1)
        load_optimizers(path, frozen, optimizers)


@pytest.mark.parametrize("name", ["../up", "/abs", "a/b", ".hidden", "", "model.safetensors", "manifest.json"])
def test_a_further_file_may_not_leave_the_folder_or_take_a_name_of_ours(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be a further file"):
        save(tmp_path, 1, tiny_run(), files={name: b""})
    assert not list(tmp_path.iterdir())


# ---- several checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rng", "step", "format", "world_size"])
def test_the_state_of_the_loop_may_not_hide_what_save_adds(tmp_path, name):
    with pytest.raises(ValueError, match=f"state may not hold .*{name}"):
        save(tmp_path, 1, tiny_run(), state={name: 5})


def steps_in(folder):
    return [step for step, _ in list_checkpoints(folder)]


def test_the_newest_are_kept_and_the_best_and_pointers_follow(tmp_path):
    run = tiny_run()
    for step in (5, 10, 100, 20):  # 100 last but one: order is by number, not by name or time
        result = save(tmp_path, step, run, keep_checkpoints=2)
        assert result.ok and not result.message
        if step == 5:
            mark_best(tmp_path, result.path)
    assert steps_in(tmp_path) == [5, 20, 100]
    assert (tmp_path / "latest").read_text() == "checkpoint_step_20\n"
    assert (tmp_path / "best").read_text() == "checkpoint_step_5\n"
    assert resolve_checkpoint("latest", tmp_path).path == tmp_path / "checkpoint_step_100"
    assert resolve_checkpoint("best", tmp_path).path == tmp_path / "checkpoint_step_5"
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("keep", [0, None])
def test_zero_keeps_all(tmp_path, keep):
    for step in range(1, 5):
        save(tmp_path, step, tiny_run(), keep_checkpoints=keep)
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_the_checkpoint_just_written_is_never_the_one_deleted(tmp_path):
    """A run resumed from an early checkpoint in a folder that holds later ones."""
    run = tiny_run()
    for step in (8, 9):
        save(tmp_path, step, run, keep_checkpoints=2)
    assert save(tmp_path, 3, run, keep_checkpoints=2).path.is_dir()
    assert steps_in(tmp_path) == [3, 8, 9]


def test_every_third_stays_for_ever_beside_the_newest_and_the_best(tmp_path):
    run = tiny_run()
    for step in range(1, 11):
        result = save(tmp_path, step, run, keep_checkpoints=2, keep_every=3)
        if step == 4:
            mark_best(tmp_path, result.path)
    assert steps_in(tmp_path) == [3, 4, 6, 9, 10]


def test_only_the_newest_keeps_its_optimizer_state_and_all_stay_whole(tmp_path):
    """The others are models as before, and what is left of a removal that was cut short goes with the next."""
    run = tiny_run()
    paths = []
    for step in (1, 2, 3):
        train(*run, range(1))
        paths.append(save(tmp_path, step, run, keep_optimizer="last").path)
        mark_best(tmp_path, paths[0])
    assert [(path / "optimizer.safetensors").exists() for path in paths] == [False, False, True]
    assert [verify_checkpoint(path) for path in paths] == [None] * 3
    assert resolve_checkpoint(paths[0], tmp_path).path == paths[0]
    again = tiny_run(seed=7)
    load_model(paths[2], again[0])
    assert_same_bits(model_tensors(again[0]), model_tensors(run[0]))
    with pytest.raises(UserError) as refused:
        resolve_checkpoint("best", tmp_path, to_go_on=True)
    assert str(refused.value) == (
        f"checkpoint {paths[0]} cannot be used: its optimizer state was removed (--keep_optimizer last), so no run can go on "
        f"from it; start a new one from its weights with --init_from {paths[0]} and another --save_dir"
    )
    (paths[1] / "optimizer.safetensors").write_bytes(b"cut short")
    os.truncate(paths[2] / "model.safetensors", 10)
    found = resolve_checkpoint("latest", tmp_path, to_go_on=True)
    assert found.path is None and [path for path, _ in found.skipped] == paths[::-1]
    assert resolve_checkpoint("latest", tmp_path).path == paths[1]
    save(tmp_path, 4, run, keep_optimizer="last")
    assert not (paths[1] / "optimizer.safetensors").exists() and verify_checkpoint(paths[1]) is None
    assert (paths[2] / "optimizer.safetensors").exists()  # of a broken one nothing is touched


def test_a_broken_checkpoint_does_not_count_as_kept(tmp_path):
    run = tiny_run()
    for step in (1, 2, 3):
        save(tmp_path, step, run)
    (tmp_path / "checkpoint_step_3" / "model.safetensors").write_bytes(b"")
    save(tmp_path, 4, run, keep_checkpoints=2)
    assert steps_in(tmp_path) == [2, 3, 4]


def test_a_whole_checkpoint_of_the_same_step_and_bits_is_left_alone(tmp_path):
    run = tiny_run()
    path = save(tmp_path, 1, run, state={"note": "first"}).path
    inode = (path / "model.safetensors").stat().st_ino
    assert save(tmp_path, 1, run, state={"note": "second"}) == SaveResult(True, path, "")
    assert (path / "model.safetensors").stat().st_ino == inode
    assert load_state(path)["note"] == "first"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_step_1", "latest"]


@pytest.mark.parametrize("case", ["other bits", "a file is missing", "a bit is flipped"])
def test_a_checkpoint_of_the_same_step_with_other_bits_or_broken_gives_way(tmp_path, case):
    first, second = tiny_run(seed=0), tiny_run(seed=1 if case == "other bits" else 0)
    path = save(tmp_path, 1, first).path
    if case == "a file is missing":
        (path / "config.json").unlink()
    if case == "a bit is flipped":
        data = bytearray((path / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (path / "model.safetensors").write_bytes(data)
    assert save(tmp_path, 1, second).ok
    assert verify_checkpoint(path) is None
    again = tiny_run(seed=7)
    load(path, again)
    assert_same_bits(everything(again), everything(second))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_step_1", "latest"]


def test_every_way_to_name_a_checkpoint(tmp_path):
    run = tiny_run()
    for step in (1, 2):
        save(tmp_path, step, run)
    one, two = tmp_path / "checkpoint_step_1", tmp_path / "checkpoint_step_2"
    elsewhere = tmp_path / "elsewhere"
    for which, expected in [("latest", two), (one, one), (str(one), one), (f"{one}.pt", one), (tmp_path, two)]:
        assert resolve_checkpoint(which, tmp_path) == Resolved(expected, [])
    assert resolve_checkpoint("latest", elsewhere) == Resolved(None, [])
    renamed = one.rename(tmp_path / "my_favourite")
    assert resolve_checkpoint(renamed, elsewhere).path == renamed
    for which in (elsewhere, f"{elsewhere}.pt", tmp_path / "checkpoint_step_9"):
        with pytest.raises(UserError, match="there is no checkpoint"):
            resolve_checkpoint(which, tmp_path)
    with pytest.raises(UserError, match="no best checkpoint yet"):
        resolve_checkpoint("best", tmp_path)


def test_a_pointer_that_points_elsewhere_is_no_pointer(tmp_path):
    save(tmp_path, 1, tiny_run())
    outside = Path(save(tmp_path / "..", 2, tiny_run()).path)
    (tmp_path / "best").write_text(f"../{outside.name}\n")
    with pytest.raises(UserError, match="no best checkpoint"):
        resolve_checkpoint("best", tmp_path)


# ---- by a thread -----------------------------------------------------------------------------------------------------


def test_a_thread_writes_what_was_when_it_began_and_leaves_room_for_the_next(tmp_path, monkeypatch):
    """The thread may not touch the disk before every tensor has changed. The second one is in the memory of the first."""
    run = tiny_run("adamw")
    train(*run, range(2))
    may_write, mkdir = threading.Event(), os.mkdir
    room = HostRoom()
    for name in ("loop", "thread"):
        mkdir(tmp_path / name)
    for step in (2, 4):
        wanted = save(tmp_path / "loop", step, run).path
        may_write.clear()
        monkeypatch.setattr(os, "mkdir", lambda *args: (may_write.wait(), mkdir(*args)))
        started = collect(
            tmp_path / "thread",
            step,
            model=run[0],
            optimizers=run[1],
            state={},
            files=TOKENIZER_FILES,
            keep_checkpoints=0,
        ).start_writing(room)
        assert not started.is_done
        train(*run, range(2))
        with torch.no_grad():
            for tensor in everything(run).values():
                tensor.add_(1)
        may_write.set()
        result = started.result()
        monkeypatch.undo()
        assert result.ok and started.is_done, result.message
        for file in wanted.iterdir():
            assert (result.path / file.name).read_bytes() == file.read_bytes(), file.name
