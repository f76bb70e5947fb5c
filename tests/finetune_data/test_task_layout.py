"""Do texts and pairs become the ids and token types that transformers gives, cut where it cuts?"""

import json

import pytest
import torch

from batches.packing import pack
from dataprep.tokenizers import load_tokenizer
from errors import UserError
from finetune_data.labelled import LabelledText, Labels, encode_labelled
from finetune_data.task_layout import cut_longest_first, find_layout, token_types

BOTH = Labels("single", ("no", "yes"), 2)


def packed_types(sequences, max_length):
    """Each sequence's token types, read off the micro-batches into which they are packed."""
    found = []
    for batch in pack([[one] for one in sequences], max_length=max_length, micro_batch_size=3):
        types = token_types(batch)
        found += [types[batch.sequence_ids == number].tolist() for number in range(batch.num_sequences)]
        assert not types[batch.sequence_ids == batch.num_sequences].any(), "padding has a type"
    return found


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("max_length", [16, 17, 40, 200])
def test_encoders_sequences_are_those_of_transformers(family, max_length, request, random_texts):
    transformers = pytest.importorskip("transformers")
    folder = request.getfixturevalue(family)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    firsts, seconds = random_texts(40, 1), random_texts(40, 2)
    for pair in (False, True):
        examples = [LabelledText(a, b if pair else None, 1, "") for a, b in zip(firsts, seconds, strict=True)]
        ours = encode_labelled(tokenizer, find_layout(tokenizer, causal=False), examples, BOTH, max_length=max_length)
        expected = theirs(
            firsts, seconds if pair else None, truncation="longest_first", max_length=max_length, padding=False,
            return_token_type_ids=True,
        )  # fmt: skip
        assert [one.tokens.tolist() for one in ours.sequences] == expected["input_ids"]
        whole = theirs(firsts, seconds if pair else None, padding=False, truncation=False)["input_ids"]
        assert ours.truncated == sum(len(ids) > max_length for ids in whole)
        types = packed_types(ours.sequences, max_length)
        assert types == expected["token_type_ids"]
        assert any(map(any, types)) == (family == "bert" and pair)


def test_decoders_have_a_line_between_two_texts_and_bos_where_the_tokenizer_adds_it(decoder, tmp_path):
    tokenizer = load_tokenizer(decoder)
    examples = [LabelledText("the fjords", "the beast", 0, ""), LabelledText("the fjords", None, 0, "")]
    for before in ([], [tokenizer.eos_token_id]):
        if before:
            definition = json.loads((decoder / "tokenizer.json").read_text())
            name = tokenizer.eos_token
            definition["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {name: {"id": name, "ids": before, "tokens": [name]}},
            }
            (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
            (tmp_path / "tokenizer_config.json").write_text((decoder / "tokenizer_config.json").read_text())
            tokenizer = load_tokenizer(tmp_path)
        layout = find_layout(tokenizer, causal=True)
        pair, single = encode_labelled(tokenizer, layout, examples, BOTH, max_length=50).sequences
        a, line, b = (tokenizer.encode(text) for text in ("the fjords", "\n", "the beast"))
        assert pair.tokens.tolist() == [*before, *a, *line, *b]
        assert single.tokens.tolist() == [*before, *a]
        assert layout.closed.sequence(single.tokens).tokens[-1] == tokenizer.eos_token_id


def test_encoders_without_a_template_have_berts_tokens_or_the_end_of_text_token(bert, decoder, tmp_path):
    definition = json.loads((bert / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    bare = find_layout(load_tokenizer(tmp_path), causal=False)
    assert bare == find_layout(load_tokenizer(bert), causal=False)
    tokenizer = load_tokenizer(decoder)
    layout, eos = find_layout(tokenizer, causal=False), tokenizer.eos_token_id
    assert (layout.before, layout.between, layout.after, layout.typed) == ((eos,), (eos,), (eos,), False)


def test_a_template_of_another_kind_is_refused(bert, tmp_path):
    definition = json.loads((bert / "tokenizer.json").read_text())
    definition["post_processor"]["pair"][0]["SpecialToken"]["type_id"] = 2  # as XLNet's third type
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"template in tokenizer\.json"):
        find_layout(load_tokenizer(tmp_path), causal=False)


def test_text_that_spells_a_special_token_does_not_become_one(bert):
    tokenizer = load_tokenizer(bert)
    example = LabelledText("a [SEP] b", None, 0, "")
    (one,) = encode_labelled(tokenizer, find_layout(tokenizer, causal=False), [example], BOTH, max_length=50).sequences
    assert one.tokens.tolist().count(3) == 1


def test_no_room_for_text_is_one_sentence(bert):
    tokenizer = load_tokenizer(bert)
    with pytest.raises(UserError, match="--max_length 3"):
        encode_labelled(
            tokenizer, find_layout(tokenizer, causal=False), [LabelledText("a", "b", 0, "")], BOTH, max_length=3
        )


def test_cutting_the_longer_first_takes_one_token_at_a_time():
    """Against the definition: one token at a time is taken from the longer text, of two equal ones from the first."""
    for a in range(1, 9):
        for b in range(1, 9):
            for room in range(2, 12):
                m, n = a, b
                while m + n > room:
                    m, n = (m - 1, n) if m > n or (m == n and a <= b) else (m, n - 1)
                first, second = cut_longest_first(torch.arange(a).numpy(), torch.arange(b).numpy(), room)
                assert first.tolist() == list(range(m)) and second.tolist() == list(range(n))
