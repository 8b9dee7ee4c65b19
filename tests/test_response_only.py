"""Conversations become rows with a mask of the predictions that count, and calibration sets are split in two."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_calibration import WORDS, make_tokenizer
from transformers import PreTrainedTokenizerFast

from llmq.calibration import Calibration, from_token_lists, load_calibration, split_held_out
from llmq.errors import CalibrationError, SpecError

# w900 starts a message, w901 … w903 are the roles, w909 ends it
ROLES = {"system": "w901", "user": "w902", "assistant": "w903"}
_ROLE = "{{ {'system': 'w901', 'user': 'w902', 'assistant': 'w903'}[m['role']] }}"
PLAIN = (
    "{% for m in messages %}w900 " + _ROLE + " {{ m['content'] }} w909 {% endfor %}"
    "{% if add_generation_prompt %}w900 w903 {% endif %}"
)
MARKED = (
    "{% for m in messages %}w900 " + _ROLE + " {% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} w909{% endgeneration %} "
    "{% else %}{{ m['content'] }} w909 {% endif %}{% endfor %}"
)
# as reasoning models do: an empty thought (w910) before the last answer, none in the answers before it
THINKING = (
    "{% for m in messages %}w900 " + _ROLE + " {% if loop.last and m['role'] == 'assistant' %}w910 {% endif %}"
    "{{ m['content'] }} w909 {% endfor %}{% if add_generation_prompt %}w900 w903 {% endif %}"
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user\nspeaks first') }}{% endif %}" + PLAIN
ENDLESS = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}w911 {% endif %}"


def chat(*texts: str, first: str = "user") -> dict[str, Any]:
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    roles += ["user", "assistant"] * len(texts)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


def tokenizer(template: str | None = None, *, bos: bool = False) -> PreTrainedTokenizerFast:
    made = make_tokenizer(bos)
    made.chat_template = template
    return made


def write(folder: Path, *rows: Any) -> str:
    path = folder / "chats.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def load(source: str | None, made: Any, **changes: Any) -> Calibration:
    options: dict[str, Any] = {"num_samples": None, "seq_len": 64, "seed": 0, "response_only": True} | changes
    return load_calibration(source, made, **options)


def counted(found: Calibration, row: int = 0) -> list[int]:
    """Return the tokens whose prediction counts."""
    mask = found.counted[row]
    return [int(found.input_ids[row, t + 1]) for t in range(len(mask)) if mask[t]]


def test_answers_are_what_the_template_adds_to_the_prompt(tmp_path: Path) -> None:
    source = write(tmp_path, chat("w50", "w1 w2", "w3", "w51 w52", "w4", first="system"))
    found = load(source, tokenizer(PLAIN))
    wanted = [900, 901, 50, 909, 900, 902, 1, 2, 909, 900, 903, 3, 909, 900, 902, 51, 52, 909, 900, 903, 4, 909]
    assert found.input_ids.tolist() == [wanted]
    assert counted(found) == [3, 909, 4, 909]
    assert found.loss_mask is not None
    assert found.loss_mask.dtype == torch.bool
    assert found.loss_mask[0].nonzero().flatten().tolist() == [10, 11, 19, 20]  # where the prediction is made
    assert found.attention_mask is None
    assert found.source == source


def test_marks_of_the_template_decide_where_it_has_them(tmp_path: Path) -> None:
    # the template knows no generation prompt: differences of its prefixes would count w900 and w903 as well
    found = load(write(tmp_path, chat("w1", "w2 w3", "w4", "w5")), tokenizer(MARKED))
    assert found.input_ids.tolist() == [[900, 902, 1, 909, 900, 903, 2, 3, 909, 900, 902, 4, 909, 900, 903, 5, 909]]
    assert counted(found) == [2, 3, 909, 5, 909]


def test_what_follows_the_last_answer_is_left_out(tmp_path: Path) -> None:
    found = load(write(tmp_path, chat("w1", "w2", "w3")), tokenizer(PLAIN))
    assert found.input_ids.tolist() == [[900, 902, 1, 909, 900, 903, 2, 909]]


def test_answers_that_change_once_they_are_history_are_prompt(tmp_path: Path) -> None:
    found = load(write(tmp_path, chat("w1", "w2", "w3", "w4")), tokenizer(THINKING))
    assert found.input_ids.tolist() == [[900, 902, 1, 909, 900, 903, 2, 909, 900, 902, 3, 909, 900, 903, 910, 4, 909]]
    assert counted(found) == [910, 4, 909]


def test_a_conversation_may_start_with_an_answer(tmp_path: Path) -> None:
    row = {"messages": [{"role": "assistant", "content": "w7"}]}
    # nothing comes before its first token, from which it could be predicted
    assert counted(load(write(tmp_path, row), tokenizer(PLAIN))) == [903, 7, 909]


def test_prompt_and_response_are_taken_as_they_are(tmp_path: Path) -> None:
    row = {"prompt": "w1 w2", "response": "w3 w4", "id": 7}
    found = load(write(tmp_path, row), tokenizer())
    assert found.input_ids.tolist() == [[1, 2, 3, 4]]
    assert counted(found) == [3, 4]
    found = load(write(tmp_path, row), tokenizer(bos=True))
    assert found.input_ids.tolist() == [[WORDS, 1, 2, 3, 4]]
    assert counted(found) == [3, 4]


def test_prompt_and_response_are_tokenized_apart(tmp_path: Path) -> None:
    # together "w1" and "2" would be the word w12; the model meets the answer after the tokens of the prompt
    found = load(write(tmp_path, {"prompt": "w5 w1", "response": "w2"}), tokenizer())
    assert found.input_ids.tolist() == [[5, 1, 2]]


def test_an_empty_prompt_leaves_the_first_token_unpredicted(tmp_path: Path) -> None:
    assert counted(load(write(tmp_path, {"prompt": "", "response": "w3 w4"}), tokenizer())) == [4]


def test_rows_are_cut_off_and_padded_on_the_right(tmp_path: Path) -> None:
    rows = [{"prompt": "w1", "response": "w2 w3 w4 w5 w6 w7"}, {"prompt": "w8", "response": "w9"}]
    found = load(write(tmp_path, *rows), tokenizer(), seq_len=5)
    long, short = (0, 1) if found.input_ids[0, 0] == 1 else (1, 0)
    assert found.input_ids[long].tolist() == [1, 2, 3, 4, 5]
    assert found.input_ids[short, :2].tolist() == [8, 9]
    assert found.attention_mask is not None
    assert found.attention_mask[long].all()
    assert found.attention_mask[short].tolist() == [True, True, False, False, False]
    assert counted(found, long) == [2, 3, 4, 5]
    assert counted(found, short) == [9]
    assert found.tokens == 7


def test_conversations_without_an_answer_in_reach_are_passed_over(tmp_path: Path) -> None:
    rows = [{"prompt": "w1 w2 w3 w4", "response": "w5"}, chat("w6"), {"prompt": "w7", "response": "w8"}]
    found = load(write(tmp_path, *rows), tokenizer(PLAIN), seq_len=4)
    assert found.input_ids.tolist() == [[7, 8]]


def many(folder: Path, rows: int = 40) -> str:
    return write(folder, *({"prompt": f"w{i}", "response": f"w{i + 100}"} for i in range(1, rows + 1)))


def test_rows_are_drawn_by_the_seed_and_none_twice(tmp_path: Path) -> None:
    source = many(tmp_path)
    first, again, other = (load(source, tokenizer(), num_samples=12, seed=seed) for seed in (0, 0, 1))
    assert first.input_ids.shape == (12, 2)
    assert first.input_ids[:, 0].unique().numel() == 12
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.input_ids[:, 0].max() > 12
    assert load(source, tokenizer()).input_ids[:, 0].sort().values.tolist() == list(range(1, 41))
    assert len(load(many(tmp_path, 140), tokenizer()).input_ids) == 128


def test_the_loss_mask_is_part_of_the_fingerprint() -> None:
    lists = [[1, 2, 3]]
    plain = from_token_lists(lists, pad_token_id=0, source="a")
    marked = [from_token_lists(lists, pad_token_id=0, source="a", answers=[[False, i > 0, True]]) for i in (0, 1)]
    assert len({plain.fingerprint, *(m.fingerprint for m in marked)}) == 3


def test_without_a_loss_mask_every_token_behind_another_counts() -> None:
    padded = from_token_lists([[1, 2, 3], [4]], pad_token_id=0, source="a")
    assert padded.counted.tolist() == [[True, True, False], [False, False, False]]
    packed = from_token_lists([[1, 2], [4, 5]], pad_token_id=0, source="a")
    assert packed.counted.tolist() == [[True, False], [True, False]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "w1"}, r'line 2: response-only .* needs "messages", or "prompt" and "response" as texts; .* text$'),
        ({"prompt": "w1"}, r'"response" as texts; its fields are prompt$'),
        ({"prompt": "w1", "response": 3}, r'"response" as texts; its fields are prompt, response$'),
        ({"messages": "w1"}, r'line 2: "messages" is not a list of objects with texts "role" and "content"'),
        ({"messages": []}, '"messages" is not a list'),
        ({"messages": ["w1"]}, '"messages" is not a list'),
        ({"messages": [{"role": "user"}]}, '"messages" is not a list'),
        (["w1"], "line 2: not an object"),
    ],
    ids=str,
)
def test_rows_of_another_form_are_refused_even_where_they_are_not_drawn(tmp_path: Path, row: Any, message: str) -> None:
    source = write(tmp_path, {"prompt": "w1", "response": "w2"}, row)
    with pytest.raises(CalibrationError, match=message):
        load(source, tokenizer(PLAIN), num_samples=1)


def test_no_chat_template_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"line 1: .*chat template cannot render.*chat_template is not set.*set"):
        load(write(tmp_path, chat("w1", "w2")), tokenizer())


def test_what_a_template_refuses_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        CalibrationError, match=r"line 1: .*chat template cannot render.*the user speaks first"
    ) as caught:
        load(write(tmp_path, chat("w1", "w2", "w3", first="system")), tokenizer(STRICT))
    assert "\n" not in str(caught.value)


def test_a_template_that_hides_where_the_answer_starts_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="does not start with the prompt for that answer"):
        load(write(tmp_path, chat("w1", "w2")), tokenizer(ENDLESS))


def test_no_answer_in_any_conversation_is_an_error(tmp_path: Path) -> None:
    source = write(tmp_path, chat("w1"), chat("w2"))
    with pytest.raises(CalibrationError, match=r"0 of 2 conversations have an answer within 64 tokens, 1 needed; give"):
        load(source, tokenizer(PLAIN))


def test_too_few_conversations_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"3 of 3 .*, 5 needed; lower --num-samples to 3 or give more"):
        load(many(tmp_path, 3), tokenizer(), num_samples=5)
    assert len(load(many(tmp_path, 3), tokenizer(), num_samples=3).input_ids) == 3


@pytest.mark.parametrize("source", [None, "text.txt", "org/dataset"], ids=str)
def test_only_jsonl_tells_answers_from_prompts(source: str | None) -> None:
    with pytest.raises(CalibrationError, match=r"only a \.jsonl file says"):
        load(source, tokenizer(PLAIN))


def test_padding_is_what_the_tokenizer_pads_with(tmp_path: Path) -> None:
    made = tokenizer()
    source = write(tmp_path, {"prompt": "w1", "response": "w2"}, {"prompt": "w3", "response": "w4 w5"})

    def pads() -> set[int]:
        found = load(source, made)
        assert found.attention_mask is not None
        return set(found.input_ids[~found.attention_mask].tolist())

    assert pads() == {0}
    made.eos_token = "w77"
    assert pads() == {77}
    made.pad_token = "w78"
    assert pads() == {78}


# ----------------------------------------------------------------------------------------------------------------------


def numbered(samples: int) -> Calibration:
    ids = torch.arange(samples)[:, None].expand(samples, 3).contiguous()
    mask = torch.ones(samples, 3, dtype=torch.bool)
    mask[::2, 2] = False
    return Calibration(ids, mask, "numbers", "none", mask & (ids % 3 == 0))


@pytest.mark.parametrize(
    ("samples", "share", "count"), [(64, 0.1, 6), (10, 0.1, 1), (3, 0.01, 1), (2, 0.99, 1), (5, 0.5, 2)]
)
def test_held_out_windows_are_whole_and_the_rest_stays(samples: int, share: float, count: int) -> None:
    whole = numbered(samples)
    kept, held = split_held_out(whole, share, seed=0)
    assert held is not None
    assert held.input_ids.shape == (count, 3)
    both = torch.cat([kept.input_ids, held.input_ids])
    assert both[:, 0].sort().values.tolist() == list(range(samples))
    for part in (kept, held):
        rows = part.input_ids[:, 0]
        assert rows.tolist() == sorted(rows.tolist())
        assert part.attention_mask is not None
        assert part.loss_mask is not None
        assert whole.attention_mask is not None
        assert whole.loss_mask is not None
        assert torch.equal(part.attention_mask, whole.attention_mask[rows])
        assert torch.equal(part.loss_mask, whole.loss_mask[rows])
        assert part.source == "numbers"
    assert len({whole.fingerprint, kept.fingerprint, held.fingerprint}) == 3


def test_held_out_windows_are_spread_over_the_set_and_drawn_by_the_seed() -> None:
    seen = set()
    for seed in range(20):
        _, held = split_held_out(numbered(60), 0.1, seed)
        assert held is not None
        rows = held.input_ids[:, 0]
        assert (rows // 10).tolist() == list(range(6))  # one of every stretch of ten
        seen.add(tuple(rows.tolist()))
        _, again = split_held_out(numbered(60), 0.1, seed)
        assert again is not None
        assert again.fingerprint == held.fingerprint
    assert len(seen) == 20


def test_without_masks_the_parts_have_none() -> None:
    kept, held = split_held_out(Calibration(torch.zeros(4, 3).long(), None, "x", "y"), 0.25, 0)
    assert held is not None
    assert kept.attention_mask is kept.loss_mask is held.attention_mask is held.loss_mask is None


def test_a_share_of_nothing_holds_nothing_out() -> None:
    whole = numbered(4)
    kept, held = split_held_out(whole, 0.0, 0)
    assert kept is whole
    assert held is None


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_senseless_shares_are_refused(share: float) -> None:
    with pytest.raises(SpecError, match="use a share of the calibration windows from 0 to below 1"):
        split_held_out(numbered(4), share, 0)


def test_one_window_cannot_be_split() -> None:
    with pytest.raises(CalibrationError, match="numbers: 1 window cannot be split; give more samples"):
        split_held_out(numbered(1), 0.1, 0)
