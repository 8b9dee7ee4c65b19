import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llmq.calibration import BUNDLED, Calibration, from_token_lists, load_calibration, random_windows
from llmq.errors import CalibrationError, SpecError

WORDS = 1000


def make_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer for which the word "w17" is token 17 and everything unknown is token 0."""
    vocab = {"<unk>": 0, "<s>": WORDS, **{f"w{i}": i for i in range(1, WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", WORDS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a file of 100 different tokens: 1, 2, ..., 100."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in range(1, 101)), encoding="utf-8")
    return path


def load(source: Path | str | None, tokenizer: Any, **changes: int) -> Calibration:
    options = {"num_samples": 4, "seq_len": 9, "seed": 0} | changes
    return load_calibration(None if source is None else str(source), tokenizer, **options)


def test_windows_are_consecutive_tokens_and_never_overlap(text: Path, tokenizer: Any) -> None:
    for seed in range(20):
        found = load(text, tokenizer, num_samples=11, seed=seed)
        assert found.input_ids.shape == (11, 9)
        assert found.input_ids.dtype == torch.int64
        assert (found.input_ids.diff(dim=1) == 1).all()
        assert found.input_ids.unique().numel() == 99


def test_the_offset_reaches_every_place_the_remainder_allows(text: Path, tokenizer: Any) -> None:
    starts = {int(load(text, tokenizer, num_samples=11, seed=s).input_ids.min()) for s in range(40)}
    assert starts == {1, 2}


def test_same_seed_same_windows_other_seed_others(text: Path, tokenizer: Any) -> None:
    first, again, other = (load(text, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.fingerprint == again.fingerprint
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.fingerprint != other.fingerprint
    assert len(first.fingerprint) == 64


def test_packed_windows_have_no_mask_and_count_every_token(text: Path, tokenizer: Any) -> None:
    found = load(text, tokenizer)
    assert found.attention_mask is None
    assert found.tokens == 36
    assert found.source == str(text)


def test_every_window_starts_with_the_bos_that_the_tokenizer_would_write(text: Path) -> None:
    found = load(text, make_tokenizer(bos=True))
    assert found.input_ids.shape == (4, 9)
    assert (found.input_ids[:, 0] == WORDS).all()
    assert (found.input_ids[:, 1:].diff(dim=1) == 1).all()


def test_a_long_text_in_blocks_gives_the_tokens_of_the_whole(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join(f"w{i} w{i + 1}" for i in range(1, 100, 2)), encoding="utf-8")
    whole = load(path, tokenizer)
    monkeypatch.setattr("llmq.calibration._BLOCK_CHARS", 30)
    assert load(path, tokenizer).fingerprint == whole.fingerprint


def test_line_ends_and_byte_order_mark_do_not_matter(tmp_path: Path, tokenizer: Any) -> None:
    plain, windows = tmp_path / "a.txt", tmp_path / "b.txt"
    content = "\n".join(f"w{i}" for i in range(1, 101))
    plain.write_bytes(content.encode())
    windows.write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    assert load(plain, tokenizer).fingerprint == load(windows, tokenizer).fingerprint


def test_the_bundled_text_is_the_default(tokenizer: Any) -> None:
    found = load(None, tokenizer)
    assert found.source == BUNDLED
    assert found.tokens == 36


def test_jsonl_takes_the_text_of_every_line(tmp_path: Path, text: Path, tokenizer: Any) -> None:
    path = tmp_path / "text.jsonl"
    rows = [{"text": f"w{i} w{i + 1}", "id": i} for i in range(1, 100, 2)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert load(path, tokenizer).fingerprint == load(text, tokenizer).fingerprint


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"seq_len": 1}], ids=str)
def test_senseless_sizes_are_refused(text: Path, tokenizer: Any, options: dict[str, int]) -> None:
    with pytest.raises(SpecError, match="--num-samples must be at least 1 and --seq-len at least 2"):
        load(text, tokenizer, **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty\.txt is empty \(0 bytes\)"),
        ("blank.txt", b" \n\n ", r"blank\.txt is empty \(4 bytes\)"),
        ("nul.txt", b"w1 \0 w2", r"nul\.txt is binary \(NUL at byte 3\)"),
        ("latin.txt", b"caf\xe9", r"latin\.txt is not UTF-8 \(0xe9 at byte 3\)"),
        ("empty.jsonl", b"\n", r"empty\.jsonl is empty"),
        ("a.jsonl", b'{"text": "w1"}\n\n{"body": "w2"}', r'a\.jsonl, line 3: no text in a field "text".* body$'),
        ("b.jsonl", b'{"text": 5}', r'b\.jsonl, line 1: no text in a field "text"'),
        ("c.jsonl", b'["w1"]', r"c\.jsonl, line 1: not an object but \"\['w1'\]\""),
        ("d.jsonl", b'{"text": "w1"}\n{"text"', r"d\.jsonl, line 2: not JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and "\\" not in value else "",
)
def test_unusable_files_are_refused(tmp_path: Path, tokenizer: Any, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        load(tmp_path / name, tokenizer)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl"])
def test_a_missing_file_is_refused(tmp_path: Path, tokenizer: Any, name: str) -> None:
    with pytest.raises(CalibrationError, match=rf"{name} does not exist; check the path"):
        load(tmp_path / name, tokenizer)


def test_a_folder_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=r"is a folder; name one text or \.jsonl file"):
        load(tmp_path, tokenizer)


def test_too_short_a_text_says_how_many_tokens_it_has_and_needs(text: Path, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError) as caught:
        load(text, tokenizer, num_samples=5, seq_len=40)
    message = str(caught.value)
    assert "has 100 tokens, and 5 windows of 40 need 200" in message
    assert "lower --num-samples to 2 or less, lower --seq-len to 20 or less" in message


def test_what_too_short_a_text_advises_is_accepted(text: Path, tokenizer: Any) -> None:
    assert load(text, tokenizer, num_samples=2, seq_len=40).tokens == 80
    assert load(text, tokenizer, num_samples=5, seq_len=20).tokens == 100


def test_a_hopelessly_short_text_asks_for_more_text(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.txt").write_text("w1 w2", encoding="utf-8")
    with pytest.raises(CalibrationError, match="has 2 tokens, and 4 windows of 9 need 36; give more text"):
        load(tmp_path / "a.txt", tokenizer)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[tuple[Any, ...]]]:
    """Return a function that makes `datasets.load_dataset` return or raise its argument, and lists the calls."""

    def install(answer: Any) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []

        def load_dataset(name: str, config: str | None = None, *, split: str) -> Any:
            calls.append((name, config, split))
            if isinstance(answer, Exception):
                raise answer
            return answer

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return install


@pytest.mark.parametrize(
    ("source", "call"),
    [("wikitext", ("wikitext", None, "train")), ("org/name:raw-v1", ("org/name", "raw-v1", "train"))],
)
def test_other_names_are_datasets(serve: Any, tokenizer: Any, source: str, call: tuple[Any, ...]) -> None:
    rows = [f"w{i} w{i + 1}" if i % 3 else "" for i in range(1, 200, 2)]
    calls = serve(datasets.Dataset.from_dict({"text": rows}))
    found = load(source, tokenizer)
    assert calls == [call]
    assert found.source == source
    assert found.fingerprint == load(source, tokenizer).fingerprint
    assert found.fingerprint != load(source, tokenizer, seed=1).fingerprint


class LongDataset:
    """A million rows of two tokens that lists which of them were asked for."""

    column_names = ("text",)

    def __init__(self) -> None:
        self.read: list[range] = []

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, rows: slice) -> dict[str, list[str]]:
        self.read.append(range(rows.start, rows.stop))
        return {"text": [f"w{i % 900 + 1} w{i % 900 + 2}" for i in self.read[-1]]}


def test_of_a_long_dataset_only_a_stretch_is_read(serve: Any, tokenizer: Any) -> None:
    starts = set()
    for seed in range(5):
        rows = LongDataset()
        serve(rows)
        # 40 windows of 25 tokens ask for 16 000 characters, which two batches of rows hold
        load("big", tokenizer, num_samples=40, seq_len=25, seed=seed)
        assert [len(batch) for batch in rows.read] == [1000, 1000]
        assert rows.read[0].stop == rows.read[1].start
        starts.add(rows.read[0].start)
    assert len(starts) == 5


def test_a_dataset_is_read_around_its_end(serve: Any, tokenizer: Any) -> None:
    rows = [f"w{i}" for i in range(1, 101)]
    serve(datasets.Dataset.from_dict({"text": rows}))
    for seed in range(10):
        found = load("small", tokenizer, num_samples=11, seed=seed).input_ids
        assert found.unique().numel() == 99
        assert ((found.diff(dim=1) - 1) % 100 == 0).all()  # after w100 comes w1


def test_a_dataset_without_text_column_is_refused(serve: Any, tokenizer: Any) -> None:
    serve(datasets.Dataset.from_dict({"body": ["w1"], "label": [0]}))
    with pytest.raises(CalibrationError, match=r'dataset d: no column "text" \(it has body, label\)'):
        load("d", tokenizer)


@pytest.mark.parametrize("rows", [[], ["", " "]], ids=["no rows", "blank rows"])
def test_an_empty_dataset_is_refused(serve: Any, tokenizer: Any, rows: list[str]) -> None:
    serve(datasets.Dataset.from_dict({"text": rows}))
    with pytest.raises(CalibrationError, match=rf"dataset d is empty \({len(rows)} rows without text\)"):
        load("d", tokenizer)


@pytest.mark.parametrize(
    "reason",
    [
        ConnectionError("Couldn't reach 'd' on the Hub"),
        datasets.exceptions.DatasetNotFoundError("Dataset 'd' doesn't exist"),
        ValueError("BuilderConfig 'x' not found"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_dataset_that_cannot_be_loaded_says_what_to_do(serve: Any, tokenizer: Any, reason: Exception) -> None:
    serve(reason)
    with pytest.raises(CalibrationError) as caught:
        load("d", tokenizer)
    assert str(reason) in str(caught.value)
    assert "check the name, go online once to download it, or name a text file" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_token_lists_are_padded_on_the_right_with_their_mask() -> None:
    # 7 is also a real token: the mask must come from the lengths
    found = from_token_lists([[1, 7], [3, 4, 5, 7], [6]], pad_token_id=7, source="chats")
    assert found.input_ids.tolist() == [[1, 7, 7, 7], [3, 4, 5, 7], [6, 7, 7, 7]]
    assert found.attention_mask is not None
    assert found.attention_mask.dtype == torch.bool
    assert found.attention_mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert found.tokens == 7
    assert found.source == "chats"


def test_the_mask_is_part_of_the_fingerprint() -> None:
    padded = from_token_lists([[1], [2, 3]], pad_token_id=0, source="a")
    full = from_token_lists([[1, 0], [2, 3]], pad_token_id=0, source="a")
    assert full.attention_mask is None
    assert torch.equal(padded.input_ids, full.input_ids)
    assert padded.fingerprint != full.fingerprint


@pytest.mark.parametrize(("lists", "message"), [([], "no calibration samples"), ([[1], []], "sample 1 has no tokens")])
def test_empty_token_lists_are_refused(lists: list[list[int]], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        from_token_lists(lists, pad_token_id=0, source="chats")


# --- windows of random tokens


def test_random_windows_cover_the_vocabulary_and_keep_the_bos() -> None:
    ids = torch.full((16, 256), 7)
    ids[:, 0] = 3
    ids[:, 1:] += torch.arange(255)[None] % 5
    found = random_windows(Calibration(ids, None, "x", "y"), 0.25, 50, seed=0)
    assert found is not None
    assert found.input_ids.shape == (4, 256)
    assert (found.input_ids[:, 0] == 3).all()
    assert set(found.input_ids[:, 1:].flatten().tolist()) == set(range(50))
    again = random_windows(Calibration(ids, None, "x", "y"), 0.25, 50, seed=0)
    other = random_windows(Calibration(ids, None, "x", "y"), 0.25, 50, seed=1)
    assert again is not None
    assert other is not None
    assert torch.equal(found.input_ids, again.input_ids)
    assert not torch.equal(found.input_ids, other.input_ids)


def test_random_windows_begin_anyhow_where_text_does() -> None:
    ids = torch.arange(64).reshape(4, 16)
    found = random_windows(Calibration(ids, None, "x", "y"), 1.0, 1000, seed=0)
    assert found is not None
    assert len(set(found.input_ids[:, 0].tolist())) > 1


@pytest.mark.parametrize(("share", "count"), [(0.0, None), (0.01, 1), (0.5, 4), (1.0, 8)])
def test_share_of_random_windows(share: float, count: int | None) -> None:
    found = random_windows(Calibration(torch.zeros(8, 4, dtype=torch.int64), None, "x", "y"), share, 9, seed=0)
    assert (None if found is None else len(found.input_ids)) == count


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_impossible_share_of_random_windows(share: float) -> None:
    with pytest.raises(SpecError, match="random windows"):
        random_windows(Calibration(torch.zeros(8, 4, dtype=torch.int64), None, "x", "y"), share, 9, seed=0)
