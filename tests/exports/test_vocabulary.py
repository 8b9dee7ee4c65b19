"""Tokenizers for llama.cpp: what is written, and what is refused because llama.cpp would cut texts in other places.

That llama.cpp gives the same tokens by each rule was tried by hand (docs/gguf.md); it is not installed here.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from export_cases import make_tokenizer
from tokenizers import Regex, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmq.errors import SpecError
from llmq.exports.vocabulary import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_vocabulary

GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
# as the published tokenizer.json of Llama 3 and Qwen 2 have them
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")


def split(pattern: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior)


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "rule"),
    [
        ([GPT2], False, "gpt-2"),
        ([DIGITS, GPT2], False, "smollm"),
        ([split(LLAMA3), BYTES], True, "llama-bpe"),
        ([split(LLAMA3), BYTES], False, "smaug-bpe"),
        ([split(QWEN2), BYTES], False, "qwen2"),
    ],
)
def test_rules_that_llama_cpp_has(tmp_path: Path, steps: list[Any], ignore_merges: bool, rule: str) -> None:
    make_tokenizer(*steps, ignore_merges=ignore_merges).save_pretrained(tmp_path)
    assert read_vocabulary(tmp_path, 320).words.rule == rule


def test_one_step_needs_no_sequence(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = GPT2
    tokenizer.save_pretrained(tmp_path)
    assert read_vocabulary(tmp_path, 320).words.rule == "gpt-2"


def test_tokens_by_number_their_types_and_merges(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path, 320)
    count = len(tokenizer)
    assert found.tokens[:count] == tokenizer.convert_ids_to_tokens(range(count))
    assert found.tokens[count:] == [f"[PAD{number}]" for number in range(count, 320)]
    assert found.types[0] == CONTROL
    assert found.types[count - 1] == USER_DEFINED  # <tool>, which is no special token
    assert found.types[1 : count - 1] == [NORMAL] * (count - 2)
    assert found.types[count:] == [UNUSED] * (320 - count)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    assert found.words.merges == [" ".join(merge) for merge in content["model"]["merges"]]
    assert found.special == {"bos": 0, "eos": 0}
    assert found.template == "{{ messages }}"
    assert (found.add_bos, found.add_eos) == (False, False)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_tokens_around_every_text(tmp_path: Path, before: bool, after: bool) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    template = f"{'<s> ' if before else ''}$A{' </s>' if after else ''}"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    tokenizer.save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path, 320)
    assert (found.add_bos, found.add_eos) == (before, after)
    assert found.special == {"bos": ids[0][1], "eos": ids[1][1]}


def damage(change: Callable[[dict[str, Any]], object]) -> Callable[[PreTrainedTokenizerFast, Path], None]:
    """Return what saves a tokenizer with its tokenizer.json changed."""

    def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        content = json.loads((folder / "tokenizer.json").read_text())
        change(content)
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return save


def with_backend(**parts: Any) -> Callable[[PreTrainedTokenizerFast, Path], None]:
    def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
        for name, part in parts.items():
            setattr(tokenizer.backend_tokenizer, name, part)
        tokenizer.save_pretrained(folder)

    return save


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (damage(lambda t: t["model"].update(dropout=0.5)), "its model has dropout 0.5"),
        (damage(lambda t: t["model"].update(end_of_word_suffix="</w>")), "its model has end_of_word_suffix '</w>'"),
        (damage(lambda t: t["model"].update(ignore_merges=True)), "by words of GPT-2, whole words first; it would cut"),
        (damage(lambda t: t["model"]["vocab"].pop("ÿ")), "1 of the 256 bytes have no token, 'ÿ' among them"),
        (damage(lambda t: t["added_tokens"][1].update(lstrip=True)), "token '<tool>' takes spaces around it along"),
        (damage(lambda t: t["added_tokens"][1].update(rstrip=True)), "token '<tool>' takes spaces around it along"),
        (damage(lambda t: t["added_tokens"][1].update(single_word=True)), "token '<tool>' .* stands for whole words"),
        (with_backend(normalizer=normalizers.Lowercase()), "it normalizes texts by Lowercase"),
        (with_backend(pre_tokenizer=None), 'it cuts texts by {"type": "none"}'),
        (with_backend(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)), '"add_prefix_space": true'),
        (with_backend(pre_tokenizer=BYTES), "it cuts texts by bytes; "),
        (with_backend(pre_tokenizer=pre_tokenizers.Digits(individual_digits=False)), '"individual_digits": false'),
        (with_backend(pre_tokenizer=pre_tokenizers.Sequence([GPT2, DIGITS])), "by words of GPT-2; digits; it would"),
        (with_backend(pre_tokenizer=pre_tokenizers.Sequence([split("x"), BYTES])), "it cuts texts by split x; bytes"),
        (
            with_backend(
                pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated", True), BYTES])
            ),
            '"invert": true',
        ),
        (
            with_backend(pre_tokenizer=pre_tokenizers.Sequence([split(QWEN2, "removed"), BYTES])),
            '"behavior": "Removed"',
        ),
        (
            with_backend(
                post_processor=processors.TemplateProcessing(single="<tool> $A", special_tokens=[("<tool>", 300)])
            ),
            r"it turns the tokens \[65\] into \[300, 65\], and not by its bos and eos tokens",
        ),
    ],
)
def test_what_llama_cpp_would_cut_elsewhere_is_refused(
    tmp_path: Path, save: Callable[[PreTrainedTokenizerFast, Path], None], message: str
) -> None:
    save(make_tokenizer(), tmp_path)
    with pytest.raises(SpecError, match=f"tokenizer.json: llama.cpp has no tokenizer like it: .*{message}"):
        read_vocabulary(tmp_path, 320)


def test_canonical_composition_is_let_pass(tmp_path: Path) -> None:
    with_backend(normalizer=normalizers.NFC())(make_tokenizer(), tmp_path)
    assert read_vocabulary(tmp_path, 320).words.rule == "gpt-2"


def test_tokens_beyond_the_embedding_are_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    count = len(tokenizer)
    assert len(read_vocabulary(tmp_path, count).tokens) == count
    with pytest.raises(SpecError, match=f"token {count - 1} has no row in the embedding of {count - 1}; "):
        read_vocabulary(tmp_path, count - 1)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no tokenizer to export, put tokenizer\.json there: "):
        read_vocabulary(tmp_path, 300)
