"""The quicker tokeniser gives the library's own ids, or stands aside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from prfaas.router import byte_bpe
from prfaas.router.byte_bpe import Encode, quick_encoder

K_CORPUS = ["the quick brown fox jumps over the lazy dog, isn't it? 1234567 été naïve   \n\n x=f(a[i]);"] * 20
K_SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
K_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 and Qwen cut a text."""


def train(special: list[Any] = K_SPECIAL) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        K_CORPUS,
        trainers.BpeTrainer(
            vocab_size=380, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made


def as_llama(made: Tokenizer) -> None:
    made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(K_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def quick(made: Tokenizer, folder: Path, change: Callable[[dict[str, Any]], None] = lambda file: None) -> Any:
    path = folder / "tokenizer.json"
    made.save(str(path))
    file = json.loads(path.read_text())
    change(file)
    path.write_text(json.dumps(file))
    return quick_encoder(path, Tokenizer.from_file(str(path)))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Encode, Tokenizer]:
    made = train()
    if request.param == "llama":
        as_llama(made)
    found = quick(made, tmp_path_factory.mktemp("tokenizer"))
    assert found is not None
    return found, made


K_TEXT = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
        st.sampled_from([*K_SPECIAL, *K_CORPUS, " ", "  ", "\n", " \n", "'LL", "'s", "e\u0301", "123456789"]),
    ),
    max_size=8,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(text=K_TEXT)
def test_ids_are_the_librarys(both: tuple[Encode, Tokenizer], text: str) -> None:
    ids, tokenizer = both
    assert ids(text) == tokenizer.encode(text, add_special_tokens=False).ids


def test_a_text_too_long_for_it_goes_the_librarys_way(
    both: tuple[Encode, Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, tokenizer = both
    monkeypatch.setattr(byte_bpe, "K_MAX_CHARACTERS", 10)
    text = "the quick brown fox<|im_end|>"
    assert ids(text) == tokenizer.encode(text, add_special_tokens=False).ids


def without_byte(file: dict[str, Any]) -> None:
    del file["model"]["vocab"]["!"]


def shuffled(file: dict[str, Any]) -> None:
    file["model"]["merges"].reverse()


def unreachable(file: dict[str, Any]) -> None:
    file["model"]["vocab"]["Ġquickest"] = 5000


def greedy(file: dict[str, Any]) -> None:
    file["added_tokens"][2]["lstrip"] = True


def nested(file: dict[str, Any]) -> None:
    file["added_tokens"][2]["content"] = "<s>x"


def lower(file: dict[str, Any]) -> None:
    file["normalizer"] = {"type": "Lowercase"}


def spaced(file: dict[str, Any]) -> None:
    file["pre_tokenizer"]["add_prefix_space"] = True


def dropping(file: dict[str, Any]) -> None:
    file["model"]["dropout"] = 0.5


def holed(file: dict[str, Any]) -> None:
    """Digits are between the words here; the other library would lose them."""
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\s+"}, "behavior": "Isolated", "invert": False}
    last = file["pre_tokenizer"] | {"use_regex": False}
    file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, last]}


@pytest.mark.parametrize(
    "change", [without_byte, shuffled, unreachable, greedy, nested, lower, spaced, dropping, holed]
)
def test_it_stands_aside_for_what_it_does_not_know(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    made = train()
    assert quick(made, tmp_path) is not None
    assert quick(made, tmp_path, change) is None


def test_other_kinds_of_tokenizers_are_left_to_the_library(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    assert quick(made, tmp_path) is None
    normalized = train([AddedToken("<s>", normalized=True, special=False)])
    as_llama(normalized)
    assert quick(normalized, tmp_path) is None
    assert quick_encoder(tmp_path / "none.json", made) is None
