from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmq.errors import SpecError
from llmq_eval.windows import cut_windows, read_windows


@given(st.integers(2, 400), st.integers(1, 50), st.none() | st.integers(1, 12), st.booleans())
def test_windows_stay_inside_and_never_overlap(length: int, seq_len: int, wanted: int | None, spread: bool) -> None:
    ids = torch.arange(length)
    if length < seq_len + 1:
        with pytest.raises(SpecError, match="too few"):
            cut_windows(ids, seq_len=seq_len, windows=wanted, spread=spread)
        return
    found = cut_windows(ids, seq_len=seq_len, windows=wanted, spread=spread)
    starts = [int(window[0]) for window in found]
    assert starts == [i * found.stride for i in range(found.count)]
    assert all(torch.equal(w, torch.arange(s, s + seq_len + 1)) for w, s in zip(found, starts, strict=True))
    assert found.count == len(list(found)) == len(found)
    assert found.stride >= seq_len  # no token is predicted twice
    assert found.tokens == found.count * seq_len
    fit = (length - 1) // seq_len
    assert found.count == (fit if wanted is None else min(wanted, fit))
    if spread:
        assert length - 1 - found.count * found.stride < found.count  # the whole text is covered
    else:
        assert found.stride == seq_len


def test_without_a_number_windows_touch_each_other() -> None:
    found = cut_windows(torch.arange(31), seq_len=10)
    assert (found.count, found.stride) == (3, 10)
    assert [w[0].item() for w in found] == [0, 10, 20]


@pytest.mark.parametrize("options", [{"seq_len": 0}, {"seq_len": 5, "windows": 0}], ids=str)
def test_senseless_sizes_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="both must be at least 1"):
        cut_windows(torch.arange(100), **options)


def test_too_short_a_text_says_what_it_has_and_needs() -> None:
    with pytest.raises(SpecError, match=r"text\.txt: 10 tokens are too few for one window of 10, which needs 11"):
        cut_windows(torch.arange(10), seq_len=10, source="text.txt")


def make_tokenizer(bos: bool) -> Any:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, **{f"w{i}": i for i in range(1, 50)}}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=5)


@pytest.mark.parametrize("bos", [False, True])
def test_the_tokenizer_decides_about_bos_and_it_is_reported(tmp_path: Path, bos: bool) -> None:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(1, 41)), encoding="utf-8")
    found = read_windows(path, make_tokenizer(bos), seq_len=10, windows=2, spread=True)
    assert next(iter(found)).tolist() == (list(range(11)) if bos else list(range(1, 12)))
    assert found.protocol() == {
        "text": str(path),
        "text_tokens": 41 if bos else 40,
        "tokens_scored": 20,
        "windows": 2,
        "seq_len": 10,
        "stride": 20 if bos else 19,
        "bos": bos,
    }


def test_a_missing_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"missing\.txt: cannot be read \(No such file or directory\)"):
        read_windows(tmp_path / "missing.txt", make_tokenizer(False))


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read"):
        read_windows(tmp_path, make_tokenizer(False))


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"ab\xff\xfe")
    with pytest.raises(SpecError, match=r"a\.bin: not UTF-8 text \(byte 2\)"):
        read_windows(tmp_path / "a.bin", make_tokenizer(False))


def test_an_empty_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("", encoding="utf-8")
    with pytest.raises(SpecError, match="0 tokens are too few"):
        read_windows(tmp_path / "a.txt", make_tokenizer(False))
