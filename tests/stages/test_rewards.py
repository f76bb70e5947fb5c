"""Do rewards say what people mean by them, and does a bad one stop the run with a sentence that names the answer?"""

import contextlib
import json
import signal
import threading
import time

import numpy as np
import pytest
import torch

from adapters.actor_critic import scores_of
from adapters.scalar_head import RewardModel
from errors import UserError
from generation.rollouts import Prompt, Rollout, Sampling
from model import Transformer
from model_config import ModelConfig
from ranks import Ranks
from stages.rewards import (
    CallTimeout,
    Reward,
    call_within,
    combine,
    describe_phase,
    evaluate_rewards,
    judge,
    load_reward,
    model_reward,
)
from tests.ranks import run_ranks
from training.precision import choose_precision

CPU = torch.device("cpu")


def decode(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def rollouts_of(texts: list[str], prompt: str = "?") -> list[Rollout]:
    """Finished ones: their last token, a full stop, is the stop token."""
    ids = [np.array([ord(c) for c in prompt + text + "."]) for text in texts]
    return [Rollout(tokens, len(prompt), True, np.zeros(len(tokens) - len(prompt))) for tokens in ids]


def scores_of_texts(reward: Reward, texts: list[str], timeout: float = 30.0, **columns) -> list[float]:
    prompts = [Prompt(np.array([63]), f"prompt {i}", {k: v[i] for k, v in columns.items()}) for i in range(len(texts))]
    return judge([reward], prompts, rollouts_of(texts), decode, timeout=timeout)[:, 0].tolist()


def shipped(spec: str, texts: list[str], **columns) -> list[float]:
    return scores_of_texts(Reward(spec, load_reward(spec)), texts, **columns)


# -------------------------------------------------------------------------------------------------------------- shipped


@pytest.mark.parametrize(
    ("text", "answer", "exact", "numeric"),
    [
        ("#### 51.0", "so she has 51 <<50+1=51>>51 left\n#### 51", 1, 1),
        ("#### 1,000", "#### 1000", 1, 1),
        ("thinking #### 12 no\n#### 1000.00\nthank you", "#### 1,000", 1, 1),
        ("therefore \\boxed{51}", "51", 1, 1),
        ("\\boxed{1} but rather \\boxed{\\frac{3}{4}}", "0.75", 1, 1),
        ("\\boxed{\\text{a {b}} c}", "\\boxed{\\text{a {b}} c}", 1, None),
        ("The answer is $1,234.50.", "1234.5", 0, 1),  # only the last number, not the whole answer
        ("between 3 and 5-7", "7", 0, 1),
        ("5-7", "-7", 0, 0),
        ("#### -7", "-7.0", 1, 1),
        ("#### 50%", "50", 1, 1),
        ("#### 52", "#### 51", 0, 0),
        ("#### 510", "#### 51", 0, 0),
        ("no idea", "#### 51", 0, 0),
        ("Paris", "Paris", 1, None),
        ("  New   York ", "New York", 1, None),
        ("paris", "Paris", 0, None),
        ("3/0", "3", 0, 0),
    ],
)
def test_final_answers_are_compared_as_numbers_or_word_for_word(text, answer, exact, numeric):
    assert shipped("exact_answer", [text], answer=[answer]) == [exact]
    [found] = shipped("numeric_answer", [text], answer=[answer])
    assert np.isnan(found) if numeric is None else found == numeric


def test_the_datas_answer_may_be_a_number_or_missing_and_in_any_usual_column():
    found = shipped("numeric_answer", ["#### 4", "#### 4"], solution=[4, None])
    assert found[0] == 1 and np.isnan(found[1])
    with pytest.raises(UserError, match="none of answer"):
        shipped("exact_answer", ["x"], question=["y"])


def test_every_answer_of_gsm8k_is_its_own(shared_data):
    """1319 real solutions: each is right by its own answer, in both rewards, and wrong by another number."""
    rows = [json.loads(line) for line in (shared_data / "rlvr" / "gsm8k_test.jsonl").read_text().splitlines()]
    answers = [row["answer"] for row in rows]
    for spec in ("exact_answer", "numeric_answer"):
        assert set(shipped(spec, answers, answer=answers)) == {1.0}
        assert set(shipped(spec, [f"#### {i}.5" for i in range(len(answers))], answer=answers)) == {0.0}


def test_format_regex_and_length():
    good = "<think>a\nb</think>\n<answer>c</answer>"
    assert shipped("format", [good, "x" + good, good + "\n", "<think></think>"]) == [1, 0, 1, 0]
    assert shipped(r"format=\d+", ["12", "12a"]) == [1, 0]
    assert shipped(r"regex=a=\d", ["so a=1 b", "a=x"]) == [1, 0]
    # tokens, the stop token too: 0 up to 4, then falling, -1 from 8 on
    assert shipped("length=4", ["abc", "abcd", "abcdef", "abcdefg", "a" * 50]) == [0, -0.25, -0.75, -1, -1]
    for spec in (
        "length",
        "length=no",
        "length=0",
        "regex=(",
        "formats",
        "no.such.module:f",
        "json:nothing",
        "json:decoder",
    ):
        with pytest.raises(UserError, match="--reward_function"):
            load_reward(spec)


# -------------------------------------------------------------------------------------------------------------- calling


def test_a_users_function_is_found_and_given_what_it_names(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def plain(prompts, completions): return [len(c) for c in completions]\n"
        "def columns(completions, level, completion_ids, **rest): return [a * len(b) for a, b in zip(level, completion_ids)]\n"
        "async def later(completions, level): return [None if x == 1 else x for x in level]\n"
    )
    monkeypatch.chdir(tmp_path)
    texts, level = ["a", "abc"], [1, 10]
    found = {name: shipped(f"my_rewards:{name}", texts, level=level) for name in ("plain", "columns", "later")}
    assert found["plain"] == [1, 3]  # the text is without the stop token
    assert found["columns"] == [2, 40]
    assert np.isnan(found["later"][0]) and found["later"][1] == 10


def test_several_rewards_add_up_by_weight_and_none_counts_nowhere():
    rewards = [Reward("a", None, 2.0), Reward("b", None, 0.5)]
    scores = np.array([[1.0, 4.0], [np.nan, 4.0], [np.nan, np.nan]])
    assert np.array_equal(combine(scores, rewards), [4.0, 2.0, np.nan], equal_nan=True)
    figures = describe_phase(rollouts_of(["a", "bc", "d"]), scores, combine(scores, rewards), rewards)
    expected = {"reward": 3.0, "reward_std": 2**0.5, "reward_a": 1.0, "reward_a_std": np.nan, "reward_b": 4.0, "unscored": 1 / 3,
                "reward_b_std": 0.0, "completion_length": 7 / 3, "finished": 1.0}  # fmt: skip
    assert figures == pytest.approx(expected, nan_ok=True)


def bad(prompts, completions):
    return [1 / (len(text) - 3) for text in completions]


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, responses: [bool(p) + len(r) for p, r in zip(prompts, responses, strict=True)],
        lambda x, y: [1.0 + len(r) for r in y],
        lambda prompts, responses, level: [1.0 + len(r) for r in responses],
        lambda questions, answers, **rest: [1.0 + len(r) for r in answers],
        lambda prompts, completions, weight=1.0: [weight + len(c) for c in completions],
    ],
)
def test_the_first_two_parameters_may_have_any_name(function):
    assert scores_of_texts(Reward("own", function), ["a", "abc"], level=[1, 2]) == [2.0, 4.0]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), "7", b"7", [1.0], torch.zeros(2), object()])
