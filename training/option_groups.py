"""Which options does a run have? All of them, by group: default, values, help, which runs read it, what must hold between them.

A group is one dataclass, whose docstring is what `--help` says of it, with an example command. To add an option, write
its line here: the flag, the key of `--config` files, the check, the help and docs/options.md follow from it.
None means: worked out from the other options, the data or the machine, as the help says.
"""

import math
from dataclasses import dataclass

from errors import UserError
from families.new_models import ENCODERS, MIXTURES, NEW_MODELS
from families.task_names import TASKS
from kernels.attention_backends import ATTENTION_BACKENDS
from kernels.choice import OPERATIONS
from kernels.recompute import NAMES, share_kept
from training.log_to import LOGGERS
from training.optimizers import OPTIMIZERS, load_builder
from training.option import (
    A_SHARE,
    ABOVE_ZERO_TO_ONE,
    BELOW_HALF,
    BELOW_ONE,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_OR_AUTO,
    WITHIN,
    Runs,
    Size,
    Spec,
    option,
    runs_of,
    specs_of,
)
from training.schedule import END_AT_MINIMUM, SCHEDULES, learning_rate_factor

STAGES = ("pretrain", "mlm", "sft", "reward", "dpo", "grpo", "ppo", *TASKS)
LAUNCHER = "accelerate"  # the strategy that its config asks for
STRATEGIES = ("ddp", "fsdp", "deepspeed", LAUNCHER)
PRECISIONS = ("auto", "bf16", "fp16", "fp8", "none")
PRESETS: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "num_layers": 6, "num_heads": 8},
    "small": {"hidden_size": 768, "num_layers": 12, "num_heads": 12},
    "medium": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16},
    "large": {"hidden_size": 1536, "num_layers": 24, "num_heads": 16},
    "xl": {"hidden_size": 2048, "num_layers": 32, "num_heads": 32},
}
_PRESET_SIZES = ", ".join(f"{name} {size['hidden_size']}x{size['num_layers']}" for name, size in PRESETS.items())

PRETRAIN, MLM, SFT, REWARD, DPO, GRPO, PPO, CLASSIFY, TAG, ANSWER = (runs_of(stage) for stage in STAGES)
TEXT_STAGES = ("pretrain", "mlm")
TEXT = runs_of(*TEXT_STAGES)
RENAMED = Runs("fine-tuning and --train_file", lambda c: c.stage not in TEXT_STAGES or bool(c.train_file))
TEXT_FILES = Runs("--train_file", lambda c: bool(c.train_file))
WINDOWS = (
    TEXT,
    Runs("rows that are windows of the text, as those of --next_sentence are not", lambda c: not c.next_sentence),
)
ROLLOUTS = runs_of("grpo", "ppo")
FINE_TUNING = Runs("fine-tuning", lambda c: c.stage not in TEXT_STAGES)
CHATS = Runs("stages that learn from chats", lambda c: c.stage not in (*TEXT_STAGES, *TASKS))
PART_EVALUATED = Runs(
    "stages that evaluate on given text, and neither on answers of their own (--eval_samples) nor on all that is held out",
    lambda c: c.stage not in ("grpo", "ppo", *TASKS),
)
ADAPTERS = Runs("--lora", lambda c: c.lora)
SHARDED = Runs("--strategy fsdp", lambda c: c.strategy == "fsdp")
NEW = Runs("models trained from nothing (--init_from has a shape of its own)", lambda c: c.init_from is None)


def new_with(words: str, *models: str) -> tuple[Runs, Runs]:
    """The runs that train a model of other families than these from nothing."""
    return NEW, Runs(
        f"models with {words}, which --model {' and '.join(models)} have not", lambda c: c.model not in models
    )


MAY_HAVE_EXPERTS = Runs("mixtures of experts", lambda c: c.init_from is not None or c.model in MIXTURES)
OF_EXPERTS = Runs(f"--model {' and '.join(MIXTURES)}", lambda c: c.model in MIXTURES)


# an optimizer of a user's own file is told of every setting
BETAS = Runs(
    "optimizers that have betas, as sgd and adafactor have not",
    lambda c: bool(c.optimizer_file) or c.optimizer not in ("sgd", "adafactor"),
)
MOMENTUM = Runs("--optimizer sgd and muon", lambda c: bool(c.optimizer_file) or c.optimizer in ("sgd", "muon"))


def dpo_runs(loss: str) -> Runs:
    """The runs of --stage dpo with this loss."""
    return Runs(f"--stage dpo --dpo_loss {loss}", lambda c: (c.stage, c.dpo_loss) == ("dpo", loss))


# fmt: off
@dataclass
class StageOptions:
    """What is learned, and from which model it starts.

    python train.py --stage sft --init_from checkpoints/mine --train_data answers.jsonl
    """

    stage: str = option("what is learned: pretrain (the next token of text), mlm (hidden tokens of text, by an encoder), sft (answers), reward (a score from pairs), dpo (preferences: --dpo_loss), grpo or ppo (what a reward function asks of the model's own answers), classify (labels of texts), tag (a tag for each word), answer (where in a text the answer to a question is)", "pretrain", choices=STAGES)
    loss_file: str | None = option("FILE:FUNCTION, a loss of your own in place of the stage's (docs/extending.md)", None)
    init_from: str | None = option("model to start from: a Hugging Face folder, or a run or checkpoint of groundup; its tokenizer and shape are taken", None, aliases=("load_model",))


