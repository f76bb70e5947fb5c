"""Does a step depend on how it was divided, in any stage? And does a stage do what its flags say, by default what papers do?

Runs are built from flags by train.py's own `build_run` and stepped by its `Run.optimizer_step`. Five examples (for GRPO
fifteen answers) make a step; each fills a row by itself, so micro-batches of 5, 4 and 1 rows are one, two and five of them,
of unequal weight, as the ranks' shares are: were a mean of means taken anywhere, the gradients would be others.
"""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # DDP imports it, and each forked rank would spend two seconds on that
from safetensors.torch import save_file
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

from adapters.lora import AdapterSettings, adapter_settings, is_quantised
from adapters.scalar_head import RewardModel
from arguments import ArgumentParser
from model import Transformer
from model_config import ModelConfig
from ranks import Ranks, unwrap
from sharding import like, whole
from stages.build import open_stage_data
from tests.ranks import run_ranks
from tests.tiers import grid
from train import Run, build_run
from training.config import add_options, resolve_config
from training.metrics import reduce_metrics

CPU = torch.device("cpu")
VOCABULARY = "<unk> one two three four five six seven eight nine ten </s>"  # small, so that some answers end early
SHARED = "--batch_size 5 --max_length 32 --grad_clip 0 --seed 1 --mixed_precision none --device cpu"
FROM_BASE = "--init_from BASE --eval_fraction 0"
DRAWN = "--train_data prompts.jsonl --max_new_tokens 12 --rollout_epochs 2 --reward_function length=6 regex=one"
GRPO = f"--stage grpo {DRAWN} --group_size 3 --kl_coefficient 0.1"
PPO = f"--stage ppo {DRAWN} --missing_eos_penalty 0.5"
PAIRS = "--train_data pairs.jsonl"
ENCODER = "--stage mlm --data_dir ENCODER_TEXT --hidden_size 32 --num_layers 2 --num_heads 2 --optimizer adamw"
STAGES = {
    "pretrain": "--data_dir TEXT --hidden_size 32 --num_layers 2 --num_heads 2 --optimizer adamw --z_loss 1e-3",
    "mlm": f"{ENCODER} --model bert --z_loss 1e-3 --mask_probability 0.3",
    "mlm of pairs": f"{ENCODER} --model bert --next_sentence --whole_words",
    "mlm with dropout": f"{ENCODER} --model modernbert --dropout 0.2",
    "sft": "--stage sft --train_data chat.jsonl --neftune_alpha 5",
    "sft with LoRA over NF4": "--stage sft --train_data chat.jsonl --lora --load_in_4bit",
    "sft with dropout": "--stage sft --train_data chat.jsonl --lora --lora_dropout 0.4 --neftune_alpha 5",
    "sft with dropout over NF4": "--stage sft --train_data chat.jsonl --lora --load_in_4bit --lora_dropout 0.4",
    "reward with dropout": f"--stage reward {PAIRS} --lora --lora_dropout 0.4",
    "reward": f"--stage reward {PAIRS}",
    "reward with DoRA": f"--stage reward {PAIRS} --lora --dora",
    "dpo": f"--stage dpo {PAIRS} --label_smoothing 0.1",
    "dpo with LoRA": f"--stage dpo {PAIRS} --lora",
    "ipo": f"--stage dpo --dpo_loss ipo {PAIRS}",
    "hinge": f"--stage dpo --dpo_loss hinge {PAIRS}",
    "simpo": f"--stage dpo --dpo_loss simpo {PAIRS}",
    "orpo": f"--stage dpo --dpo_loss orpo {PAIRS}",
    "kto": "--stage dpo --dpo_loss kto --train_data labels.jsonl",
    "kto with LoRA": "--stage dpo --dpo_loss kto --train_data labels.jsonl --lora",
    **{name: f"{GRPO} --grpo_loss {name}" for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo")},
    "grpo with LoRA": f"{GRPO} --lora --mask_truncated",
    "ppo": PPO,
    "ppo with LoRA": f"{PPO} --lora --num_minibatches 2",
}


@pytest.fixture(scope="module")
def workshop(tiny_data, encoder_data, tmp_path_factory) -> Path:
    """A model of 12 words with its tokenizer, examples of 17 to 32 words, and the shards that the stages of text read."""
    words = VOCABULARY.split()
    tokens = {word: number for number, word in enumerate(words)}
    folder = tmp_path_factory.mktemp("every_stage")
    (folder / "TEXT").symlink_to(tiny_data)
    (folder / "ENCODER_TEXT").symlink_to(encoder_data)
    base = folder / "BASE"
    base.mkdir()
    tokenizer = HFTokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(base / "tokenizer.json"))
    (base / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content + '\\n' }}{% endfor %}")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ModelConfig(len(words), max_position_embeddings=32, eos_token_id=tokens["</s>"], **shape)
    model = Transformer(config)
    model.init_weights(3, zero_residual=False)
    (base / "config.json").write_text(json.dumps(config.to_hf()))
    save_file({name: p.detach() for name, p in model.named_parameters()}, base / "model.safetensors", {"format": "pt"})

    def text(start: int, count: int) -> str:
        return " ".join(words[1 + (start * 7 + i * 3) % 10] for i in range(count))

    prompts = [text(i, 6 + i % 3) for i in range(8)]
    answers, others = ([text(i + by, 10 + i * (3 + 2 * by) % 13) for i in range(8)] for by in (1, 2))
    chat = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(prompts, answers, strict=True)]
    examples = {
        "chat": chat,
        "pairs": [
            {"prompt": prompt, "chosen": answer, "rejected": other, "margin": len(other) / 50}
            for prompt, answer, other in zip(prompts, answers, others, strict=True)
        ],
        "labels": [row | {"label": number % 3 > 0} for number, row in enumerate(chat)],
        "prompts": [{"prompt": text(i, 17 + i % 4), "number": i} for i in range(8)],
    }
    for name, rows in examples.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def given(workshop: Path, words: str, save_dir: Path | str = "unused") -> dict:
    """The flags of a command line; names of the workshop's files stand for their paths."""
    places = {path.name: str(path) for path in workshop.iterdir()}
    every = f"{SHARED} {'' if 'TEXT' in words else FROM_BASE} {words} --save_dir {save_dir}".split()
    parser = ArgumentParser()
    add_options(parser)
    return vars(parser.parse_args([places.get(word, word) for word in every]))


