"""Conversations as tokens of which some are answers: what response-only calibration counts.

A row of a ``.jsonl`` file is either ``messages``, a list of ``{"role": …, "content": …}`` that the tokenizer's chat
template renders, or ``prompt`` and ``response``, two texts that follow each other as they are. Where a template marks
answers with ``{% generation %}``, its marks decide. Elsewhere an answer is what rendering the conversation up to it
adds to the prompt for it, its end-of-turn token included, and prompt and answer are tokenized apart: that is how the
model meets them when it is used.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from llmq.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

Tokens = tuple[list[int], list[bool]]  # ids, and which of them are answer


def check_row(row: dict[str, Any], where: str) -> None:
    """Raise CalibrationError unless `row` has ``messages``, or ``prompt`` and ``response``, in their form."""
    if "messages" in row:
        messages = row["messages"]
        if not (isinstance(messages, list) and messages and all(_is_message(message) for message in messages)):
            raise CalibrationError(f'{where}: "messages" is not a list of objects with texts "role" and "content"')
    elif not (isinstance(row.get("prompt"), str) and isinstance(row.get("response"), str)):
        raise CalibrationError(
            f'{where}: response-only calibration needs "messages", or "prompt" and "response" as texts; '
            f"its fields are {', '.join(row) or '(none)'}"
        )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def tokenize_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, lead: list[int], where: str) -> Tokens:
    """Return the tokens of a row that `check_row` has passed; `lead` starts texts that no template renders.

    Raises:
        CalibrationError: there is no chat template, or it fails on the messages or separates no answer from its prompt.
    """
    if "messages" not in row:
        ids, answer = _tokenize_pieces([(row["prompt"], False), (row["response"], True)], tokenizer)
        return lead + ids, [False] * len(lead) + answer
    messages = row["messages"]
    try:
        if _MARKED.search(tokenizer.get_chat_template()):
            marked: Any = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            return list(marked["input_ids"]), [bool(flag) for flag in marked["assistant_masks"]]
        pieces = _pieces(messages, tokenizer)
    # No template: ValueError. Of a template: its own raise_exception and jinja's errors, for which a third-party
    # library would have to be imported, or what Python raises when it meets messages it was not written for.
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"{where}: the tokenizer's chat template cannot render these messages ({reason}); set chat_template, "
            'or write the rows as "prompt" and "response"'
        ) from error
    return _tokenize_pieces(pieces, tokenizer)


def _pieces(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Return the conversation up to its last answer, cut into texts that are answers and texts that are not.

    An earlier answer that the template renders in another way once more follows (reasoning taken out, say) is not what
    a model would have to produce, and counts as prompt.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return [(_render(messages, tokenizer), False)]
    whole = _render(messages[: answers[-1] + 1], tokenizer)
    pieces: list[tuple[str, bool]] = []
    done = 0
    for i in answers:
        prompt = _render(messages[:i], tokenizer, add_generation_prompt=True) if i else ""
        answered = _render(messages[: i + 1], tokenizer)
        if answered.startswith(prompt) and whole.startswith(answered):
            pieces += [(whole[done : len(prompt)], False), (whole[len(prompt) : len(answered)], True)]
            done = len(answered)
        elif i == answers[-1]:
            raise ValueError("what it renders with the last answer does not start with the prompt for that answer")
    return pieces


def _render(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = False
) -> str:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    assert isinstance(text, str)
    return text


def _tokenize_pieces(pieces: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Return the tokens of texts that follow each other, without special ones, and which are of an answer."""
    ids: list[int] = []
    answer: list[bool] = []
    for text, flag in pieces:
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
        ids += found
        answer += [flag] * len(found)
    return ids, answer