@dataclass
class DataOptions:
    """Text that data_prep_tool.py has prepared, or files of raw text.

    python train.py --data_dir data/mine data/code --data_weights 0.8 0.2 --max_length 1024
    """

    data_dir: list[str] = option("folder(s) written by data_prep_tool.py; several are mixed by --data_weights, and validation reads the first. Fine-tuning takes one, of --format sft or preference, in place of --train_data", [])
    train_file: list[str] = option("files of raw text, or folders of them, in place of --data_dir: prepared into --save_dir/data before the first step, once, as data_prep_tool.py would", [], read_by=TEXT)
    val_file: list[str] = option("files of raw text to evaluate on (default: held out of --train_file, as data_prep_tool.py does)", [], read_by=TEXT_FILES)
    tokenizer: str | None = option("of --train_file: gpt2, llama (Llama 3's), bert (uncased), or a folder with a tokenizer.json (default: a byte-level BPE trained on it, with --vocab_size ids or as many as suit its length)", None, read_by=(TEXT_FILES, NEW))
    data_weights: list[float] = option("share of the samples drawn from each --data_dir (default: by their number of tokens)", [], bound=NOT_NEGATIVE, read_by=TEXT)
    data_stages: list[str] = option("STEP:WEIGHTS, other shares from a step on, such as 8000:0.5,0.5 9500:0,1; in the order of --data_dir. A run that goes on may be given further ones, and further folders", [], read_by=TEXT)
    max_length: int | None = option("tokens in a row (default: what the data was prepared with)", None, bound=POSITIVE)
    stride: int | None = option("overlap of neighbouring rows in tokens (default: what the data was prepared with; 0 when --max_length is given)", None, bound=NOT_NEGATIVE, read_by=WINDOWS)
    document_mask: bool = option("documents packed into one row do not see each other", True, read_by=WINDOWS)

    def check_data(self) -> None:
        """UserError for weights that are not one for each folder, or steps that are not in order."""
        if self.data_weights and len(self.data_weights) != len(self.data_dir):
            raise UserError(
                f"--data_weights has {len(self.data_weights)} values for {len(self.data_dir)} folders in --data_dir; "
                "give one for each, or none"
            )
        if self.data_weights and not any(self.data_weights):
            raise UserError("--data_weights are all 0: nothing would be drawn")
        stages = self.data_stages_by_step
        for (step, weights), text in zip(stages, self.data_stages, strict=True):
            if len(weights) != len(self.data_dir):
                raise UserError(
                    f"--data_stages {text} has {len(weights)} weights for {len(self.data_dir)} folders in --data_dir"
                )
            if step < 1 or min(weights) < 0 or not 0 < sum(weights) < math.inf:
                raise UserError(f"--data_stages {text}: the step is 1 or more, weights are not negative and not all 0")
        for number, folder in enumerate(self.data_dir if self.data_weights else ()):
            if not self.data_weights[number] and not any(weights[number] for _, weights in stages):
                raise UserError(f"--data_dir {folder} has the weight 0 throughout: leave it out, or draw from it in --data_stages")
        steps = [step for step, _ in stages]
        if steps != sorted(set(steps)):
            raise UserError(f"--data_stages {' '.join(self.data_stages)}: give steps in ascending order, each once")

    @property
    def data_stages_by_step(self) -> list[tuple[int, list[float]]]:
        """As `parse_data_stages` gives them."""
        return parse_data_stages(self.data_stages)


def parse_data_stages(texts: list[str]) -> list[tuple[int, list[float]]]:
    """(first step, weights) of each of --data_stages. UserError for what is not written so."""
    try:
        parts = [text.partition(":") for text in texts]
        return [(int(step), [float(weight) for weight in weights.split(",")]) for step, _, weights in parts]
    except ValueError:
        raise UserError(f"--data_stages {' '.join(texts)}: write STEP:WEIGHTS, such as 8000:0.5,0.5") from None


@dataclass
class MaskingOptions:
    """Masked language modelling: --stage mlm, of an encoder.

    python train.py --data_dir data/encoder --stage mlm --model bert --next_sentence --max_steps 20000
    """

    mask_probability: float | None = option("share of the tokens that are to be told: of ten 8 become the mask, 1 another token, and 1 stays (default: 0.15; 0.3 for ModernBERT)", None, bound=WITHIN, read_by=MLM)
    whole_words: bool = option("choose words, and not their pieces, to be told", False, read_by=MLM)
    next_sentence: bool = option("rows are pairs of texts, and whether the second follows the first is told, too (BERT)", False, read_by=(MLM, Runs("BERT, the family with a next-sentence head", lambda c: c.model == "bert" or c.init_from is not None)))


