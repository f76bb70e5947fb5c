"""Does each family compute what its class in transformers does? Logits, loss, every gradient, folders, generation.

A random small model of each, every parameter perturbed: as transformers initialises them, norms and biases would hide errors.
Bounds: fp32 sums in another order, within 1e-5 of values of order one.
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from adapters.lora import target_names
from adapters.peft_files import load_adapter
from checkpointing.save import write_weights
from checkpointing.tensors import model_tensors
from families.new_models import parts_of_new
from families.weights import stored_views
from kernels.attention_masks import document_positions
from model import KVCache, Transformer, load_pretrained
from model_config import ModelConfig
from tests.family_models import ENCODERS, MODELS, peer, peer_config, transformers
from tests.tiers import grid

IDS = torch.randint(3, 131, (2, 41), generator=torch.Generator().manual_seed(7))


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def save(model: Transformer, folder: Path) -> Path:
    """Our folder, as a checkpoint holds it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_hf()))
    tensors = model_tensors(model)
    write_weights(folder, {name: t.nbytes for name, t in tensors.items()}, lambda names: {n: tensors[n] for n in names})
    return folder


def close(ours: Tensor, theirs: Tensor, bound: float = 1e-5) -> None:
    scale = max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, atol=bound * scale, rtol=0)


@pytest.fixture
def pair(request, tmp_path):
    """(ours, theirs), the same weights in fp32."""
    theirs = peer(request.param)
    ours = load_pretrained(saved(theirs, tmp_path / "theirs"))
    assert ours.config.family == theirs.config.model_type
    return ours, theirs


every_model = pytest.mark.parametrize("pair", [*MODELS, *ENCODERS], indirect=True)
every_decoder = pytest.mark.parametrize("pair", MODELS, indirect=True)
every_encoder = pytest.mark.parametrize("pair", ENCODERS, indirect=True)


@every_model
def test_logits_loss_and_every_gradient(pair):
    ours, theirs = pair
    ours_logits, their_logits = ours.logits(ours(IDS)), theirs(IDS).logits
    close(ours_logits, their_logits)
    losses = [cross_entropy(x[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()) for x in (ours_logits, their_logits)]
    close(*losses)
    for loss in losses:
        loss.backward()
    their_gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    compared = set()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        if parameter.dim() == 3:  # which transformers stacks in memory, too
            layer, leaf = name.split(".")[2], name.rpartition(".")[2]
            [stored] = [key for key in their_gradients if f".{layer}.mlp." in key and key.endswith(f"experts.{leaf}")]
            close(parameter.grad, their_gradients[stored])
            compared.add(stored)
            continue
        for stored, gradient in stored_views(ours.config.family, name, parameter.grad).items():
            stored = (
                stored if stored in their_gradients else name
            )  # Mixtral's router, which is saved under another name
            close(gradient, their_gradients[stored])
            compared.add(stored)
    assert compared == their_gradients.keys()


@every_model
def test_packed_documents_are_each_alone(pair):
    ours, _ = pair
    starts = torch.tensor([0, 5, 41, 60, 82], dtype=torch.int32)
    packed = ours(IDS, document_positions(starts, *IDS.shape), starts).flatten(0, 1)
    flat = IDS.flatten()
    for start, end in itertools.pairwise(starts):
        close(packed[start:end], ours(flat[None, start:end])[0])


@every_model
def test_folders_go_both_ways(pair, tmp_path):
    """Saved by us, transformers' class opens it and computes the same; saved again by it and loaded, the same bits."""
    ours, theirs = pair
    folder = save(ours, tmp_path / "ours")
    auto_class = transformers.AutoModelForCausalLM if ours.config.causal else transformers.AutoModelForMaskedLM
    auto = auto_class.from_pretrained(folder)
    assert type(auto) is type(theirs)
    close(auto.eval()(IDS).logits, theirs(IDS).logits)
    again = load_pretrained(saved(auto, tmp_path / "again"))
    before = model_tensors(ours)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model_tensors(again).items())
    assert again.config == ours.config


