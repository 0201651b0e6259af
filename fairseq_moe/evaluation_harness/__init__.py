"""How does lm-evaluation-harness score and question a checkpoint of ours? As its model ``fairseq_moe``.

``loading`` finds model and tokenizer, ``text`` turns text into ids and back with the special tokens that the model was
trained with, ``generation`` continues prompts, and ``model`` is what the harness calls. Nothing else imports this
folder, because it needs the extra ``eval``.

Tests: tests/e2e/test_evaluation_harness.py, tests/unit/evaluation_harness.
"""