@dataclass
class ExamplesOptions:
    """Examples to learn from in fine-tuning: every stage but pretrain and mlm.

    python train.py --stage sft --init_from checkpoints/mine --train_data answers.csv --rename_columns question=prompt answer=completion
    """

    train_data: list[str] = option("files of examples for fine-tuning: .json, .jsonl, .csv, .tsv, .parquet, also .gz, and CoNLL files for tag; what their columns mean is detected and printed", [])
    eval_data: list[str] = option("files of held-out examples (default: --eval_fraction of --train_data)", [], read_by=FINE_TUNING)
    eval_fraction: float = option("share of --train_data held out where there is no --eval_data; 0 holds none out", 0.02, bound=BELOW_ONE, read_by=(FINE_TUNING, Runs("runs without --eval_data", lambda c: not c.eval_data)))
    rename_columns: list[str] = option("column=meaning, for columns of other names: question=prompt answer=completion; of --train_file COLUMN=text", [], read_by=RENAMED)
    train_on: str = option("tokens that are learned in sft: assistant (every answer), last (the last answer) or all", "assistant", choices=("assistant", "last", "all"), read_by=SFT)
    chat_template: str | None = option("chatml, llama3 or a Jinja file (default: the model's own, else chatml)", None, read_by=CHATS)
    add_chat_tokens: bool = option("sft: give the tokenizer the special tokens that the chat template writes and it lacks, and the model rows for them, which learn, with --lora too", False, read_by=SFT)
    neftune_alpha: float = option("sft: noise on the embeddings of alpha / sqrt(length * width); 5 is usual, 0 is none", 0.0, bound=NOT_NEGATIVE, read_by=SFT)

    def check_examples(self) -> None:
        """UserError for a renaming that does not name both."""
        for pair in self.rename_columns:
            if not all(pair.partition("=")):
                raise UserError(f"--rename_columns {pair}: write column=meaning, such as question=prompt")


@dataclass
class AdaptersOptions:
    """Low-rank adapters (LoRA, DoRA), over 4-bit weights too (QLoRA).

    python train.py --stage sft --init_from checkpoints/mine --train_data answers.jsonl --lora --lora_r 32 --load_in_4bit
    """

    lora: bool = option("freeze the model and train low-rank adapters beside its linear layers", False)
    lora_r: int = option("rank", 16, bound=POSITIVE, read_by=ADAPTERS)
    lora_alpha: float = option("what B A is multiplied with, over the rank", 32.0, bound=POSITIVE, read_by=ADAPTERS)
    lora_dropout: float = option("dropout of the adapters' input", 0.0, bound=BELOW_ONE, read_by=ADAPTERS)
    lora_target_modules: list[str] = option("layers that get one: names such as q_proj v_proj, or all-linear", ["all-linear"], read_by=ADAPTERS)
    rslora: bool = option("divide --lora_alpha by the rank's square root instead", False)
    dora: bool = option("learn each output's magnitude apart from its direction", False)
    load_in_4bit: bool = option("keep the frozen linear layers in NF4 (QLoRA)", False)

    def check_adapters(self) -> None:
        """UserError for a way of training adapters without adapters."""
        if (self.load_in_4bit or self.dora or self.rslora) and not self.lora:
            raise UserError("--load_in_4bit, --dora and --rslora are ways of training adapters: add --lora")


@dataclass
class TaskOptions:
    """Labels of texts, tags of words, answers in texts: --stage classify, tag and answer.

    python train.py --stage classify --init_from bert --train_data reviews.csv --class_weights balanced
    """

    label_kind: str = option("classify: single (one of several labels), multi (any of them), regression (figures), or auto, which looks at the labels", "auto", choices=("auto", "single", "multi", "regression"), read_by=CLASSIFY)
    class_weights: str = option("classify with single labels, and tag: none, or balanced, which weighs a label by how rare it is; the mean weight over the training data is 1", "none", choices=("none", "balanced"), read_by=runs_of("classify", "tag"))
    doc_stride: int = option("answer: tokens that neighbouring windows of a long text share", 128, bound=NOT_NEGATIVE, read_by=ANSWER)


@dataclass
class PreferenceOptions:
    """Learning from pairs and labelled answers: --stage dpo and reward.

    python train.py --stage dpo --init_from checkpoints/answers --train_data pairs.jsonl --dpo_loss ipo --dpo_beta 0.2
    """

    dpo_loss: str = option("sigmoid, ipo, hinge, simpo, orpo or kto", "sigmoid", choices=("sigmoid", "ipo", "hinge", "simpo", "orpo", "kto"), read_by=DPO)
    dpo_beta: float = option("how much a log-probability ratio counts against the reference; orpo: the weight of its odds ratio", 0.1, bound=POSITIVE, read_by=DPO)
    label_smoothing: float = option("sigmoid: probability that a pair is the wrong way round (conservative DPO)", 0.0, bound=BELOW_HALF, read_by=dpo_runs("sigmoid"))
    simpo_gamma: float = option("simpo: the margin that chosen must win by", 0.5, bound=NOT_NEGATIVE, read_by=dpo_runs("simpo"))
    kto_desirable_weight: float = option("kto: of the loss of desirable answers; where one kind is rarer, weigh it more", 1.0, bound=POSITIVE, read_by=dpo_runs("kto"))
    kto_undesirable_weight: float = option("kto: of the loss of the others", 1.0, bound=POSITIVE, read_by=dpo_runs("kto"))
    reference_cache: str | None = option("folder that keeps the reference's log-probabilities for the next run on the same examples, or none (default: beside the data)", None, read_by=Runs("--stage dpo on all weights with a loss that has a reference", lambda c: c.stage == "dpo" and not c.lora and c.dpo_loss not in ("simpo", "orpo")))
    center_rewards: float = option("reward: weight of (chosen + rejected)^2, which keeps scores around zero", 0.01, bound=NOT_NEGATIVE, read_by=REWARD)