def test_what_is_no_finite_number_is_refused(value):
    with pytest.raises(UserError, match="finite number or None"):
        scores_of_texts(Reward("own", lambda prompts, completions: [value for _ in completions]), ["a"])


@pytest.mark.parametrize("value", [1, True, 1.0, np.float32(1), np.int64(1), torch.tensor(1.0)])
def test_what_is_a_number_is_taken(value):
    assert scores_of_texts(Reward("own", lambda prompts, completions: [value for _ in completions]), ["a"]) == [1.0]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (bad, ["reward mine raised ZeroDivisionError", "'xyz'", "'prompt 2'"]),
        (lambda prompts, completions: [1.0], ["returned 1 values for 3 answers"]),
        (lambda prompts, completions: None, ["returned NoneType"]),
        (lambda prompts, completions: [1.0, "good", 2.0], ["'good'", "'prompt 1'"]),
    ],
)
def test_a_bad_reward_is_named_with_its_sample(function, words):
    with pytest.raises(UserError) as caught:
        scores_of_texts(Reward("mine", function), ["a", "b", "xyz"])
    assert all(word in str(caught.value) for word in words), caught.value


def for_ever(prompts, completions):
    while True:
        with contextlib.suppress(Exception):  # what a careless function does must not save it
            sum(range(100))