def build(workshop: Path, words: str, save_dir: Path, rank: int = 0, world_size: int = 1) -> Run:
    save_dir.mkdir(exist_ok=True)
    return build_run(given(workshop, words, save_dir), Ranks(rank, world_size, CPU), None)


def move(model: torch.nn.Module, seed: int) -> None:
    """What learns, away from where it was: from zero, from the reference, from the policy that drew."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = 0.03 * torch.randn(parameter.shape, generator=generator)
            parameter.data += like(noise, parameter)


def step(
    rank: int, world_size: int, workshop: Path, words: str, save_dir: Path
) -> tuple[list[int], dict[str, float], dict[str, np.ndarray]]:
    """(weights of this rank's micro-batches, what is reported, gradients by name) of a first step, by the loop itself."""
    run = build(workshop, words, save_dir, rank, world_size)
    move(run.model, 1)
    micro_batches = next(run.stage.batches(0))
    move(run.model, 2)
    gradients = {}

    def keep(*_) -> None:
        named = unwrap(run.model).named_parameters()
        gradients.update({name: whole(p.grad).numpy().copy() for name, p in named if p.grad is not None})

    run.optimizers[0].register_step_pre_hook(keep)
    sums, norm, _ = run.optimizer_step(micro_batches, 1.0, False)
    assert not run.bad_steps
    figures = reduce_metrics(sums, run.ranks) | {"grad_norm": None if norm is None else norm.item()}
    return [batch.weight for batch in micro_batches], figures, gradients


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_the_same_however_divided(stage, workshop, tmp_path):
    """5 = 4 + 1 = 1 + 1 + 1 + 1 + 1 rows, and on two ranks 2 | 2 + 1. Loss, gradient norm and every gradient to 1e-5 of its
    norm: fp32 sums in other orders are some 1e-7 apart; what else is reported to 1e-4. Rollouts are drawn anew each time, in
    other batches, and are the same."""
    whole, wanted, expected = step(0, 1, workshop, STAGES[stage], tmp_path / "whole")
    assert wanted["loss"] != 0 and all(gradient.any() for gradient in expected.values())
    norm = math.sqrt(sum(np.square(gradient, dtype=np.float64).sum() for gradient in expected.values()))
    assert math.isclose(wanted["grad_norm"], norm, rel_tol=1e-5)
    if "--lora" in STAGES[stage]:
        assert all(".lora_" in name or name in ("score.weight", "value_head") for name in expected)
    counts = [len(whole)]
    for world_size, size in ((1, 4), (1, 1), (2, 2)):
        divided = workshop, f"{STAGES[stage]} --micro_batch_size {size}", tmp_path / f"{world_size}_{size}"
        results = [step(0, 1, *divided)] if world_size == 1 else run_ranks(step, 2, *divided)
        parts = [weight for weights, _, _ in results for weight in weights]
        assert sum(parts) == sum(whole) and (size == 1 or len(set(parts)) > 1)
        assert world_size == 1 or len({sum(weights) for weights, _, _ in results}) == 2
        counts.append(len(parts))
        for _, figures, gradients in results:
            assert gradients.keys() == expected.keys() and figures.keys() == wanted.keys()
            for name in ("loss", "grad_norm"):
                assert math.isclose(figures[name], wanted[name], rel_tol=1e-5), name
            assert figures == pytest.approx(wanted, rel=1e-4, abs=1e-5)
            for name, gradient in expected.items():
                # that of a key's bias is nothing but what rounding leaves
                least = 1e-3 * norm if name.endswith("k_proj.bias") else 0.0
                assert np.linalg.norm(gradients[name] - gradient) <= 1e-5 * max(least, np.linalg.norm(gradient)), name
    assert counts[0] < counts[1] < counts[2] and counts[3] > 2


SHARDED = {
    **STAGES,
    "experts": "--model mixtral --data_dir TEXT --hidden_size 32 --num_layers 2 --num_heads 2 --num_experts 4 --expert_size 48 "
    "--optimizer adamw --router_z_loss_coef 1e-3",
    "sft with LoRA": "--stage sft --train_data chat.jsonl --lora",
    "gpt2 with dropout": "--model gpt2 --dropout 0.2 --data_dir TEXT --hidden_size 32 --num_layers 2 --num_heads 2",
}  # fmt: skip
QUICKLY_SHARDED = ("mlm of pairs", "experts", "sft with LoRA over NF4", "kto with LoRA", "ppo")


@pytest.mark.parametrize("stage", grid(SHARDED, QUICKLY_SHARDED))
def test_a_step_is_the_same_where_ranks_hold_parts_of_the_model(stage, workshop, tmp_path):
    """--strategy fsdp on two ranks, of which one has fewer micro-batches, and on four with two copies of the model."""
    ways = ((2, "--micro_batch_size 1"), (4, "--shard_size 2 --no-reshard_after_forward"))
    compare(stage, [(size, f"--strategy fsdp {flags}") for size, flags in ways], workshop, tmp_path)


SHARING = [
    "mlm of pairs", "sft with LoRA over NF4", "sft with dropout", "reward", "dpo with LoRA", "kto", "gspo",
    "grpo with LoRA", "ppo", "experts", "gpt2 with dropout",
]  # fmt: skip


@pytest.mark.parametrize("stage", grid(SHARING, ["sft with dropout", "grpo with LoRA"]))
def test_a_step_is_the_same_where_ranks_share_rows(stage, workshop, tmp_path):
    """--context_parallel: two pairs of ranks, and each rank holds a quarter of the model."""
    compare(stage, [(4, "--context_parallel 2 --strategy fsdp --micro_batch_size 2")], workshop, tmp_path)


SPLIT = ["mlm of pairs", "sft with LoRA", "reward", "dpo with LoRA", "kto", "grpo with LoRA", "ppo"]


@pytest.mark.parametrize("stage", grid(SPLIT, ["sft with LoRA"]))
def test_a_step_is_the_same_where_ranks_share_matrices(stage, workshop, tmp_path):
    """--tensor_parallel: two pairs of ranks."""
    compare(stage, [(4, "--tensor_parallel 2 --micro_batch_size 2")], workshop, tmp_path)


def compare(stage: str, ways: list[tuple[int, str]], workshop: Path, tmp_path: Path) -> None:
    """A step of one rank with that of as many ranks, with these flags."""
    _, wanted, expected = step(0, 1, workshop, SHARDED[stage], tmp_path / "whole")
    norm = wanted["grad_norm"]
    for world_size, flags in ways:
        words = f"{SHARDED[stage]} {flags}"
        for _, figures, gradients in run_ranks(step, world_size, workshop, words, tmp_path / f"{world_size}"):
            assert gradients.keys() == expected.keys() and figures.keys() == wanted.keys()
            for name in ("loss", "grad_norm"):
                assert math.isclose(figures[name], wanted[name], rel_tol=1e-5), name
            for name, gradient in expected.items():
                least = 1e-3 * norm if name.endswith("k_proj.bias") else 0.0
                assert np.linalg.norm(gradients[name] - gradient) <= 1e-5 * max(least, np.linalg.norm(gradient)), name


AGAIN = [(stage, setting) for stage in SHARDED for setting in ("full", "selective", "0.5")]
QUICKLY_AGAIN = [
    ("pretrain", "selective"), ("sft with dropout", "full"), ("sft with LoRA over NF4", "selective"), ("experts", "full"),
    ("dpo with LoRA", "selective"), ("kto with LoRA", "full"), ("grpo with LoRA", "0.5"), ("ppo", "0.5"),
    ("ppo with LoRA", "full"), ("ppo with LoRA", "selective"), ("mlm with dropout", "full"),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "setting"), grid(AGAIN, QUICKLY_AGAIN))
