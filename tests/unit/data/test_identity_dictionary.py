"""The identity dictionary, the tokenizer behind --bpe, and text that becomes data for a converted model."""

import io
import sys
from pathlib import Path

import pytest
import torch
from fairseq.data import Dictionary, data_utils
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from fairseq_moe.convert.cli import main
from fairseq_moe.data.hf_bpe import HFTokenizersBPE, HFTokenizersConfig
from fairseq_moe.data.identity_dictionary import IdentityDictionary, identity_of, load_identity
from fairseq_moe.data.tokenizer import encode_lines, load_tokenizer
from fairseq_moe.errors import CheckpointError, MoEError
from tests.helpers.byte_tokenizer import write_byte_model

TEXT = ["To be, or not to be: that is the question.", "", "Whether 'tis nobler in the mind to suffer"] * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What from-hf leaves for preprocess: dict.txt and hf/tokenizer.json, of 300 byte-level tokens."""
    return write_byte_model(tmp_path_factory.mktemp("model"), TEXT)


def test_words_are_ids_and_padding_is_none_of_them(model: Path) -> None:
    dictionary = load_identity(model / "dict.txt")
    assert dictionary is not None
    assert (len(dictionary), dictionary.bos(), dictionary.eos(), dictionary.pad()) == (300, 0, 1, 300)
    assert [dictionary.index(str(token)) for token in range(300)] == list(range(300))
    assert dictionary.string(torch.tensor([7, 2, 3])) == "7 2 3"
    assert dictionary.encode_line("0 1 2 3", append_eos=False).tolist() == [0, 1, 2, 3]
    with pytest.raises(MoEError, match="the word 'To' is no token id from 0 to 299"):
        dictionary.encode_line("To be")
    written = io.StringIO()
    dictionary.save(written)
    assert written.getvalue() == (model / "dict.txt").read_text()


def test_a_model_without_special_tokens_has_padding_in_their_place(tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text(identity_of(9, {"bos_token_id": None, "eos_token_id": 50279}).text())
    dictionary = load_identity(tmp_path / "dict.txt")
    assert dictionary is not None
    assert (dictionary.bos(), dictionary.eos(), dictionary.unk()) == (9, 9, 9)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("#identity vocab_size=9 bos=9 eos=1", "has bos=9, and its ids end at 8"),
        ("#identity vocab_size=9 bos=- eos=12", "has eos=12, and its ids end at 8"),
        ("#identity vocab_size=0 bos=- eos=-", "has no ids"),
    ],
)
def test_a_special_token_that_is_no_id_is_refused(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "dict.txt").write_text(line + "\n")
    with pytest.raises(CheckpointError) as caught:
        load_identity(tmp_path / "dict.txt")
    assert expected in str(caught.value)


def test_true_is_no_token_id() -> None:
    assert identity_of(9, {"bos_token_id": True, "eos_token_id": [1]}).text() == (
        "#identity vocab_size=9 bos=- eos=1\n"
    )


def test_the_stock_task_loads_either_dictionary(model: Path, tmp_path: Path) -> None:
    found, _ = LanguageModelingTask.setup_dictionary(LanguageModelingConfig(data=str(model)))
    assert isinstance(found, IdentityDictionary)
    (tmp_path / "dict.txt").write_text("word 3\n")
    found, _ = LanguageModelingTask.setup_dictionary(LanguageModelingConfig(data=str(tmp_path)))
    assert type(found) is Dictionary
    assert found.index("word") == 4
    (tmp_path / "dict.txt").write_text("#identity vocab_size=x\n")
    with pytest.raises(CheckpointError, match="which is damaged"):
        LanguageModelingTask.setup_dictionary(LanguageModelingConfig(data=str(tmp_path)))
    with pytest.raises(ValueError, match="Incorrect dictionary format"):  # fairseq without this package
        Dictionary.load(str(model / "dict.txt"))


def test_bpe_gives_back_what_it_was_given(model: Path) -> None:
    bpe = HFTokenizersBPE(HFTokenizersConfig(hf_tokenizer_json=str(model / "hf" / "tokenizer.json")))
    for line in TEXT:
        words = bpe.encode(line)
        assert all(word.isdecimal() for word in words.split())
        assert bpe.decode(words) == line


def test_truncation_and_padding_of_a_tokenizer_do_not_reach_the_data(model: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = model / "hf" / "tokenizer.json"
    whole = encode_lines(load_tokenizer(path), TEXT)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert encode_lines(load_tokenizer(tmp_path / "tokenizer.json"), TEXT) == whole


def test_text_becomes_data_with_the_models_own_ids(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text"
    text.write_text("\n".join(TEXT) + "\n")
    command = ["preprocess", str(model), "--trainpref", str(text), "--validpref", str(text), "--destdir"]
    assert main([*command, str(tmp_path / "data")]) == 0
    bpe = HFTokenizersBPE(HFTokenizersConfig(hf_tokenizer_json=str(model / "hf" / "tokenizer.json")))
    dictionary = load_identity(tmp_path / "data" / "dict.txt")
    data = data_utils.load_indexed_dataset(str(tmp_path / "data" / "valid"), dictionary, "mmap")
    assert len(data) == len(TEXT)
    for item, line in zip(data, TEXT, strict=True):
        assert item.tolist() == [*map(int, bpe.encode(line).split()), 1]
    assert f"train: {sum(len(item) for item in data)} tokens" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "other"), "--no-append-eos", "--prepend-bos"]) == 0
    other = data_utils.load_indexed_dataset(str(tmp_path / "other" / "train"), dictionary, "mmap")
    assert other[0].tolist() == [0, *data[0].tolist()[:-1]]


def test_what_preprocess_cannot_do_is_one_sentence(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(*arguments: str) -> str:
        assert main(["preprocess", str(model), "--destdir", str(tmp_path / "data"), *arguments]) == 2
        assert not (tmp_path / "data").exists()
        return capsys.readouterr().err

    assert "give --trainpref" in error()
    assert "cannot read the text" in error("--trainpref", str(tmp_path / "absent"))
    assert "there is no" in error("--trainpref", "x", "--tokenizer", str(tmp_path / "absent"))
    (tmp_path / "bad.json").write_text("{}")
    assert "cannot read the tokenizer" in error("--trainpref", "x", "--tokenizer", str(tmp_path / "bad.json"))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install tokenizers" in error("--trainpref", "x")


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "dict.txt").write_text(identity_of(200, {"eos_token_id": 1}).text())
    (tmp_path / "hf").symlink_to(model / "hf")
    from fairseq_moe.convert.preprocess import preprocess

    with pytest.raises(MoEError, match="has token id 299, and the model's ids end at 199"):
        preprocess(tmp_path, tmp_path / "data", {"train": [tmp_path / "dict.txt"]})
