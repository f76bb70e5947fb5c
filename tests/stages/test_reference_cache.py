"""Is the reference of DPO computed once for a model and its data, and anew when either changes or the file is broken?"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import UserError
from stages.dpo import REFERENCE, sequence_logprobs
from stages.reference_cache import REFERENCE_FILE, with_kept_reference
from tests.stages.example_stages import a_feed, a_model, some_examples
from training.config import TrainConfig
from training.examples_data import pack_examples
from training.standing import folder_digests

GROUPS = some_examples(6, 2)


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


def references(config, base, model, groups=GROUPS) -> tuple[list[float], int]:
    """(the column of all sequences, how often the model was asked)."""
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    feed = with_kept_reference(config, a_feed(groups), model, base=folder_digests(base))
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
    assert references(config, base, model) == (first, 0)
    assert "taken from" in capsys.readouterr().out
    assert (tmp_path / "second" / REFERENCE_FILE).read_bytes() == (tmp_path / "run" / REFERENCE_FILE).read_bytes()


def changed(groups, change):
    """The examples with one thing about them changed, their number and the files' names the same."""
    groups = [list(group) for group in groups]
    first = groups[0][0]
    if change == "swapped":
        return [group[::-1] for group in groups]
    if change == "order":
        return groups[::-1]
    if change == "token":
        groups[0][0] = replace(first, tokens=np.concatenate([first.tokens[:-1], [first.tokens[-1] ^ 1]]))
    else:
        groups[0][0] = replace(first, learned=np.concatenate([first.learned[:-1], [not first.learned[-1]]]))
    return groups


@pytest.mark.parametrize("change", ["weights", "config", "swapped", "order", "token", "learned", "broken", "shorter"])
def test_what_changes_it_is_computed_anew(place, tmp_path, change):
    config, base, model = place
    references(config, base, model)
    [kept] = (base.parent / "data").glob("*.safetensors")
    groups = GROUPS
    if change == "weights":
        tensors = load_file(base / "model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, base / "model.safetensors")
    elif change == "config":
        described = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps(described | {"rms_norm_eps": 1e-3}))
    elif change == "broken":
        kept.write_bytes(kept.read_bytes()[:-4])
    elif change == "shorter":
        save_file({"train": torch.zeros(3)}, kept)
    else:
        groups = changed(GROUPS, change)
    config.save_dir = str(tmp_path / "run")
    assert references(config, base, model, groups)[1] > 0


@pytest.mark.parametrize("change", ["swapped", "order", "token", "learned"])
def test_a_resumed_run_refuses_its_file_for_other_examples(place, tmp_path, change):
    config, base, model = place
    references(config, base, model)
    (tmp_path / "run" / "checkpoint_step_2").mkdir()
    with pytest.raises(UserError, match="other examples"):
        references(config, base, model, changed(GROUPS, change))


def test_the_flag_says_where_it_is_kept(place, tmp_path, capsys):
    config, base, model = place
    config.reference_cache = "none"
    _, calls = references(config, base, model)
    assert calls and not list((tmp_path / "data").glob("*.safetensors")) and "none" in capsys.readouterr().out
    config.reference_cache, config.save_dir = str(tmp_path / "kept" / "here"), str(tmp_path / "second")
    (tmp_path / "second").mkdir()
    first, calls = references(config, base, model)
    assert calls and list((tmp_path / "kept" / "here").glob("*.safetensors"))
    assert references(config, base, model) == (first, 0)


def test_a_resumed_run_reads_its_own_file_and_needs_it(place, tmp_path):
    config, base, model = place
    first, _ = references(config, base, model)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "run" / "checkpoint_step_2").mkdir()
    model.model.norm.weight.data += 1  # it has learned since
    assert references(config, base, model) == (first, 0)
    (tmp_path / "run" / REFERENCE_FILE).unlink()
    with pytest.raises(UserError, match="start a new run"):
        references(config, base, model)


def test_data_in_a_folder_that_cannot_be_written_is_no_reason_to_stop(place, tmp_path, capsys):
    config, base, model = place
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").write_text("no folder")
    values, calls = references(config, base, model)
    assert calls and len(values) == 12 and "run's folder only" in capsys.readouterr().out
    assert (tmp_path / "run" / REFERENCE_FILE).exists()
