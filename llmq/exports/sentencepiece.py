"""Tokenizers of the SentencePiece kind (Llama 2, Mistral, Gemma): BPE of characters, bytes for those without a token.

transformers has such a tokenizer as a list of merges by rank, llama.cpp as a score per token: of all neighbours that
together are a token, those with the highest score are joined first. The two are the same procedure if the merges name
every way to halve a token, and all ways to make one token stand next to each other in the list. That is how merges are
derived from a SentencePiece model; lists of other origin are checked for it, and refused.
"""

from __future__ import annotations

from typing import Any

SPACE = "▁"
_BYTES = {f"<0x{number:02X}>" for number in range(256)}


class UnknownError(Exception):
    """A trait of a tokenizer that llama.cpp does not have."""


def is_sentencepiece(content: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json is of this kind."""
    return content["model"]["type"] == "BPE" and bool(content["model"].get("byte_fallback"))


def space_prefix(content: dict[str, Any]) -> bool:
    """Return whether a text gets a space in front.

    llama.cpp puts another one behind every special token in a text, as tokenizers with `prepend_scheme` "always" do.
    Those with "first" do not; texts without special tokens are the same for both.

    Raises:
        UnknownError: texts are changed or cut in another way than by turning spaces into ▁.
    """
    normalizer, cutter = content.get("normalizer"), content.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    if cutter is None and steps == [{"type": "Prepend", "prepend": SPACE}, replaced]:
        return True
    if steps == [replaced]:  # after which there is no space to cut at
        uncut = cutter is None or (cutter["type"] == "Split" and cutter["pattern"] == {"String": " "})
        if uncut:
            return False
    if not steps and cutter is not None and cutter["type"] == "Metaspace" and not cutter.get("split", True):
        scheme = cutter.get("prepend_scheme", "always")
        if cutter.get("replacement") == SPACE and scheme in ("always", "first", "never"):
            return bool(scheme != "never")
    raise UnknownError(f"it changes texts by {normalizer} and cuts them by {cutter}")


def scores(content: dict[str, Any], tokens: list[str]) -> list[float]:
    """Return the score of each of `tokens`, higher for those that are made earlier.

    Raises:
        UnknownError: no scores make llama.cpp join tokens in the order of the merges.
    """
    model = content["model"]
    for trait in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(trait):
            raise UnknownError(f"its model has {trait} {model[trait]!r}")
    if missing := _BYTES - set(tokens):
        raise UnknownError(f"{len(missing)} of the 256 bytes have no token, {min(missing)} among them")
    merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
    order: dict[str, int] = {}  # token to how many are made before it
    last = None
    for left, right in merges:
        made = left + right
        if made != last and made in order:
            raise UnknownError(f"its merges make {made!r} at several ranks")
        order.setdefault(made, len(order))
        last = made
    known = set(merges)
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    vocabulary = set(model["vocab"])
    for token in vocabulary - special - _BYTES:
        halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        for half in halves:
            if half not in known and vocabulary.issuperset(half):
                raise UnknownError(f"it does not join {half[0]!r} and {half[1]!r}, but {token!r} is a token")
    return [-float(order.get(token, 0)) for token in tokens]


def is_byte(token: str) -> bool:
    """Return whether a token stands for one byte."""
    return token in _BYTES