def test_a_step_has_the_same_bits_whatever_is_computed_again(stage, setting, workshop, tmp_path):
    """--activation_checkpointing, in two micro-batches: figures and gradients are those of a step that keeps all."""
    words = f"{SHARDED[stage]} --micro_batch_size 4"
    expected = step(0, 1, workshop, words, tmp_path / "none")
    found = step(0, 1, workshop, f"{words} --activation_checkpointing {setting}", tmp_path / "again")
    _assert_same_bits(found, expected)


def _assert_same_bits(found, expected) -> None:
    assert found[:2] == expected[:2] and found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        assert np.array_equal(found[2][name], gradient), name


RANKS_AGAIN = [
    (stage, strategy, setting)
    for stage in ("experts", "gpt2 with dropout", "sft with LoRA over NF4", "kto with LoRA", "ppo with LoRA")
    for strategy, setting in (("ddp", "selective"), ("fsdp", "full"), ("fsdp --no-reshard_after_forward", "selective"))
    if strategy in ("ddp", "fsdp") or stage == "experts"
]


@pytest.mark.parametrize(
    ("stage", "strategy", "setting"), grid(RANKS_AGAIN, [("experts", "fsdp", "full"), ("experts", "ddp", "selective")])
)
def test_so_has_one_of_two_ranks(stage, strategy, setting, workshop, tmp_path):
    words = f"{SHARDED[stage]} --micro_batch_size 2 --strategy {strategy}"
    expected = run_ranks(step, 2, workshop, words, tmp_path / "none")
    again = run_ranks(step, 2, workshop, f"{words} --activation_checkpointing {setting}", tmp_path / "again")
    for one, other in zip(again, expected, strict=True):
        _assert_same_bits(one, other)


