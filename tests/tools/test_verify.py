"""Does `utils.py verify` find any changed byte of a dataset or checkpoint, and name the file?"""

import shutil
from pathlib import Path

import pytest

import utils
from checkpointing.save import save_checkpoint
from errors import UserError
from model import Transformer
from model_config import ModelConfig
from training.optimizers import build_optimizers


@pytest.fixture
def data(tiny_data, tmp_path) -> Path:
    """A dataset that a test may damage."""
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder with the checkpoints of steps 1 and 2."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Transformer(ModelConfig(vocab_size=64, **shape))
    optimizers = build_optimizers(model, name="adamw", learning_rate=1e-3, weight_decay=0.0)
    (tmp_path / "run").mkdir()
    for step in (1, 2):
        model.init_weights(seed=step, zero_residual=False)
        saved = save_checkpoint(
            tmp_path / "run", step, model=model, optimizers=optimizers, state={}, files={}, keep_checkpoints=0
        )
        assert saved.ok, saved.message
    return tmp_path / "run"


@pytest.fixture
def verify(capsys):
    """Runs `utils.py verify`; returns the exit code and the lines that it printed."""

    def call(*paths: Path) -> tuple[int, list[str]]:
        code = utils.main(["verify", *map(str, paths)])
        return code, capsys.readouterr().out.splitlines()

    return call


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_whole_things_are_ok(data, run, verify):
    first, second = run / "checkpoint_step_1", run / "checkpoint_step_2"
    assert verify(data) == (0, [f"{data}: ok"])
    assert verify(second) == (0, [f"{second}: ok"])
    assert verify(data, run) == (0, [f"{data}: ok", f"{first}: ok", f"{second}: ok", "all 3 are ok"])


@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("suffix", ["train_00000.bin", "val_00000.bin", "train_00000.idx", "train_00000.src"])
def test_a_flipped_bit_of_a_shard_is_found(data, verify, suffix, position):
    path = data / "dataset" / suffix
    flip(path, position)
    code, lines = verify(data)
    assert code == 1
    assert len(lines) == 1 and str(path) in lines[0]


def test_a_changed_tokenizer_is_found(data, verify):
    (data / "tokenizer.json").write_text((data / "tokenizer.json").read_text() + " ")
    code, lines = verify(data)
    assert code == 1
    assert str(data / "tokenizer.json") in lines[0]


def test_a_dataset_without_its_manifest_is_not_finished(data, verify):
    (data / "metadata.json").unlink()
    code, lines = verify(data)
    assert code == 1
    assert "metadata.json" in lines[0]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json", "trainer_state.json"])
def test_a_flipped_bit_of_a_checkpoint_is_found(run, verify, name):
    flip(run / "checkpoint_step_1" / name, -1)
    damaged = run / "checkpoint_step_1"
    code, lines = verify(run)
    assert code == 1
    assert lines[0].startswith(f"{damaged}: {name}: ")
    assert lines[1:] == [f"{run / 'checkpoint_step_2'}: ok", "1 of 2 are damaged"]
    assert verify(damaged) == (1, lines[:1])


def test_an_unfinished_checkpoint_is_found(run, verify):
    (run / "checkpoint_step_2" / "manifest.json").unlink()
    for path in (run, run / "checkpoint_step_2"):
        code, lines = verify(path)
        assert code == 1
        assert any(line.startswith(f"{run / 'checkpoint_step_2'}: manifest.json") for line in lines)


def test_anything_else_is_refused_before_the_reading(data, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    for name in ("empty", "file.txt", "absent"):
        with pytest.raises(UserError, match=name):
            utils.main(["verify", str(data), str(tmp_path / name)])
        assert capsys.readouterr().out == ""
