"""Recognise a dictionary again: a checkpoint records the words that its token ids mean."""

import hashlib
from collections.abc import Mapping
from typing import Any

__all__ = ["DICTIONARY_KEY", "dictionary_problem", "dictionary_record", "recorded_dictionary"]

DICTIONARY_KEY = "moe_dictionary"  # in the main file's extra_state


def dictionary_record(dictionary: Any) -> dict[str, Any]:
    """Describe a dictionary for the checkpoint: its number of words, and a digest of them in order."""
    digest = hashlib.sha256("\n".join(dictionary.symbols).encode())
    return {"num_words": len(dictionary), "sha256": digest.hexdigest()}


def recorded_dictionary(state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Look up what a checkpoint's main file records of its dictionary; None in an older file."""
    record: Mapping[str, Any] | None = state.get("extra_state", {}).get(DICTIONARY_KEY)
    return record


def dictionary_problem(saved: Mapping[str, Any] | None, dictionary: Any) -> str | None:
    """Say in one phrase that a dictionary is not the checkpoint's; None if it is, or the file does not tell.

    Args:
        saved: what ``dictionary_record`` has described, or None in an older file.
        dictionary: of this run's task.
    """
    if not saved or dictionary is None:
        return None
    own = dictionary_record(dictionary)
    if own == dict(saved):
        return None
    if own["num_words"] != saved["num_words"]:
        difference = f"has {saved['num_words']} words in the checkpoint and {own['num_words']} in this run"
    else:
        difference = f"has other words in the checkpoint (sha256 {saved['sha256'][:12]}...) than in this run "
        difference += f"({own['sha256'][:12]}...)"
    return (
        f"the dictionary {difference}, so token ids would mean other words: give the data it was trained with"
    )