FULL = """
calls = 0


def loss(model, batch, stage_loss):
    global calls
    calls += 1
    if calls == 1:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
    return stage_loss(model, batch)
"""
# not rollouts; not KTO, whose KL is that of the weights with which batches are made, and `step` moves them
HALVED = [stage for stage, words in SHARDED.items() if not any(word in words for word in ("grpo", "ppo", "kto"))]


@pytest.mark.parametrize("stage", grid(HALVED, ["mlm of pairs", "sft with dropout", "reward"]))
def test_a_step_that_ran_out_of_memory_is_that_of_smaller_micro_batches(stage, workshop, tmp_path):
    """From 5 examples at once to 3 and 2: the same bits as where that size was given."""
    (tmp_path / "full.py").write_text(FULL)
    found = step(0, 1, workshop, f"{SHARDED[stage]} --loss_file {tmp_path}/full.py:loss", tmp_path / "halved")
    (tmp_path / "full.py").write_text(FULL.replace("== 1", "== 0"))
    words = f"{SHARDED[stage]} --micro_batch_size 3 --loss_file {tmp_path}/full.py:loss"
    expected = step(0, 1, workshop, words, tmp_path / "given")
    _assert_same_bits(((), *found[1:]), ((), *expected[1:]))


def judges_nothing(prompts, completions) -> list[None]:
    return [None] * len(completions)


