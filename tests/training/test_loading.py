"""Do the models of PPO start from what the command names: one base, its adapters, and a judge trained over the same base?"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from adapters.actor_critic import REWARD_ADAPTER, REWARD_HEAD, ActorCritic, adapter_scores
from adapters.base_models import load_base, save_quantised
from adapters.lora import adapters_off, add_adapters
from adapters.peft_files import save_adapter
from adapters.scalar_head import RewardModel
from errors import UserError
from kernels.choice import KernelChoice
from model import Transformer
from model_config import ModelConfig
from training.config import TrainConfig
from training.loading import build_model, read_base_shape, read_shape
from training.precision import choose_precision

CPU = torch.device("cpu")
IDS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(5))
PLACES = torch.arange(12).expand(2, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Hugging Face folder, written without our own writers."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = Transformer(ModelConfig(vocab_size=97, **shape))
    model.init_weights(seed=1, zero_residual=False)
    folder = tmp_path_factory.mktemp("base") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(model.config.to_hf()))
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def judge(base, tmp_path_factory):
    """(the folder of a reward model's adapter over the base, the scores that model gives to IDS)."""
    model = RewardModel.from_pretrained(base, seed=0)
    add_adapters(model, rank=4, alpha=6.0)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    folder = tmp_path_factory.mktemp("judge") / "adapter"
    save_adapter(model, folder, base_model=str(base))
    return folder, model(IDS, PLACES).detach()


def build(base, **options):
    config = TrainConfig(**{"lora": True, "init_from": str(base), "stage": "ppo", "train_data": ["x"], **options})
    return build_model(
        config, read_shape(base), base, None, kernels=KernelChoice(), num_real_tokens=97, device=CPU,
        precision=choose_precision("none", CPU), rows=24,
    )  # fmt: skip


def test_a_reward_adapter_judges_over_the_models_own_base_and_the_critic_starts_from_it(base, judge):
    """The judge's scores equal the reward model's, to the bit: the same numbers in the same order."""
    folder, wanted = judge
    model = build(base, reward_model=str(folder))
    assert isinstance(model, ActorCritic)
    head = getattr(model.policy, REWARD_HEAD)
    assert torch.equal(adapter_scores(model.policy, REWARD_ADAPTER, head, IDS, PLACES, None, None), wanted)
    hidden, values = model(IDS, PLACES, None)
    assert torch.equal(values, wanted)
    with adapters_off(model.policy):
        assert torch.equal(model.policy(IDS, PLACES), hidden)

    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "value_head" in learns and not any(REWARD_ADAPTER in name.split(".") for name in learns)
    assert {name.rpartition(".")[2] for name in learns} == {"policy", "value", "value_head"}
    for name, parameter in model.named_parameters():
        if name in learns:
            parameter.data += 0.1
    assert torch.equal(adapter_scores(model.policy, REWARD_ADAPTER, head, IDS, PLACES, None, None), wanted)
    assert not torch.equal(model(IDS, PLACES, None)[1], wanted)


def test_grpo_computes_with_its_own_adapter_and_not_with_the_judge(base, judge):
    model = build(base, stage="grpo", reward_model=str(judge[0]))
    with adapters_off(model):
        plain = model(IDS, PLACES)
    assert torch.equal(model(IDS, PLACES), plain)  # its own begins as nothing, and the judge is not among the active
    assert getattr(model, REWARD_HEAD).shape == (1, 64)


def test_without_a_reward_model_the_first_values_are_0(base):
    assert not build(base)(IDS, PLACES, None)[1].any()


def test_a_judge_over_another_base_is_refused(base, judge, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for file in judge[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, words in (
        ({"base_model_name_or_path": "/elsewhere"}, "utils.py merge"),
        ({"modules_to_save": None}, "--stage reward"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=words):
            build(base, reward_model=str(folder))
    with pytest.raises(UserError, match="no --load_in_4bit"):
        build(base, reward_model=str(judge[0]), load_in_4bit=True)
    with pytest.raises(UserError, match=r"utils\.py merge"):  # all weights learn: there is no base to share
        build(base, reward_model=str(judge[0]), lora=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stage": "pretrain", "train_data": []}, "which do not learn: add --lora, or start from the model that it was"),
        ({"stage": "sft"}, "which do not learn: add --lora"),
        ({"stage": "reward", "lora": True, "load_in_4bit": True}, "--stage reward puts a head .* --lora --load_in_4bit"),
        ({"stage": "classify", "lora": True}, "--stage classify puts a head on others"),
        ({"stage": "sft", "lora": True}, None),
        ({"stage": "sft", "lora": True, "load_in_4bit": True}, None),
    ],
)  # fmt: skip
def test_of_a_4_bit_base_adapters_alone_learn(options, words, base, tmp_path):
    """Trained whole, its NF4 layers would stand still, and be saved as what nothing opens."""
    save_quantised(load_base(base, quantise="nf4"), tmp_path / "four", {})
    config = TrainConfig(**{"init_from": str(tmp_path / "four"), "train_data": ["x"], "sample_prompt": "", **options})
    if words is None:
        assert read_base_shape(config, tmp_path / "four") == read_shape(base)
        return
    with pytest.raises(UserError, match=words):
        read_base_shape(config, tmp_path / "four")


def test_routers_losses_are_for_bases_that_have_routers(base, tmp_path):
    mixture = {"family": "mixtral", "num_experts": 4, "experts_per_token": 2, "expert_size": 128}
    shape = replace(read_shape(base), **mixture)
    (tmp_path / "config.json").write_text(json.dumps(shape.to_hf()))
    for name in ("router_aux_loss_coef", "router_z_loss_coef"):
        config = TrainConfig(init_from=str(base), **{name: 0.5})
        with pytest.raises(UserError, match=f"is a llama without experts, and --{name} is for mixtures"):
            read_base_shape(config, base)
        assert read_base_shape(config, tmp_path).num_experts == 4
    assert read_base_shape(TrainConfig(init_from=str(base)), base).num_experts is None


def test_a_stage_that_needs_the_words_head_takes_no_classifier(base, tmp_path):
    config = read_shape(base).to_hf() | {"id2label": {"0": "LABEL_0"}}
    for named, stage, refused in (
        ("LlamaForSequenceClassification", "sft", True),
        ("LlamaForTokenClassification", "reward", True),
        ("LlamaForSequenceClassification", "reward", False),
        ("LlamaForTokenClassification", "classify", False),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [named]}))
        run = TrainConfig(init_from=str(tmp_path), stage=stage, train_data=["x"])
        if not refused:
            assert read_base_shape(run, tmp_path).hidden_size == 64
            continue
        with pytest.raises(UserError, match=f"is a {named}, without the head that --stage {stage} needs: start from"):
            read_base_shape(run, tmp_path)
