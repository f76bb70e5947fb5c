"""Is the loss of pretraining what it is said to be: next-token nats, summed, documents apart, bits by bytes?"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adapters.lora import add_adapters
from batches.micro_batch import IGNORE_INDEX
from batches.windows import Windows, open_training_data
from dataprep.shards import open_split
from dataprep.token_bytes import TokenBytes
from dataprep.tokenizers import load_tokenizer
from model import Transformer
from model_config import ModelConfig
from ranks import Ranks
from stages.pretrain import Pretrain
from tests.ranks import run_ranks
from training.precision import choose_precision

CPU = torch.device("cpu")


def a_stage(tiny_data, ranks=None, eval_tokens=0) -> Pretrain:
    data = open_training_data([open_split(tiny_data, "train")], [], max_length=32, stride=0, document_mask=True, seed=0)
    return Pretrain(
        data=data, validation=Windows(open_split(tiny_data, "val"), 32, 0),
        token_bytes=TokenBytes(open_split(tiny_data, "val"), load_tokenizer(tiny_data)), ranks=ranks or Ranks(0, 1, CPU),
        precision=choose_precision("none", CPU), batch_size=8, micro_batch_size=8, eval_tokens=eval_tokens, z_loss=0.0,
    )  # fmt: skip


def a_model(tiny_data) -> Transformer:
    vocab_size = load_tokenizer(tiny_data).vocab_size
    model = Transformer(ModelConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                    num_attention_heads=2, max_position_embeddings=32))  # fmt: skip
    model.init_weights(3, zero_residual=False)
    return model


def test_the_loss_is_that_of_every_document_alone(tiny_data):
    """Each document of each row through the model by itself, cross-entropy in float64: equal to 1e-5 relative."""
    stage, model = a_stage(tiny_data), a_model(tiny_data)
    batch = next(stage.batches(0))[0]
    total, metrics = stage.loss(model, batch)
    expected, count = 0.0, 0
    for tokens, starts in stage.data.rows(0, 8):
        edges = [0, *starts.tolist(), len(tokens)]
        for begin, end in itertools.pairwise(edges):
            document = torch.from_numpy(tokens[begin:end])[None]
            if document.shape[1] < 2:
                continue
            logits = model.logits(model(document[:, :-1]))[0].double()
            expected += F.cross_entropy(logits, document[0, 1:], reduction="sum").item()
            count += document.shape[1] - 1
    assert batch.weight == count
    assert math.isclose(total.item(), expected, rel_tol=1e-5)
    assert metrics["loss"][0].item() == total.item() and metrics["loss"][1] == count


def test_z_loss_moves_the_gradient_and_not_the_report(tiny_data):
    model = a_model(tiny_data)
    stage = a_stage(tiny_data)
    batch = next(stage.batches(0))[0]
    plain, report = stage.loss(model, batch)
    with_z, report_z = Pretrain(**{**stage.__dict__, "z_loss": 1e-2}).loss(model, batch)
    assert with_z > plain and report["loss"][0] == report_z["loss"][0]


def test_bits_per_byte_are_the_nats_of_the_targets_over_their_bytes(tiny_data):
    """The bytes from decoding the targets' text, not from the table that the stage uses."""
    stage, model, tokenizer = a_stage(tiny_data), a_model(tiny_data), load_tokenizer(tiny_data)
    figures = stage.evaluate(model, everything=True)
    split = open_split(tiny_data, "val")
    tokens = split.read(0, split.num_tokens).tolist()
    targets = [t for place, t in enumerate(tokens) if place and place not in set(split.document_starts(0, len(tokens)))]
    # raw bytes of the byte-level pieces; a token may hold half a character, so they are summed before decoding
    num_bytes = len(tokenizer.decode([t for t in targets if t != tokenizer.eos_token_id]).encode())
    expected = figures["val_loss"] * len(targets) / math.log(2) / num_bytes
    # a document's first token is no target, so a character split there decodes to U+FFFD, 3 bytes: within 2 %
    assert math.isclose(figures["val_bpb"], expected, rel_tol=0.02)
    # untrained weights guess: about ln(vocabulary) a token
    assert abs(figures["val_loss"] - math.log(tokenizer.vocab_size)) < 1.0


@pytest.mark.parametrize("world_size", [2, 3])
def test_evaluation_is_the_same_on_any_number_of_ranks(tiny_data, world_size):
    def evaluate(rank, world_size):
        return a_stage(tiny_data, Ranks(rank, world_size, CPU)).evaluate(a_model(tiny_data), everything=False)

    alone = a_stage(tiny_data).evaluate(a_model(tiny_data), everything=False)
    for figures in run_ranks(evaluate, world_size):
        assert figures.keys() == alone.keys()
        assert all(math.isclose(figures[name], alone[name], rel_tol=1e-6) for name in alone)


def test_a_subset_is_evaluated_and_at_the_end_everything(tiny_data):
    stage, model = a_stage(tiny_data, eval_tokens=64), a_model(tiny_data)
    assert set(stage.evaluate(model, everything=False)) == {"val_loss", "val_bpb"}
    last = stage.evaluate(model, everything=True)
    whole = a_stage(tiny_data).evaluate(model, everything=True)
    assert last["val_loss_all"] == whole["val_loss"] != last["val_loss"]


def test_batches_go_on_from_a_sample(tiny_data):
    stage = a_stage(tiny_data)
    steps = stage.batches(0)
    second = [next(steps), next(steps)][1][0]
    again = next(stage.batches(8))[0]
    assert torch.equal(second.input_ids, again.input_ids) and (second.targets != IGNORE_INDEX).any()


def dropped(rank: int, world_size: int, tiny_data, micro_batch_size: int = 8) -> tuple[np.ndarray, dict]:
    """Gradient of a step of adapters under dropout, and the evaluation behind it; the generators of all ranks are equal."""
    ranks, model = Ranks(rank, world_size, CPU), a_model(tiny_data)
    add_adapters(model, rank=4, dropout=0.4)
    model.dropout = 0.3
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    stage = replace(a_stage(tiny_data, ranks), micro_batch_size=micro_batch_size)
    torch.manual_seed(rank if world_size > 2 else 0)  # nothing is drawn from it
    batches = next(stage.batches(16))
    for batch in batches:
        stage.loss(model, batch)[0].backward()
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    flat = ranks.sum(torch.cat(parts).double().tolist())
    return np.array(flat), stage.evaluate(model, everything=True)


def test_dropout_follows_the_rows_and_is_off_in_evaluation(tiny_data):
    whole, figures = dropped(0, 1, tiny_data)
    others = [dropped(0, 1, tiny_data, 3), *run_ranks(dropped, 2, tiny_data), *run_ranks(dropped, 3, tiny_data)]
    for gradient, evaluated in others:
        assert np.abs(gradient - whole).max() < 1e-5 * np.abs(whole).max()
        assert evaluated["val_loss"] == pytest.approx(figures["val_loss"], rel=1e-6)
    plain = a_model(tiny_data)
    add_adapters(plain, rank=4)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    assert a_stage(tiny_data).evaluate(plain, everything=True)["val_loss"] == pytest.approx(
        figures["val_loss"], rel=1e-6
    )