@pytest.mark.parametrize("stage", ["grpo", "ppo"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_where_no_answer_could_be_judged_nothing_is_learned_and_every_figure_is_there(
    stage, world_size, workshop, tmp_path
):
    """No answer is a target, so the step has nothing to divide by; what is known of the answers is said all the same."""
    words = f"--stage {stage} {DRAWN}".replace("length=6 regex=one", f"{__name__}:judges_nothing")
    run = workshop, words, tmp_path
    for weights, figures, gradients in [step(0, 1, *run)] if world_size == 1 else run_ranks(step, 2, *run):
        assert not any(weights) and not gradients
        unknown = {"loss", "grad_norm", "entropy", "clip_fraction", "reward", "reward_std"}
        assert all(figures[name] is None for name in unknown)
        assert figures["unscored"] == 1 and figures["completion_length"] > 1 and 0 <= figures["finished"] <= 1


EMPTY = {
    name: STAGES[name]
    for name in ("pretrain", "mlm of pairs", "sft", "reward", "dpo", "kto", "grpo", "ppo", "grpo with LoRA")
}


def empty_step(rank: int, world_size: int, workshop: Path, words: str, save_dir: Path) -> list[tuple[bytes, bytes]]:
    """(weights and optimizer state before, and after) a step of which nothing is learned, behind one that learned."""
    run = build(workshop, words, save_dir, rank, world_size)
    micro_batches = next(run.stage.batches(0))
    run.optimizer_step(micro_batches, 1.0, False)
    nothing = [replace(batch, targets=torch.full_like(batch.targets, -100), weight=0) for batch in micro_batches]

    def state() -> bytes:
        parts = [p.detach().numpy().tobytes() for p in unwrap(run.model).parameters() if p.requires_grad]
        for optimizer in run.optimizers:
            for values in optimizer.state_dict()["state"].values():
                parts += [value.numpy().tobytes() for value in values.values() if isinstance(value, torch.Tensor)]
        return b"".join(parts) + str(run.scaler.state()).encode()

    before = state()
    _, norm, _ = run.optimizer_step(nothing, 1.0, False)
    assert norm is None and run.empty_steps == 1 and run.step == 2
    after = state()
    run.optimizer_step(micro_batches, 1.0, False)
    assert state() != after
    return [before == after]


@pytest.mark.parametrize("stage", EMPTY)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_learned_nothing_leaves_weights_and_optimizer_as_they_are(stage, optimizer, workshop, tmp_path):
    """Bit for bit: Muon's decayed momentum, normalised again, would move a matrix by as much as a step that learns."""
    words = EMPTY[stage].replace("--optimizer adamw ", "") + f" --optimizer {optimizer} --weight_decay 0.1"
    assert empty_step(0, 1, workshop, words, tmp_path / "one") == [True]


@pytest.mark.parametrize("precision", ["none", "fp16"])
def test_so_does_one_on_two_ranks_and_with_a_loss_scaler(precision, workshop, tmp_path):
    words = f"{STAGES['sft']} --optimizer muon".replace("--neftune_alpha 5", "") + f" --mixed_precision {precision}"
    assert run_ranks(empty_step, 2, workshop, words, tmp_path / "two") == [[True], [True]]


def test_what_is_too_long_is_cut_or_left_out_and_counted(workshop):
    """A word is a token here: a chat loses its end, or goes where nothing to learn is left; a pair or a prompt goes where its
    prompt leaves no room."""

    def read(words: str) -> tuple[list[str], list]:
        config, _ = resolve_config(given(workshop, words))
        data = open_stage_data(config, Path(config.init_from), 32)
        return data.report, data.train if config.stage == "grpo" else data.train.groups

    rows = [json.loads(line) for line in (workshop / "chat.jsonl").read_text().splitlines()]
    prompts = np.array([len(row["prompt"].split()) for row in rows])
    chats = prompts + np.array([len(row["completion"].split()) for row in rows]) + 1  # the end of the text
    sft, pairs = "--stage sft --train_data chat.jsonl --max_length", f"--stage reward {PAIRS} --max_length"
    for words, cut, gone in (
        (f"{sft} 24", (chats > 24).sum(), 0),
        (f"{sft} 7", (prompts == 6).sum(), (prompts > 6).sum()),
        (f"{pairs} 7", (prompts == 6).sum(), (prompts > 6).sum()),
        (f"{GRPO} --max_new_tokens 14", 0, 4),  # prompts of 17, 18, 19 and 20 words, twice, in rows of 32
    ):
        report, examples = read(words)
        length = 7 if words.endswith(" 7") else 24
        assert (f"{cut} examples cut off at --max_length {length}" in report) == bool(cut)
        left_out = [line for line in report if "examples left out" in line]
        assert len(left_out) == bool(gone) and all(line.startswith(f"{gone} examples left out: ") for line in left_out)
        assert len(examples) == 8 - gone and cut + gone > 0


# --------------------------------------------------------------------------------------------------------------- options


def test_examples_are_read_as_asked(workshop, tmp_path):
    """Columns by other names, another template, everything learned; and what is held out, the same each time."""

    def read(more: str, **changes) -> tuple[list, list]:
        flags = given(workshop, f"--stage sft --train_data chat.jsonl {more}") | changes
        if "eval_data" in flags:
            del flags["eval_fraction"]
        data = open_stage_data(resolve_config(flags)[0], workshop / "BASE", 32)
        parts = (data.train.groups, [] if data.held_out is None else data.held_out.groups)
        return [[(group[0].tokens.tolist(), group[0].learned.tolist()) for group in groups] for groups in parts]

    plain, none = read("")
    assert len(plain) == 8 and not none and not any(all(learned) for _, learned in plain)
    renamed, template, few = tmp_path / "renamed.jsonl", tmp_path / "own.jinja", tmp_path / "few.jsonl"
    rows = (workshop / "chat.jsonl").read_text()
    renamed.write_text(rows.replace('"prompt"', '"q"').replace('"completion"', '"a"'))
    few.write_text("\n".join(rows.splitlines()[:3]))
    template.write_text("{% for m in messages %}{{ 'ten ' + m.content + ' ' }}{% endfor %}")
    assert read("--rename_columns q=prompt a=completion", train_data=[str(renamed)])[0] == plain
    everything, _ = read("--train_on all")
    assert [tokens for tokens, _ in everything] == [tokens for tokens, _ in plain]
    assert all(all(learned) for _, learned in everything)
    other, _ = read(f"--chat_template {template}")
    ten = VOCABULARY.split().index("ten")
    assert [tokens[:7] for tokens, _ in other] == [[ten, *tokens[:6]] for tokens, _ in plain]
    learned_from, held_out = read("--eval_fraction 0.25")
    assert len(held_out) == 2 and sorted(learned_from + held_out) == sorted(plain)
    assert (learned_from, held_out) == tuple(read("--eval_fraction 0.25 --seed 5"))
    assert read(f"--eval_data {few}") == [plain, plain[:3]]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--stage sft --train_data chat.jsonl --neftune_alpha 7", {"neftune_alpha": 7.0}),
        (f"--stage reward {PAIRS} --center_rewards 0.3", {"centring": 0.3}),
        (f"--stage dpo {PAIRS} --dpo_beta 0.3 --label_smoothing 0.2",
         {"loss_name": "sigmoid", "beta": 0.3, "label_smoothing": 0.2}),
        (f"--stage dpo {PAIRS} --dpo_loss simpo --simpo_gamma 1.5", {"loss_name": "simpo", "gamma": 1.5}),
        ("--stage dpo --train_data labels.jsonl --dpo_loss kto --dpo_beta 0.4 --lora --kto_desirable_weight 1.5 "
         "--kto_undesirable_weight 0.5", {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.5}),
        (f"{GRPO} --grpo_loss dr_grpo --clip_low 0.11 --clip_high 0.22 --mask_truncated --reward_timeout 3 --eval_samples 7",
         {"loss_type": "dr_grpo", "clip_low": 0.11, "clip_high": 0.22, "mask_truncated": True, "reward_timeout": 3.0,
          "eval_samples": 7, "kl_coefficient": 0.1, "group_size": 3, "advantage_scale": "none"}),
        (f"{PPO} --clip_high 0.3 --kl_coefficient 0.7 --kl_target 2 --lora",
         {"clip": 0.3, "kl_coefficient": 0.7, "kl_target": 2.0, "missing_eos_penalty": 0.5, "reference": None}),
        (f"{PPO} --discount 0.9 --gae_lambda 0.8 --value_coefficient 0.5 --value_clip 0.4 --whiten_rewards",
         {"discount": 0.9, "trace": 0.8, "value_coefficient": 0.5, "value_clip": 0.4, "whiten_rewards": True}),
    ],
)  # fmt: skip
def test_options_reach_their_stage(words, wanted, workshop, tmp_path):
    stage = build(workshop, words, tmp_path).stage
    assert {name: getattr(stage, name) for name in wanted} == wanted


