"""A tokenizer as llama.cpp has it: its tokens and what joins them; of byte-level ones, the rule that cuts words first.

That rule cannot be written into the file: it is one of those that llama.cpp has built in. A tokenizer whose rule is
none of them is refused, since every text would be cut wrongly without a word of warning. Tokenizers that cut no words
are in `llmq.exports.sentencepiece`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmq.errors import SpecError
from llmq.exports import sentencepiece
from llmq.exports.sentencepiece import UnknownError

if TYPE_CHECKING:
    import gguf
    from transformers import PreTrainedTokenizerBase

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of tokens

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# steps of the rule, and whether whole words that are tokens are taken without merging -> llama.cpp's name
_RULES = {
    (("words of GPT-2",), False): "gpt-2",
    (("digits", "words of GPT-2"), False): "smollm",
    ((f"split {_WORDS % '{1,3}'}", "bytes"), True): "llama-bpe",
    ((f"split {_WORDS % '{1,3}'}", "bytes"), False): "smaug-bpe",
    ((f"split {_WORDS % ''}", "bytes"), False): "qwen2",
}
_SPECIAL = ("bos", "eos", "unk", "pad")


@dataclass(frozen=True)
class Words:
    """Byte-level BPE inside of words."""

    rule: str  # llama.cpp's name of what cuts words
    merges: list[str]

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add it to the metadata."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.rule)
        writer.add_token_merges(self.merges)


@dataclass(frozen=True)
class Pieces:
    """BPE of characters in whole texts."""

    scores: list[float]
    space_prefix: bool

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add it to the metadata."""
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(self.scores)
        writer.add_add_space_prefix(self.space_prefix)


@dataclass(frozen=True)
class Vocabulary:
    """What the metadata says of a tokenizer."""

    tokens: list[str]
    types: list[int]
    words: Words | Pieces
    special: dict[str, int]  # kind to token
    add_bos: bool  # before every text
    add_eos: bool
    template: str | dict[str, str] | None  # of chats

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add it to the metadata."""
        self.words.describe(writer)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        for kind, token in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if isinstance(self.template, str):
            writer.add_chat_template(self.template)
        elif self.template:
            writer.add_chat_template([{"name": name, "template": text} for name, text in self.template.items()])


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Return the vocabulary of a checkpoint folder whose embedding has `size` rows.

    Raises:
        SpecError: there is no tokenizer that transformers can load without the folder's own code, or llama.cpp has none
            that cuts text like it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # the errors of transformers and tokenizers share no base class
        raise SpecError(
            f"{folder}: no tokenizer to export, put tokenizer.json there: {' '.join(str(error).split())[:200]}"
        ) from error
    try:
        tokens, types = _tokens(content, size, tokenizer.unk_token)
        words = _pieces(content, tokens) if sentencepiece.is_sentencepiece(content) else _words(content, tokens)
        add_bos, add_eos = _added(tokenizer)
    except UnknownError as error:
        raise SpecError(
            f"{folder / 'tokenizer.json'}: llama.cpp has no tokenizer like it: {error}; it would cut texts wrongly"
        ) from error
    special = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in _SPECIAL}
    return Vocabulary(
        tokens,
        types,
        words,
        {kind: token for kind, token in special.items() if token is not None},
        add_bos,
        add_eos,
        tokenizer.chat_template,
    )


def _pieces(content: dict[str, Any], tokens: list[str]) -> Pieces:
    """Return how a tokenizer of the SentencePiece kind joins characters."""
    return Pieces(sentencepiece.scores(content, tokens), sentencepiece.space_prefix(content))


def _words(content: dict[str, Any], tokens: list[str]) -> Words:
    """Return how a byte-level tokenizer cuts words and joins bytes."""
    rule = _rule(content)
    if missing := _byte_letters() - set(tokens):
        raise UnknownError(f"{len(missing)} of the 256 bytes have no token, {min(missing)!r} among them")
    return Words(rule, [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]])


def _rule(content: dict[str, Any]) -> str:
    """Return llama.cpp's name of the rule that cuts text into words."""
    model, normalizer = content["model"], content.get("normalizer")
    if model["type"] != "BPE":
        raise UnknownError(f"its model is {model['type']}, llmq exports BPE")
    for trait in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(trait):
            raise UnknownError(f"its model has {trait} {model[trait]!r}")
    # llama.cpp normalizes nothing: a text that is not in this form already, which few are, gives other tokens
    if normalizer is not None and normalizer != {"type": "NFC"}:
        raise UnknownError(f"it normalizes texts by {normalizer.get('type')}")
    steps = _steps(content.get("pre_tokenizer") or {"type": "none"})
    ignore_merges = bool(model.get("ignore_merges"))
    if (steps, ignore_merges) not in _RULES:
        words = ", whole words first" if ignore_merges else ""
        raise UnknownError(f"it cuts texts by {'; '.join(steps)}{words}")
    return _RULES[steps, ignore_merges]


def _steps(pre_tokenizer: dict[str, Any]) -> tuple[str, ...]:
    """Return the steps in which texts are cut, each in words."""
    kind = pre_tokenizer["type"]
    if kind == "Sequence":
        return tuple(step for part in pre_tokenizer["pretokenizers"] for step in _steps(part))
    if kind == "ByteLevel" and not pre_tokenizer.get("add_prefix_space"):
        return ("words of GPT-2" if pre_tokenizer.get("use_regex", True) else "bytes",)
    if kind == "Digits" and pre_tokenizer.get("individual_digits"):
        return ("digits",)
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer.get("invert"):
        return (f"split {pre_tokenizer['pattern'].get('Regex')}",)
    return (json.dumps(pre_tokenizer, ensure_ascii=False),)


def _tokens(content: dict[str, Any], size: int, unknown: str | None) -> tuple[list[str], list[int]]:
    """Return the tokens by number and their types; numbers without a token get one that no text has."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    types = [UNUSED] * size
    added = {token["id"]: token for token in content["added_tokens"]}
    vocabulary = {number: text for text, number in content["model"]["vocab"].items()}
    pieces = sentencepiece.is_sentencepiece(content)
    largest = max([*added, *vocabulary])
    if largest >= size:
        raise UnknownError(f"token {largest} has no row in the embedding of {size}")
    for number, text in vocabulary.items():
        tokens[number], types[number] = text, BYTE if pieces and sentencepiece.is_byte(text) else NORMAL
    for number, token in added.items():
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise UnknownError(
                f"token {token['content']!r} takes spaces around it along, or stands for whole words only"
            )
        tokens[number], types[number] = token["content"], CONTROL if token["special"] else USER_DEFINED
        if pieces and token["content"] == unknown:
            types[number] = UNKNOWN
    return tokens, types


def _byte_letters() -> set[str]:
    """Return the letters that stand for the 256 bytes in byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Return whether a text gets a first and a last token of its own."""
    plain, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    for before in ([], [tokenizer.bos_token_id]):
        for after in ([], [tokenizer.eos_token_id]):
            if full == before + plain + after:
                return bool(before), bool(after)
    raise UnknownError(f"it turns the tokens {plain} into {full}, and not by its bos and eos tokens")