@dataclass
class ReinforcementOptions:
    """Learning from rewards of the model's own answers: --stage grpo and ppo.

    python train.py --stage grpo --init_from checkpoints/answers --train_data questions.jsonl --reward_function numeric_answer --group_size 8
    """

    reward_function: list[str] = option("what answers are worth: exact_answer, numeric_answer, format=REGEX, regex=REGEX, length=TOKENS, or package.module:function of your own; several are added", [], read_by=ROLLOUTS)
    reward_weights: list[float] = option("of each --reward_function, then of --reward_model (default: 1 each)", [], read_by=ROLLOUTS)
    reward_model: str | None = option("folder of a model trained with --stage reward that judges answers", None, read_by=ROLLOUTS)
    reward_timeout: float = option("seconds that one call of a reward function may take", 60.0, bound=POSITIVE, read_by=ROLLOUTS)
    max_new_tokens: int = option("longest answer", 256, bound=POSITIVE, read_by=ROLLOUTS)
    temperature: float = option("of drawing answers; nothing else is cut from the distribution", 1.0, bound=POSITIVE, read_by=ROLLOUTS)
    rollout_batch_size: int = option("answers drawn at a time on a rank", 64, bound=POSITIVE, read_by=ROLLOUTS)
    num_minibatches: int = option("optimizer steps that share one round of answers, each on --batch_size prompts", 1, bound=POSITIVE, read_by=ROLLOUTS)
    rollout_epochs: int | None = option("passes over each round of answers (default: 4 for ppo, 1 for grpo)", None, bound=POSITIVE, read_by=ROLLOUTS)
    group_size: int = option("grpo: answers to each prompt", 8, read_by=GRPO)
    grpo_loss: str = option("grpo, dr_grpo, dapo, gspo or cispo", "grpo", choices=("grpo", "dr_grpo", "dapo", "gspo", "cispo"), read_by=GRPO)
    clip_low: float | None = option("how far the probability ratio may go below 1 (default: each loss's own)", None, bound=POSITIVE, read_by=Runs("--stage grpo with another loss than cispo", lambda c: c.stage == "grpo" and c.grpo_loss != "cispo"))
    clip_high: float | None = option("how far it may go above 1 (default: each loss's own; ppo clips at 0.2 both ways)", None, bound=POSITIVE, read_by=ROLLOUTS)
    mask_truncated: bool = option("grpo: nothing is learned from answers that did not end", False, read_by=GRPO)
    kl_coefficient: float | None = option("weight of the KL to the reference (default: 0.05 for ppo, 0 for grpo)", None, bound=NOT_NEGATIVE, read_by=ROLLOUTS)
    kl_target: float | None = option("ppo: adapt the weight to this KL an answer, in nats", None, bound=POSITIVE, read_by=PPO)
    discount: float = option("ppo: what a reward one token later is worth (gamma)", 1.0, bound=A_SHARE, read_by=PPO)
    gae_lambda: float = option("ppo: trace decay of generalised advantage estimation", 0.95, bound=A_SHARE, read_by=PPO)
    value_coefficient: float = option("ppo: weight of the critic's loss", 0.1, bound=NOT_NEGATIVE, read_by=PPO)
    value_clip: float = option("ppo: how far a value may move from the one at the rollout before its loss stops falling", 0.2, bound=POSITIVE, read_by=PPO)
    whiten_rewards: bool = option("ppo: divide the rewards of a round by their standard deviation", False, read_by=PPO)
    missing_eos_penalty: float = option("ppo: taken from the score of an answer that did not end", 0.0, bound=NOT_NEGATIVE, read_by=PPO)
    eval_samples: int = option("held-out prompts answered at each evaluation; 0 takes all", 64, bound=NOT_NEGATIVE, read_by=ROLLOUTS)

    def check_rewards(self, stage: str) -> None:
        """UserError for answers that nothing judges, or for weights that are not one for each judge."""
        judges = len(self.reward_function) + (self.reward_model is not None)
        if not judges:
            raise UserError(f"--stage {stage} needs --reward_function or --reward_model: what an answer is worth")
        if self.reward_weights and len(self.reward_weights) != judges:
            raise UserError(f"--reward_weights has {len(self.reward_weights)} values for {judges} rewards")