def test_answers_are_drawn_as_asked_and_end_where_the_tokenizer_says(workshop, tmp_path):
    more = "--temperature 0.7 --rollout_batch_size 3 --num_minibatches 2 --reward_weights 2 0.5 --seed 4"
    stage = build(workshop, f"{PPO} {more}", tmp_path).stage
    sampling, schedule, words = stage.sampling, stage.schedule, VOCABULARY.split()
    assert (sampling.temperature, sampling.max_new_tokens, sampling.batch_size) == (0.7, 12, 3)
    assert sampling.stop_ids == (words.index("</s>"),) and sampling.vocab_size == len(words)
    assert (schedule.batch_size, schedule.minibatches, schedule.epochs, schedule.seed) == (5, 2, 2, 4)
    assert [(reward.name, reward.weight) for reward in stage.rewards] == [("length", 2.0), ("regex", 0.5)]


def test_adapters_are_made_as_asked_and_what_learns_is_fp32_and_what_is_frozen_is_not(workshop, tmp_path):
    """Over frozen weights in the dtype that the run computes in, or in NF4; where all weights learn, they are fp32 too."""
    chat = "--stage sft --train_data chat.jsonl --mixed_precision bf16"
    lora = "--lora --lora_r 3 --lora_alpha 5 --lora_dropout 0.25 --rslora --dora --lora_target_modules q_proj v_proj"
    settings = {"default": AdapterSettings(3, 5.0, 0.25, rslora=True, dora=True, targets=("q_proj", "v_proj"))}
    for number, (more, made) in enumerate((("", {}), (lora, settings), (f"{lora} --load_in_4bit", settings))):
        model = build(workshop, f"{chat} {more}", tmp_path / str(number)).model
        assert adapter_settings(model) == made and is_quantised(model) == ("4bit" in more)
        dtypes = {(p.requires_grad, p.dtype) for p in model.parameters()}
        assert dtypes == {(True, torch.float32)} | ({(False, torch.bfloat16)} if more else set())


