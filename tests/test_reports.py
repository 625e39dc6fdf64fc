"""Every fault that people's files and models brought to light has a test that names it: "REPORT n" in its docstring.

The page is written with that of the pitfalls, by `python tests/test_pitfalls.py`.
"""

from tests.test_pitfalls import named_tests

REPORTS = {
    1: "a save that fails at the last step loses the training",
    2: "adapters that were not trained on a bare trunk lose their head, or are random",
    3: "trained tensors that are no LoRA matrices are missing from checkpoints",
    4: "an exported model keeps an EOS that its tokenizer no longer ends with",
    5: "a model whose attention is soft-capped runs without the cap",
    6: "merging an adapter of tied embeddings changes the model",
    7: "templates that open a thought in the generation prompt are refused, or lose it",
    8: "fields of a message or a row that nobody reads vanish",
    9: "special tokens that carry content are stripped from what rewards read",
    10: "a right choice in a box or a sentence scores 0",
    11: "a number is misread, or a part of it paid for",
    12: "the question's own expression is paid for",
    13: "a right program inside half a fence scores 0",
    14: "answers that differ in sign, point or operator are equal",
    15: "right answers that are objects or lists are read for a number",
    16: "a row's log-probs depend on its neighbors' lengths",
    17: "adapters on a quantized model can't be exported",
    18: "mixtures of experts crash in sampling, or draw noise in training",
    19: "rows longer than the table of positions crash after the first step",
    20: "a resumed run with other settings is silent",
    21: "a vocabulary extended twice suppresses its own tokens",
    22: "columns of a prompt row are taken for another format, or vanish",
    23: "nulls inside structs",
    24: "data files in other containers and encodings",
    25: "common names of fields and roles are unknown",
    26: "YAML words mean something else than the file says",
    27: "numbers without sense are accepted",
    28: "files and layouts that fail with a traceback",
    29: "templates that mark a response in several pieces, or take arguments",
    30: "a reward that skips responses, or has another signature",
    31: "a run that failed at once blocks the corrected command",
    32: "warnings of newer libraries",
    33: "attributes and errors of TRL's value-head models",
}


def test_every_report_has_a_test_that_names_it():
    named = named_tests("REPORT").keys()
    assert sorted(REPORTS.keys() - named) == [], "no test names these"
    assert sorted(named - REPORTS.keys()) == [], "tests name these"