@dataclass
class ModelOptions:
    """The shape of a model that is trained from nothing.

    python train.py --data_dir data/mine --preset small --num_kv_heads 4 --qk_norm
    """

    model: str | None = option("family of the new model, with the parts and constants of its published ones (default: llama, or qwen3 with --qk_norm)", None, choices=tuple(NEW_MODELS), read_by=NEW)
    preset: str | None = option("sets --hidden_size, --num_layers and --num_heads: " + _PRESET_SIZES, None, choices=tuple(PRESETS), read_by=NEW)
    vocab_size: int | None = option("must be the tokenizer's, which it defaults to, or is what --train_file's is trained with; the weights are padded to a multiple of 128", None, read_by=TEXT)
    hidden_size: int = option("width of the residual stream", 768, bound=POSITIVE, read_by=NEW)
    num_layers: int = option("transformer blocks", 12, bound=POSITIVE, read_by=NEW)
    num_heads: int = option("attention heads; must divide --hidden_size (default: those of the preset of that size, else heads of 64, or of 128 where 64 does not divide)", 12, bound=POSITIVE, read_by=NEW)
    num_kv_heads: int | None = option("key/value heads, shared by groups of heads; must divide --num_heads (default: --num_heads)", None, bound=POSITIVE, read_by=new_with("grouped queries", "gpt2", *ENCODERS))
    intermediate_size: int | None = option("width of the MLP (default: 8/3 of --hidden_size, rounded up to a multiple of 64; 4 times it for gpt2 and bert, whose MLPs have no gate)", None, bound=POSITIVE, read_by=NEW)
    rope_theta: float | None = option("base of the rotary embedding; 500000 is usual for rows of 4096 tokens and more (default: 10000, or what --model has)", None, bound=POSITIVE, read_by=new_with("a rotary embedding", "gpt2", "bert"))
    qk_norm: bool = option("RMSNorm on each query and key head; the checkpoint is then a Qwen3 instead of a Llama", False, read_by=(NEW, Runs("models without --model, or with --model qwen3", lambda c: c.model in (None, "qwen3"))))
    tie_word_embeddings: bool | None = option("one matrix for embedding and head; saves memory below some 350M parameters (default: as --model has it; llama, mistral, qwen3 and olmo2 have two)", None, read_by=new_with("a choice", "gemma3", *ENCODERS))

    num_experts: int = option("experts of each block's MLP", 8, bound=POSITIVE, read_by=(NEW, OF_EXPERTS))
    experts_per_token: int = option("how many of them work on a token", 2, bound=POSITIVE, read_by=(NEW, OF_EXPERTS))
    expert_size: int | None = option("width of an expert (default: that of a dense MLP for mixtral; for qwen3_moe that over --experts_per_token, rounded up to a multiple of 64)", None, bound=POSITIVE, read_by=(NEW, OF_EXPERTS))

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def width_of_experts(self) -> int:
        """That of a dense MLP, or what makes as many multiplications a token with several experts."""
        dense = self.mlp_size if self.model == "mixtral" else -(-self.mlp_size // self.experts_per_token // 64) * 64
        return self.expert_size or dense

    @property
    def mlp_size(self) -> int:
        """4x the width for two matrices; Llama's 8/3 of it, so that three cost the same; a multiple of 64 for the GEMMs."""
        if self.model in ("gpt2", "bert"):
            return self.intermediate_size or 4 * self.hidden_size
        return self.intermediate_size or -(-8 * self.hidden_size // 3 // 64) * 64

    def check_model(self) -> None:
        """UserError for heads that do not divide the width, or that rotary embedding cannot pair; for too few experts, or two widths of theirs."""
        if self.model in MIXTURES and self.experts_per_token > self.num_experts:
            raise UserError(
                f"--experts_per_token {self.experts_per_token} is more than --num_experts {self.num_experts}; lower it"
            )
        if self.model in MIXTURES and self.expert_size and self.intermediate_size:
            raise UserError(
                f"--expert_size {self.expert_size} and --intermediate_size {self.intermediate_size} both say how wide the "
                "experts are: leave one out"
            )
        if self.hidden_size % self.num_heads:
            raise UserError(
                f"--num_heads {self.num_heads} does not divide --hidden_size {self.hidden_size}; "
                f"{_divisors_near(self.hidden_size, self.num_heads)} would"
            )
        if (self.hidden_size // self.num_heads) % 2 and self.model not in ("gpt2", "bert"):
            raise UserError(
                f"--hidden_size {self.hidden_size} / --num_heads {self.num_heads} gives heads of odd width "
                f"{self.hidden_size // self.num_heads}, which rotary embedding cannot pair; choose another --num_heads"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(
                f"--num_kv_heads {self.kv_heads} does not divide --num_heads {self.num_heads}; "
                f"{_divisors_near(self.num_heads, self.kv_heads)} would"
            )


@dataclass
class OptimizationOptions:
    """Batches, steps, the learning rate and the optimizer.

    python train.py --data_dir data/mine --batch_size 64 --micro_batch_size 8 --max_steps 20000 --learning_rate 1e-3
    """

    batch_size: int = option("sequences a step, over all ranks and micro-batches", 32, bound=POSITIVE)
    micro_batch_size: Size | None = option("sequences a forward pass on one rank; the rest is accumulated. auto: as many as fit into memory (docs/memory.md) (default: a rank's whole share of the batch)", None, bound=POSITIVE_OR_AUTO)
    max_steps: int = option("optimizer steps of the run (fine-tuning, and any run with --num_epochs: from that where it is not given)", 100_000, bound=POSITIVE)
    num_epochs: float | None = option("passes over the examples, or over the rows of the text, in place of --max_steps (default: 3 for sft, classify, tag and answer, 1 for other fine-tuning, none on text)", None, bound=POSITIVE, aliases=("epochs",))
    learning_rate: float = option("peak learning rate; one value serves AdamW and Muon. Fine-tuning: 2e-5 (sft, classify, tag, answer), 1e-5 (reward), 1e-6 (dpo, grpo, ppo), ten times that with --lora", 3e-4, bound=POSITIVE)
    warmup_steps: float | None = option("steps of linear warm-up, or below 1 a share of --max_steps (default: 2000, or a tenth of --max_steps where that is less; one_cycle: 0.3)", None, bound=NOT_NEGATIVE)
    schedule: str = option("after the warm-up: cosine, linear, polynomial (--decay_power), wsd (constant, then linear over the last --decay_fraction), one_cycle (whose warm-up is half a cosine, too), constant, inverse_sqrt, or restarts (cosines of --cycle_steps). schedule_free takes constant", "wsd", choices=SCHEDULES)
    decay_fraction: float = option("share of the run over which wsd decays", 0.5, bound=A_SHARE, read_by=Runs("--schedule wsd", lambda c: c.schedule == "wsd"))
    decay_power: float = option("polynomial: the power; 1 is a straight line", 1.0, bound=POSITIVE, read_by=Runs("--schedule polynomial", lambda c: c.schedule == "polynomial"))
    cycle_steps: int | None = option("restarts: steps from one peak to the next", None, bound=POSITIVE, read_by=Runs("--schedule restarts", lambda c: c.schedule == "restarts"))
    min_lr_fraction: float = option("the last step's learning rate as a fraction of the peak", 0.0, bound=A_SHARE, read_by=Runs("schedules that fall to a minimum, which constant and inverse_sqrt do not", lambda c: c.schedule in END_AT_MINIMUM))
    optimizer: str = option("muon (matrices of the blocks; AdamW for the rest), adamw, which fine-tuning takes, adamw8bit (its moments in a byte each), adafactor, lion, sgd or schedule_free (AdamW that averages its weights in place of a falling learning rate)", "muon", choices=tuple(OPTIMIZERS))
    optimizer_file: str | None = option("FILE.py:FUNCTION of your own that builds the optimizer, in place of --optimizer (docs/optimizers.md)", None)
    layer_lr_decay: float = option("learning rate of a block, as a fraction of that of the one above it; the head has the whole, embeddings the least", 1.0, bound=ABOVE_ZERO_TO_ONE)
    ema: float | None = option("decay a step of an average of the weights, which is evaluated and saved beside them; 0.999 is usual", None, bound=WITHIN, read_by=Runs("optimizers that do not average by themselves, as schedule_free does", lambda c: not c.is_schedule_free))
    dropout: float = option("share of the activations zeroed after the embedding and after each attention and MLP, the same for the same samples however they are batched; attention's probabilities are left whole", 0.0, bound=BELOW_ONE, read_by=Runs("stages that learn from given text, whose answers are not drawn", lambda c: c.stage not in ("grpo", "ppo")))
    weight_decay: float = option("decoupled decay on matrices; norms and embeddings have none; 0 in fine-tuning", 0.1, bound=NOT_NEGATIVE)
    beta1: float = option("AdamW: decay of the first moment; lion: the momentum's share in a step; schedule_free: the average's share in the weights that are trained", 0.9, bound=BELOW_ONE, read_by=BETAS)
    beta2: float | None = option("AdamW: decay of the second moment; lion: of the momentum (default: 0.95, lion 0.99)", None, bound=BELOW_ONE, read_by=BETAS)
    momentum: float | None = option("sgd and muon: decay of the momentum (default: sgd 0.9, muon 0.95)", None, bound=BELOW_ONE, read_by=MOMENTUM)
    grad_clip: float = option("largest global gradient norm; 0 does not clip", 1.0, bound=NOT_NEGATIVE)
    spike_guard: float | None = option("leave out steps whose loss or gradient norm is above mean + so many σ of the last 128 that were not (6 is usual); after 5 in a row go back, once, and pass over their data (docs/training.md)", None, bound=POSITIVE)
    router_aux_loss_coef: float | None = option("mixtures of experts: weight of the loss that keeps experts equally busy, row by row (default: 0.01, or what the base has)", None, bound=NOT_NEGATIVE, read_by=(PRETRAIN, MAY_HAVE_EXPERTS))
    router_z_loss_coef: float = option("mixtures of experts: weight of the squared log-normaliser of the routers", 0.001, bound=NOT_NEGATIVE, read_by=(PRETRAIN, MAY_HAVE_EXPERTS))
    z_loss: float = option("weight of the squared log-normaliser (1e-5 is usual); kept out of the reported loss", 0.0, bound=NOT_NEGATIVE, read_by=TEXT)

    @property
    def optimizer_shown(self) -> str:
        return self.optimizer_file or self.optimizer

    @property
    def is_schedule_free(self) -> bool:
        return self.optimizer_file is None and self.optimizer == "schedule_free"

    @property
    def resolved_ema(self) -> float | None:
        """--ema, which of a plan's stages those leave aside that average by themselves."""
        return None if self.is_schedule_free else self.ema

    @property
    def optimizer_settings(self) -> dict[str, float]:
        """beta1, beta2 and momentum, each optimizer's own where they are not given."""
        own = {"lion": 0.99, "sgd": 0.9}.get(self.optimizer, 0.95)
        beta2, momentum = (own if value is None else value for value in (self.beta2, self.momentum))
        return {"beta1": self.beta1, "beta2": beta2, "momentum": momentum}

    @property
    def resolved_warmup_steps(self) -> int:
        if self.warmup_steps is None:
            return round(0.3 * self.max_steps) if self.schedule == "one_cycle" else min(2000, self.max_steps // 10)
        return math.ceil(self.warmup_steps * self.max_steps) if self.warmup_steps < 1 else int(self.warmup_steps)

    def lr_factor(self, step: int) -> float:
        """What step `step` multiplies the learning rate by."""
        return learning_rate_factor(
            step, max_steps=self.max_steps, warmup_steps=self.resolved_warmup_steps, schedule=self.schedule,
            decay_fraction=self.decay_fraction, min_factor=self.min_lr_fraction, power=self.decay_power,
            cycle_steps=self.cycle_steps or 1,
        )

    def check_optimization(self) -> None:
        """UserError for a schedule or an average that the optimizer cannot have, or a file that builds none."""
        if self.optimizer_file is not None:
            load_builder(self.optimizer_file)
        if self.schedule == "restarts" and self.cycle_steps is None:
            raise UserError("--schedule restarts needs --cycle_steps: how many steps it is from one peak to the next")
        if not self.is_schedule_free:
            return
        if self.schedule != "constant":
            raise UserError(
                f"--schedule {self.schedule} cannot be used with --optimizer schedule_free, which averages in place of it: "
                "leave it out, or give constant"
            )
        if self.beta1 == 0:
            raise UserError("--beta1 must be positive with --optimizer schedule_free: 0 leaves no average to train at")


@dataclass
class HardwareOptions:
    """Device, precision, kernels and compilation.

    python train.py --data_dir data/mine --mixed_precision bf16 --compile_model --attention flash-attn
    """

    device: str = option("auto, cpu, cuda or mps", "auto", choices=("auto", "cpu", "cuda", "mps"))
    mixed_precision: str = option("bf16, fp16 (with a loss scaler), fp8 (the blocks' products, while learning; Hopper and newer, and faster only with --compile_model), none, or auto, which the flag alone means too: bf16 on a GPU that has it, fp16 on one that has not, none on a CPU", "auto", choices=PRECISIONS, value_if_bare="auto")
    kernels: list[str] = option("auto, triton or torch; then, for single ones, operation=triton or operation=torch (operations: " + ", ".join(OPERATIONS) + "). auto: Triton on a GPU, and with --compile_model only where it beats the compiler", ["auto"])
    attention: str = option("back end of attention: auto (a varlen kernel for packed documents on a GPU, else sdpa), sdpa, varlen, flash-attn, fa3, fa4 or flex", "auto", choices=ATTENTION_BACKENDS)
    compile_model: bool = option("torch.compile the model in place", False)
    activation_checkpointing: str = option("which activations are not kept for the backward pass and computed again, with the same bits: none; selective (all but those of matrix products and attention); full (all but the blocks' inputs); or a number from 0.0 to 1.0, the share that is kept (docs/memory.md)", "none")
    strategy: str = option("how several ranks hold the model: ddp (each has all of it), fsdp (each has a part of weights, gradients and optimizer state), deepspeed (as --deepspeed says) or accelerate (as the config of `accelerate launch` says, which is read in any case)", "ddp", choices=STRATEGIES)
    deepspeed: str | None = option("DeepSpeed's config, a JSON file; means --strategy deepspeed (docs/launchers.md)", None, read_by=Runs("--strategy deepspeed", lambda c: c.strategy == "deepspeed"))
    context_parallel: int = option("neighbouring ranks that share the tokens of each row, for rows longer than one device holds; the ranks are a multiple of it", 1, bound=POSITIVE)
    tensor_parallel: int = option("neighbouring ranks that share the matrices of each block, by heads and channels, and the vocabulary; the ranks are a multiple of it, times --context_parallel", 1, bound=POSITIVE)
    shard_size: int | None = option("ranks that share one copy of the model, which divide the number of ranks (default: all of them)", None, bound=POSITIVE, read_by=SHARDED)
    reshard_after_forward: bool = option("a block's weights are given up after its forward pass, and gathered again for its backward pass", True, read_by=SHARDED)
    offload: str = option("none, or all: weights, gradients and optimizer state lie in the host's memory, which updates them", "none", choices=("none", "all"), read_by=SHARDED)
    profile: int | None = option("write a Chrome trace and a table by operator of so many steps to --save_dir/profile, after the first few", None, bound=POSITIVE)
    peak_tflops: float | None = option("peak dense TFLOP/s of one device in the precision used, for MFU on a device that groundup does not know", None, bound=POSITIVE)

    @property
    def ranks_of_a_batch(self) -> int:
        """How many ranks work on each micro-batch together."""
        return self.context_parallel * self.tensor_parallel

    def check_hardware(self) -> None:
        """UserError for activations to keep that are neither named nor a share."""
        try:
            share_kept(self.activation_checkpointing)
        except ValueError:
            raise UserError(
                f"--activation_checkpointing {self.activation_checkpointing}: choose {', '.join(NAMES)}, or a number from 0.0 "
                "to 1.0, the share of the blocks' activations that is kept"
            ) from None


# parts of the names of evaluations' figures; of `val_reward_loss` the first counts
_HIGHER_IS_BETTER = (
    "reward", "accuracy", "f1", "exact_match", "precision", "recall", "matthews", "pearson", "spearman", "margin", "finished",
)  # fmt: skip
_LOWER_IS_BETTER = ("loss", "bpb", "perplexity", "error", "mae", "kl", "unscored")


@dataclass
class RunOptions:
    """Where a run is kept, how often it looks up, and how it goes on.

    python train.py --save_dir checkpoints/mine --checkpoint latest --max_steps 30000
    """

    save_dir: str = option("where checkpoints, metrics.jsonl and the plot go", "./checkpoints", aliases=("save_model",))
    checkpoint: str | None = option("resume from this checkpoint folder, or from the newest whole one: latest", None)
    save_interval: int | None = option("steps between checkpoints (default: --eval_interval)", None, bound=POSITIVE)
    save_every_minutes: float | None = option("minutes between checkpoints, beside those of --save_interval, by the clock of the first rank", None, bound=POSITIVE)
    keep_checkpoints: int = option("newest checkpoints to keep (the best one is kept too); 0 keeps all", 3, bound=NOT_NEGATIVE)
    keep_every: int | None = option("keep each checkpoint whose step is a multiple of this for ever", None, bound=POSITIVE, read_by=Runs("runs with a positive --keep_checkpoints, as 0 keeps all", lambda c: c.keep_checkpoints > 0))
    keep_optimizer: str = option("all, or last: the newest checkpoint alone keeps its optimizer state, which is two thirds of it with AdamW; no run can go on from the others", "all", choices=("all", "last"))
    best_metric: str | None = option("figure of the evaluations that says which checkpoint is the best, such as val_accuracy, f1 or a figure of --hooks (default: val_loss)", None)
    best_mode: str | None = option("min or max: whether a lower or a higher --best_metric is better (default: by its name)", None, choices=("min", "max"))
    async_checkpoint: bool = option("write checkpoints while training goes on: the loop waits only for the copy of weights and optimizer state to host memory, which it needs room for", False)
    log_interval: int = option("steps between log lines", 100, bound=POSITIVE)
    eval_interval: int = option("steps between evaluations on the validation split; 0 evaluates at the end only", 500, bound=NOT_NEGATIVE, aliases=("eval_freq",))
    eval_tokens: int = option("validation tokens read at each evaluation; 0 reads all. The last evaluation always reads all", 1_000_000, bound=NOT_NEGATIVE, read_by=PART_EVALUATED)
    eval_iter: int | None = option("micro-batches read at each evaluation, in place of --eval_tokens: each of --micro_batch_size rows, or of --batch_size where that is not given, on however many ranks", None, bound=POSITIVE, read_by=PART_EVALUATED)
    sample_prompt: str = option("text to continue at each evaluation; an empty text draws no sample", "The ", aliases=("start_context",))
    sample_tokens: int = option("tokens of that sample", 100, bound=NOT_NEGATIVE, read_by=Runs("runs with a --sample_prompt", lambda c: bool(c.sample_prompt)))
    log_to: list[str] = option("where figures, samples and events go besides metrics.jsonl: tensorboard, wandb, trackio, mlflow or csv, also several of them (docs/monitor.md)", [], choices=LOGGERS)
    hooks: list[str] = option("files of your own functions on_start, on_step, on_evaluate, on_checkpoint and on_finish, which look at the run and steer it (docs/extending.md)", [])
    timeout: float = option("minutes that a rank may stand still, or be waited for, before the stacks of all ranks are shown and the run ends, so that torchrun restarts it (docs/hangs.md)", 30.0, bound=POSITIVE)
    seed: int = option("of the initial weights and of the data order", 0)

    @property
    def best_figure(self) -> str:
        """The name of --best_metric in the row of an evaluation; `f1` and Hugging Face's `eval_f1` are val_f1."""
        return "val_" + (self.best_metric or "loss").removeprefix("val_").removeprefix("eval_")

    @property
    def higher_is_better(self) -> bool:
        """What --best_mode says, or the metric's name. UserError for a name that does not tell."""
        if self.best_mode is not None:
            return self.best_mode == "max"
        for names, higher in ((_HIGHER_IS_BETTER, True), (_LOWER_IS_BETTER, False)):
            if any(name in self.best_figure for name in names):
                return higher
        raise UserError(f"--best_metric {self.best_metric}: add --best_mode min or max, as its name does not tell which")
# fmt: on


GROUPS: dict[str, type] = {
    "stage": StageOptions,
    "data": DataOptions,
    "masking": MaskingOptions,
    "examples": ExamplesOptions,
    "adapters": AdaptersOptions,
    "tasks": TaskOptions,
    "preference": PreferenceOptions,
    "reinforcement": ReinforcementOptions,
    "model": ModelOptions,
    "optimization": OptimizationOptions,
    "hardware": HardwareOptions,
    "run": RunOptions,
}
SPECS: dict[str, Spec] = {name: spec for group in GROUPS.values() for name, spec in specs_of(group).items()}


def _divisors_near(number: int, wish: int) -> str:
    below = max(d for d in range(1, wish + 1) if number % d == 0)
    above = min(d for d in range(wish, number + 1) if number % d == 0)
    return f"{below} or {above}" if below != above else str(below)