@every_decoder
def test_greedy_generation_with_a_cache(pair):
    """Token for token, with prompts shorter than the window and answers that leave it."""
    ours, theirs = pair
    prompt = IDS[:1, :5]
    with torch.inference_mode():
        cache = KVCache(ours.config, batch_size=1, max_length=40)
        hidden, drawn = ours(prompt, cache=cache), []
        while True:
            drawn.append(ours.logits(hidden[:, -1]).argmax(-1))
            if len(drawn) == 30:
                break
            hidden = ours(drawn[-1][:, None], cache=cache)
        expected = theirs.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None)
    assert torch.cat(drawn).tolist() == expected[0, 5:].tolist()


@pytest.mark.parametrize("length", grid([30, 64, 65, 200], [64, 65]))
def test_longer_than_the_original_context(tmp_path, length):
    """LongRoPE's two sets of factors, on either side of where they change; partial rotation."""
    theirs = peer("phi4 mini")
    ours = load_pretrained(saved(theirs, tmp_path / "theirs"))
    ids = torch.randint(3, 131, (1, length), generator=torch.Generator().manual_seed(1))
    close(ours.logits(ours(ids)), theirs(ids).logits)


@every_encoder
def test_padded_rows_and_segments(pair):
    """transformers pads a batch; we pack it. The same logits; and BERT's two segments."""
    ours, theirs = pair
    lengths = [41, 17]
    mask = torch.arange(41) < torch.tensor(lengths)[:, None]
    padded = torch.where(mask, IDS, 1)
    types = (torch.arange(41) % 3 == 0).long().expand(2, -1) if ours.config.type_vocab_size == 2 else None
    given = {"attention_mask": mask} | ({} if types is None else {"token_type_ids": types})
    expected = theirs(padded, **given).logits[mask]
    starts = torch.tensor([0, 41, 58], dtype=torch.int32)
    packed_types = None if types is None else types[mask][None]
    hidden = ours(padded[mask][None], cu_seqlens=starts, token_types=packed_types)
    close(ours.logits(hidden)[0], expected)


@every_decoder
def test_an_adapter_of_peft_is_computed(pair, tmp_path):
    """Made by PEFT on transformers' class, on all its linear layers, with every value moved."""
    peft = pytest.importorskip("peft")
    ours, theirs = pair
    targets = list(target_names(ours))
    adapted = peft.get_peft_model(
        theirs, peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    close(ours.logits(ours(IDS)), adapted(IDS).logits)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_bare_encoder_and_its_pooler(tmp_path, name):
    """BertModel's folder, which has no head and no prefix, loaded and saved."""
    config = peer_config(name)
    theirs = transformers.AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    ours = load_pretrained(saved(theirs, tmp_path / "theirs"))
    found, expected = ours(IDS), theirs(IDS)
    close(found, expected.last_hidden_state)
    close(ours.pooled(found[:, 0]), expected.pooler_output)
    again = transformers.AutoModel.from_pretrained(save(ours, tmp_path / "ours")).eval()
    assert type(again) is type(theirs)
    close(again(IDS).pooler_output, expected.pooler_output)


def test_berts_two_heads_of_pretraining(tmp_path):
    config = peer_config("bert")
    theirs = transformers.BertForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    ours = load_pretrained(saved(theirs, tmp_path / "theirs"))
    expected, hidden = theirs(IDS), ours(IDS)
    close(ours.logits(hidden), expected.prediction_logits)
    close(ours.next_sentence_logits(hidden[:, 0]), expected.seq_relationship_logits)
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    (tmp_path / "theirs/config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    masked = load_pretrained(tmp_path / "theirs")  # as bert-base-uncased is: the folder holds more than its class has
    close(masked.logits(masked(IDS)), expected.prediction_logits)
    again = transformers.AutoModelForPreTraining.from_pretrained(save(ours, tmp_path / "ours")).eval()
    close(again(IDS).seq_relationship_logits, expected.seq_relationship_logits)


@pytest.mark.parametrize("layers", [3, 7])
def test_a_new_gemma_of_few_layers_has_one_that_sees_all(layers, tmp_path):
    """Against transformers' class, on rows longer than the window."""
    parts = parts_of_new("gemma3", layers, 16) | {"sliding_window": 8}
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers, "num_attention_heads": 4}
    ours = Transformer(ModelConfig(vocab_size=131, **shape, **parts))
    ours.init_weights(seed=1, zero_residual=False)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(save(ours, tmp_path / "ours"))
    assert theirs.config.layer_types.count("full_attention") == 1
    with torch.no_grad():
        close(ours.logits(ours(IDS)), theirs(IDS).logits)