def test_defaults_are_the_papers(workshop, tmp_path):
    """PPO: Huang et al. 2024 (four epochs, γ 1, λ 0.95, ½ · 0.1 of the value loss, clips of 0.2, β 0.05, Adam's ε 1e-5). GRPO:
    one step a round, and no KL, so no second model in memory. DPO: β 0.1. Adapters on every linear layer, ten times the rate."""
    stages = {}
    for name, words in (("ppo", PPO), ("grpo", GRPO), ("dpo", STAGES["dpo with LoRA"])):
        plain = words.replace("--rollout_epochs 2 ", "").replace("--kl_coefficient 0.1", "")
        run = build(workshop, plain, tmp_path / name)
        stages[name] = run.stage
        assert {group["eps"] for group in run.optimizers[0].param_groups} == {1e-5 if name == "ppo" else 1e-8}
    ppo, grpo = stages["ppo"], stages["grpo"]
    assert (ppo.schedule.epochs, ppo.discount, ppo.trace, ppo.value_coefficient) == (4, 1.0, 0.95, 0.1)
    assert (ppo.clip, ppo.value_clip, ppo.kl_coefficient, ppo.kl_target) == (0.2, 0.2, 0.05, None)
    assert (grpo.schedule.steps_per_phase, grpo.kl_coefficient, grpo.reference) == (1, 0.0, None)
    assert stages["dpo"].beta == 0.1
    for stage in ("sft", "reward", "dpo", "grpo", "ppo"):
        full, adapted = (resolve_config(given(workshop, f"{STAGES[stage]} {more}"))[0] for more in ("", "--lora"))
        assert adapted.learning_rate == pytest.approx(10 * full.learning_rate) and full.weight_decay == 0
        assert adapted.lora_target_modules == ["all-linear"]


def test_ppos_critic_starts_as_the_reward_model(workshop, tmp_path):
    """Huang et al. 2024: what knows what answers are worth; without one it starts at 0."""
    judge = RewardModel.from_pretrained(workshop / "BASE", seed=7)
    folder = tmp_path / "judge"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((workshop / "BASE" / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(judge.config.to_hf()))
    save_file(judge.state_dict(), folder / "model.safetensors", {"format": "pt"})
    ids, places = torch.arange(1, 9)[None], torch.arange(8)[None]
    for words, wanted in ((f"{PPO} --reward_model {folder}", judge(ids)), (PPO, torch.zeros(1, 8))):
        run = build(workshop, words, tmp_path / "run")
        hidden, values = run.model(ids, places, None)
        torch.testing.assert_close(values, wanted, atol=1e-6, rtol=0)
        torch.testing.assert_close(hidden, run.stage.reference(ids), atol=1e-6, rtol=0)
