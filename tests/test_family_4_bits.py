"""Are the 4-bit folders of each family bitsandbytes', both ways, and do generate and quantise take every family?"""

import pytest
import torch

import utils
from adapters.base_models import load_base, save_quantised
from checkpointing.tensors import model_tensors
from errors import UserError
from model import load_pretrained
from tests.family_models import MODELS, peer, transformers
from tests.test_family_parity import IDS, close, save, saved
from tests.tiers import grid

DENSE = [name for name in MODELS if name not in ("mixtral", "qwen3 moe", "qwen3 moe unnormalised", "llama dynamic")]


def wide(name: str, **more) -> torch.nn.Module:
    """With widths that bitsandbytes' kernels for the CPU take, multiples of 64."""
    if name.startswith("gpt2"):
        return peer(name, n_inner=128, resid_pdrop=0, attn_pdrop=0, embd_pdrop=0, **more)
    return peer(name, intermediate_size=128, **({} if name.startswith("phi") else {"head_dim": 32}), **more)


@pytest.mark.parametrize("name", grid(DENSE, ["gpt2", "phi3", "gemma2"]))
def test_4_bit_folders_go_both_ways(name, tmp_path):
    """transformers with bitsandbytes opens ours and computes the same; what it quantised and saved we open."""
    pytest.importorskip("bitsandbytes")
    plain = saved(wide(name), tmp_path / "plain")
    ours = load_base(plain, quantise="nf4")
    save_quantised(ours, tmp_path / "ours", {})
    # training mode: out of it bitsandbytes repacks its weights on some CPUs and rounds their scales to bf16
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").train()
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=settings, dtype=torch.float32
    )
    quantised.save_pretrained(tmp_path / "again")
    again = load_base(tmp_path / "again")
    with torch.no_grad():
        close(theirs(IDS).logits, ours.logits(ours(IDS)))
        close(again.logits(again(IDS)), quantised.train()(IDS).logits)


@pytest.mark.parametrize("name", grid(MODELS, ["gpt2", "gemma3"]))
def test_generate_and_quantise_take_the_folder(name, tmp_path, tiny_data, capsys):
    model = load_pretrained(saved(wide(name, vocab_size=512), tmp_path / "theirs"))
    folder = save(model, tmp_path / "ours")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tiny_data / file).read_bytes())
    words = ["generate", "--prompt", "the model", "--max_new_tokens", "12", "--device", "cpu", "--checkpoint"]
    assert utils.main([*words, str(folder)]) == 0
    whole = capsys.readouterr().out
    assert whole.startswith("the model") and len(whole) > len("the model\n")
    quantise = ["quantise", "--model", str(folder), "--output", str(tmp_path / "four")]
    if model.config.num_experts:
        with pytest.raises(UserError, match="a mixture of experts cannot be saved in 4 bits"):
            utils.main(quantise)
        return
    assert utils.main(quantise) == 0
    capsys.readouterr()
    assert utils.main([*words, str(tmp_path / "four")]) == 0
    assert capsys.readouterr().out.startswith("the model")
    small = sum(file.stat().st_size for file in (tmp_path / "four").glob("model*.safetensors"))
    assert small < sum(tensor.nbytes for tensor in model_tensors(model).values())
