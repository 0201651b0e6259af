"""Which special tokens stand before a text, and greedy answers of prompts that go through a model together."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.data import Dictionary
from torch import Tensor, nn

from fairseq_moe.data.identity_dictionary import IdentityDictionary, IdentityLine
from fairseq_moe.errors import MoEError
from fairseq_moe.evaluation_harness.generation import continue_greedily
from fairseq_moe.evaluation_harness.text import ConvertedText, DictionaryText

WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "to": 3, "be": 4}


def _converted(
    folder: Path, *, template: str = "", bos: int | None = 1, eos: int | None = 2
) -> ConvertedText:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if template:
        special = [(word, WORDS[word]) for word in ("<s>", "</s>")]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    line = IdentityLine(vocab_size=5, bos=bos, eos=eos)
    return ConvertedText(IdentityDictionary(line), folder / "tokenizer.json")


@pytest.mark.parametrize(
    ("template", "config", "begins"),
    [
        ("", None, False),
        ("<s> $A", None, True),
        ("<s> $A </s>", None, True),
        ("$A </s>", None, False),
        ("<s> $A", {"add_bos_token": False}, False),
        ("", {"add_bos_token": True}, True),
        ("<s> $A", {"add_bos_token": None}, True),
    ],
)
def test_prompts_begin_as_the_files_of_the_tokenizer_say(
    template: str, config: dict[str, Any] | None, begins: bool, tmp_path: Path
) -> None:
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = _converted(tmp_path, template=template)
    assert text.begins is begins
    assert text.encode("to be") == [3, 4], "no special token, whatever the template says"
    assert (text.decode([1, 3, 4, 2]), text.word(2)) == ("to be", "</s>")


def test_a_model_without_a_beginning_token_begins_behind_the_end(tmp_path: Path) -> None:
    text = _converted(tmp_path, template="<s> $A", bos=None)
    assert (text.beginning, text.begins) == (2, False)
    with pytest.raises(MoEError, match="names no end token"):
        _converted(tmp_path, eos=None)


@pytest.mark.parametrize("adds", [True, False])
def test_fairseqs_dictionary_adds_no_end_and_begins_as_the_model_was_trained(adds: bool) -> None:
    dictionary = Dictionary()
    words = [dictionary.add_symbol(word) for word in ("to", "be")]
    text = DictionaryText(dictionary, SimpleNamespace(tokenizer=None, bpe=None, task={"add_bos_token": adds}))
    assert text.encode("to be or") == [*words, dictionary.unk()]
    assert text.decode([dictionary.eos(), *words, dictionary.eos()]) == "to be"
    assert text.begins is adds
    assert text.beginning == (dictionary.bos() if adds else dictionary.eos())


class _Adder(nn.Module):
    """Follows each text with (7 times its sum plus its length) modulo 11, from a state that must be reordered."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, ids: Tensor, incremental_state: dict[str, Tensor]) -> tuple[Tensor, None]:
        last = ids[:, -1]
        incremental_state["sum"] = incremental_state.get("sum", torch.zeros_like(last)) + last
        following = (7 * incremental_state["sum"] + ids.shape[1]) % 11
        return nn.functional.one_hot(following, 11)[:, None].float(), None

    def reorder_incremental_state_scripting(self, state: dict[str, Tensor], order: Tensor) -> None:
        state["sum"] = state["sum"][order]


def test_prompts_together_are_continued_as_each_alone() -> None:
    prompts = [[1], [2, 3, 4, 5, 6], [3, 9], [8, 1, 1], [5, 5], [0, 7, 7, 7]]

    def alone(prompt: list[int]) -> list[int]:
        new: list[int] = []
        while len(new) < 6 and 9 not in new:
            text = [*prompt, *new]
            following = (7 * sum(text) + len(text)) % 11
            if following == 4:
                break
            new.append(following)
        return new

    expected = [alone(prompt) for prompt in prompts]
    assert len({len(answer) for answer in expected}) > 2, "answers end at different times"
    found = continue_greedily(_Adder(), prompts, num_new=6, end=4, is_done=lambda new: 9 in new)
    assert found == expected