async def sleeper(prompts, completions):
    import asyncio

    await asyncio.sleep(60)


@pytest.mark.parametrize("function", [for_ever, sleeper])
def test_a_reward_that_takes_too_long_is_stopped_in_any_thread(function):
    def attempt():
        started = time.perf_counter()
        with pytest.raises(
            UserError, match=r"slow was not done with 2 answers after 0.2 s, the first to the prompt 'prompt 0'"
        ):
            scores_of_texts(Reward("slow", function), ["a", "b"], timeout=0.2)
        taken.append(time.perf_counter() - started)

    taken = []
    attempt()
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join(20)
    # it waits for the interpreter's lock and, on a busy machine, for its turn
    assert len(taken) == 2 and max(taken) < 5


def test_a_call_in_time_is_left_alone():
    """In the calling thread, so signals work in it; nothing of the limit is left behind, nor of a function's own error."""
    assert call_within(5, lambda: signal.signal(signal.SIGUSR2, signal.SIG_DFL)) is not None
    assert call_within(5, threading.get_ident) == threading.get_ident()
    with pytest.raises(KeyError):
        call_within(5, lambda: {}["x"])
    for _ in range(20):  # around the very moment: in time or not, and never later than the call
        with contextlib.suppress(CallTimeout):
            call_within(0.01, lambda: sum(1 for _ in range(150_000)))
        for _ in range(1000):
            pass


# --------------------------------------------------------------------------------------------- trained models, held out


def a_reward_model() -> RewardModel:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = RewardModel(ModelConfig(vocab_size=128, **shape))
    model.init_weights(0, zero_residual=False)
    model.init_score(0)
    return model


def test_a_trained_model_judges_the_whole_text_at_its_last_token():
    """Packed as alone, to 1e-6, which is fp32's rounding."""
    model = a_reward_model()
    function = model_reward(
        scores_of(model), device=CPU, precision=choose_precision("none", CPU), max_length=16, micro_batch_size=2
    )
    texts = ["a", "bcdef", "gh", "ijklmnopq", "r", "s"]
    found = judge([Reward("model", function, on_tokens=True)], [Prompt(np.array([63]), "?")] * 6, rollouts_of(texts), decode,
                  timeout=9.0)[:, 0]  # fmt: skip
    for rollout, score in zip(rollouts_of(texts), found, strict=True):
        alone = model(torch.from_numpy(rollout.tokens)[None])[0, -1].item()
        assert abs(score - alone) < 1e-6


def test_held_out_rewards_are_the_same_every_time_and_on_two_ranks():
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    policy = Transformer(ModelConfig(vocab_size=128, **shape))
    policy.init_weights(0, zero_residual=False)
    prompts = [Prompt(np.arange(1, size), "p") for size in (3, 9, 4, 6, 2)]
    rewards = [Reward("low", lambda completions: [np.mean([ord(c) < 64 for c in text] or [0]) for text in completions], 2.0),
               Reward("sometimes", lambda completions: [None if len(c) % 2 else 1.0 for c in completions])]  # fmt: skip
    sampling = Sampling(
        max_new_tokens=8, temperature=1.0, stop_ids=tuple(range(100, 110)), vocab_size=128, batch_size=2
    )

    def figures(rank, world_size):
        ranks = Ranks(rank, world_size, CPU)
        return evaluate_rewards(policy, prompts, rewards, decode, sampling, ranks, seed=3, timeout=9.0)

    alone = figures(0, 1)
    assert alone == figures(0, 1) and alone["val_loss"] == -alone["val_reward"]
    assert {"val_reward_low", "val_reward_sometimes", "val_length", "val_finished"} < set(alone)
    for other in run_ranks(figures, 2):
        assert other == pytest.approx(alone, rel=1e-9)
