"""Tokenizers of the SentencePiece kind for llama.cpp: the same joins in the same order, or a refusal.

That llama.cpp gives the same tokens was tried by hand with models that SentencePiece had trained (docs/gguf.md).
"""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from export_cases import SIZES, make_folder, pack_linears
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from llmq.errors import SpecError
from llmq.exports.gguf import export
from llmq.exports.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, Pieces, read_vocabulary

BYTES = [f"<0x{number:02X}>" for number in range(256)]
JOINED = ["th", "▁t", "the", "▁the", "he", "▁▁", "aa", "aaa", "in", "thin", "▁thin", "hein"]  # as they are made
LETTERS = "▁theaint"
LEGACY = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
GEMMA = normalizers.Replace(" ", "▁")


def make(
    normalizer: Any = LEGACY, pre_tokenizer: Any = None, change: Callable[[Any], None] | None = None
) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose merges are all ways to halve the tokens in `JOINED`."""
    pieces = ["<unk>", "<s>", "</s>", *BYTES, *dict.fromkeys(LETTERS), *JOINED]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [
        (token[:cut], token[cut:])
        for token in JOINED
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    if change is not None:
        content = json.loads(tokenizer.to_str())
        change(content)
        tokenizer = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def by_scores(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """Return the tokens of `text` as llama.cpp finds them: the best neighbours first, of equals the leftmost."""
    numbers = {token: number for number, token in enumerate(tokens)}
    symbols = list(text)
    while True:
        pairs = [(numbers.get(a + b), at) for at, (a, b) in enumerate(pairwise(symbols))]
        known = [(-scores[token], at) for token, at in pairs if token is not None]
        if not known:
            break
        _, at = min(known)
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    found = []
    for symbol in symbols:
        found += [numbers[symbol]] if symbol in numbers else [numbers[f"<0x{b:02X}>"] for b in symbol.encode()]
    return found


@given(st.text(alphabet="theain \n§", max_size=24))
def test_scores_join_what_the_merges_join(text: str) -> None:
    tokenizer, pieces, tokens = KNOWN
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    prefixed = f" {text}" if text else ""
    assert by_scores(prefixed.replace(" ", "▁"), tokens, pieces.scores) == expected


def known() -> tuple[PreTrainedTokenizerFast, Pieces, list[str]]:
    """Return a tokenizer and what is exported of it."""
    import tempfile

    tokenizer = make()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        found = read_vocabulary(Path(folder), 300)
    assert isinstance(found.words, Pieces)
    return tokenizer, found.words, found.tokens


KNOWN = known()


def test_tokens_types_and_metadata_of_the_file(tmp_path: Path) -> None:
    packed = pack_linears(make_folder(tmp_path / "m", LlamaConfig(**SIZES)))
    make().save_pretrained(packed.path)
    export(packed, tmp_path / "m.gguf")  # type: ignore[arg-type]
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    found = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields.items()}
    assert (found["model"], found["pre"], found["add_space_prefix"]) == ("llama", "default", True)
    assert "merges" not in found
    count = 3 + 256 + len(set(LETTERS)) + len(JOINED)
    expected = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (count - 259), *[UNUSED] * (320 - count)]
    assert found["token_type"] == expected
    assert found["tokens"][259] == "▁"
    ranks = {token: score for token, score in zip(found["tokens"], found["scores"], strict=True) if token in JOINED}
    assert sorted(ranks, key=lambda token: -ranks[token]) == JOINED


@pytest.mark.parametrize(
    ("normalizer", "pre_tokenizer", "prefix"),
    [
        (LEGACY, None, True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="always", split=False), True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), True),
        (None, pre_tokenizers.Metaspace(prepend_scheme="never", split=False), False),
        (GEMMA, None, False),
        (GEMMA, pre_tokenizers.Split(" ", "merged_with_previous"), False),
    ],
    ids=["legacy", "always", "first", "never", "gemma without split", "gemma"],
)
def test_spaces_in_front_of_texts(tmp_path: Path, normalizer: Any, pre_tokenizer: Any, prefix: bool) -> None:
    make(normalizer, pre_tokenizer).save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path, 300).words
    assert isinstance(found, Pieces)
    assert found.space_prefix is prefix


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (make(normalizers.Sequence([LEGACY, normalizers.Lowercase()])), "it changes texts by"),
        (make(normalizers.Prepend("▁")), "it changes texts by"),
        (make(None), "it changes texts by None and cuts them by None"),
        (make(None, pre_tokenizers.Metaspace(split=True)), "it changes texts by None and cuts them by .*Metaspace"),
        (make(None, pre_tokenizers.Metaspace(replacement="_", split=False)), "it changes texts by None"),
        (make(LEGACY, pre_tokenizers.Digits()), ".*and cuts them by .*Digits"),
        (make(GEMMA, pre_tokenizers.Digits()), ".*and cuts them by .*Digits"),
        (make(GEMMA, pre_tokenizers.Split("t", "isolated")), ".*and cuts them by .*Split"),
        (make(change=lambda c: c["model"].update(ignore_merges=True)), "its model has ignore_merges True"),
        (make(change=lambda c: c["model"]["vocab"].pop("<0x41>")), "1 of the 256 bytes have no token, <0x41> among"),
        (make(change=lambda c: c["model"]["merges"].pop(3)), "it does not join 'th' and 'e', but 'the' is a token"),
        (
            make(change=lambda c: c["model"]["merges"].append(c["model"]["merges"].pop(3))),
            "its merges make 'the' at several ranks",
        ),
    ],
    ids=["lowercase", "prepend", "nothing", "split", "underscore", "legacy digits", "digits", "split at t",
         "ignore merges", "byte", "incomplete", "ranks"],
)  # fmt: skip
def test_what_llama_cpp_would_join_otherwise_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, message: str
) -> None:
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=f"llama.cpp has no tokenizer like it: {message}"):
        read_vocabulary(tmp_path, 300)


def test_special_tokens_need_not_be_joined(tmp_path: Path) -> None:
    make(change=lambda c: c["model"]["vocab"].update({"<": 290, "s>": 291})).save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path, 300)
    assert (found.tokens[1], found.tokens[290], found.tokens[291]) == ("<s>", "<", "s>")
