"""Is the reference of DPO computed once for a model and its data, and anew when either changes or the file is broken?"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import UserError
from stages.dpo import REFERENCE, sequence_logprobs
from stages.reference_cache import REFERENCE_FILE, with_kept_reference
from tests.stages.example_stages import a_feed, a_model, some_examples
from training.config import TrainConfig
from training.examples_data import pack_examples

GROUPS = some_examples(6, 2)
ORDER = {"fingerprints": ["of the files"], "max_length": 32, "seed": 0}


@pytest.fixture
def place(tmp_path):
    """(a run's options, the folder of its base, the model in it)."""
    model = a_model().requires_grad_(False)
    base, data = tmp_path / "base", tmp_path / "data"
    base.mkdir()
    data.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(model.config.to_hf()))
    (data / "pairs.jsonl").write_text("{}")
    (tmp_path / "run").mkdir()
    config = TrainConfig(stage="dpo", train_data=[str(data / "pairs.jsonl")], save_dir=str(tmp_path / "run"))
    return config, base, model


def references(config, base, model, order=ORDER) -> tuple[list[float], int]:
    """(the column of all sequences, how often the model was asked)."""
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    feed = with_kept_reference(config, a_feed(GROUPS), model, base=base, order=order)
    hook.remove()
    return [sequence.columns[REFERENCE] for group in feed.data.groups for sequence in group], len(calls)


def test_the_second_run_over_the_same_model_and_data_computes_nothing(place, tmp_path, capsys):
    config, base, model = place
    first, calls = references(config, base, model)
    [batch] = pack_examples(GROUPS, 32, 12)
    torch.testing.assert_close(torch.tensor(first), sequence_logprobs(model, batch), atol=1e-4, rtol=1e-6)
    assert calls and "kept in" in capsys.readouterr().out

    config.save_dir, config.dpo_beta, config.learning_rate = str(tmp_path / "second"), 0.5, 1e-3
    (tmp_path / "second").mkdir()
    assert references(config, base, model, ORDER | {"seed": 5}) == (first, 0)
    assert "taken from" in capsys.readouterr().out
    assert (tmp_path / "second" / REFERENCE_FILE).read_bytes() == (tmp_path / "run" / REFERENCE_FILE).read_bytes()


@pytest.mark.parametrize("change", ["weights", "data", "loss", "broken", "shorter"])
def test_what_changes_it_is_computed_anew(place, change):
    config, base, model = place
    references(config, base, model)
    [kept] = (base.parent / "data").glob("*.safetensors")
    order = ORDER
    if change == "weights":
        tensors = load_file(base / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, base / "model.safetensors")
    elif change == "data":
        order = ORDER | {"fingerprints": ["of other files"]}
    elif change == "loss":
        config.dpo_loss = "kto"  # which has further sequences, the mismatched ones
    elif change == "broken":
        kept.write_bytes(kept.read_bytes()[:-4])
    else:
        save_file({"train": torch.zeros(3)}, kept)
    assert references(config, base, model, order)[1] > 0


def test_a_resumed_run_reads_its_own_file_and_needs_it(place, tmp_path):
    config, base, model = place
    first, _ = references(config, base, model)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "run" / "checkpoint_step_2").mkdir()
    model.model["norm"].weight.data += 1  # it has learned since
    assert references(config, base, model) == (first, 0)
    (tmp_path / "run" / REFERENCE_FILE).unlink()
    with pytest.raises(UserError, match="start a new run"):
        references(config, base, model)


def test_data_in_a_folder_that_cannot_be_written_is_no_reason_to_stop(place, tmp_path, capsys):
    config, base, model = place
    shutil.rmtree(tmp_path / "data")
    values, calls = references(config, base, model)
    assert calls and len(values) == 12 and "cannot be kept" in capsys.readouterr().out
    assert (tmp_path / "run" / REFERENCE_FILE).exists()
