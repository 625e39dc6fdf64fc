"""Extended tokenizers produce all they were given, and leave old texts alone."""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.applications.colossal_llama.conftest import (
    CHINESE,
    TEMPLATE,
    chinese,
    english,
    write_jsonl,
    write_sentencepiece,
)

KINDS = ["sentencepiece", "byte-level"]
TEXTS = st.text(st.sampled_from([*"abc thecold,.!?\n 12", *"".join(CHINESE), "，", "é", "😀", "ß"]), max_size=40)


def load(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


@pytest.fixture(scope="module")
def pairs(tokenizers, extended):
    """(old, new) tokenizers by kind, as transformers loads them."""
    return {kind: (load(tokenizers[kind]), load(extended[kind]["settings"]["output"])) for kind in KINDS}


def new_pieces(old, new) -> dict[str, int]:
    return {piece: token for piece, token in new.get_vocab().items() if piece not in old.get_vocab()}


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def slow_merges(words: list[tuple[int, ...]], count: int, minimum: int) -> list:
    """Sennrich et al., algorithm 1, with everything counted anew each time; of equals the pair of lower tokens."""
    words, merges = [[(token,) for token in word] for word in words], []
    order: dict[tuple, int] = {}
    while len(merges) < count:
        pairs = Counter()
        for word in words:
            pairs.update(pairwise(word))
        rank = lambda part: part[0] if len(part) == 1 else 1000 + order[part]  # noqa: E731
        best = min(pairs, key=lambda pair: (-pairs[pair], rank(pair[0]), rank(pair[1])), default=None)
        if best is None or pairs[best] < minimum:
            break
        merges.append((list(best[0]), list(best[1])))
        order.setdefault(best[0] + best[1], len(order))
        words = [apply(word, best) for word in words]
    return merges


def apply(word: list, pair: tuple) -> list:
    done, i = [], 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            done.append(word[i] + word[i + 1])
            i += 2
        else:
            done.append(word[i])
            i += 1
    return done


@given(st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=8).map(tuple), max_size=20), st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_learned_merges_equal_those_of_the_plain_algorithm(words, count):
    from colossal_llama.tokenizer.bpe_training import continue_merges

    learned = continue_merges(words, 6, count, 2)
    assert [tuple(pair) for pair in slow_merges(words, count, 2)] == [tuple(pair) for pair in learned]


@pytest.mark.parametrize("kind", KINDS)
def test_no_piece_is_dead(kind, pairs, extended):
    """PITFALL 38."""
    old, new = pairs[kind]
    pieces = new_pieces(old, new)
    assert 20 < len(pieces) <= 120
    whole = {piece: text for piece in pieces if "\ufffd" not in (text := new.backend_tokenizer.decoder.decode([piece]))}
    for piece, text in whole.items():
        assert any(pieces[piece] in ids(new, context + text) for context in ("", "\n", "a", "a ")), piece
    for piece in pieces.keys() - whole.keys():
        assert [part.value for part in new.backend_tokenizer.model.tokenize(piece)] == [piece]
    assert extended[kind]["dead"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_new_pieces_are_used_and_shorten_the_texts(kind, pairs, extended):
    old, new = pairs[kind]
    texts = [chinese(seed) for seed in range(1000, 1050)]
    before, after = ([token for text in texts for token in ids(tokenizer, text)] for tokenizer in (old, new))
    assert len(after) < 0.5 * len(before)
    assert extended[kind]["tokens_per_character_after"] < 0.5 * extended[kind]["tokens_per_character_before"]
    words = [word for word in CHINESE if len(word) > 2 and any(word in new.decode([token]) for token in set(after))]
    assert "图书馆" in words, "words of three characters are where merges were missing"


@pytest.mark.parametrize("kind", KINDS)
@given(st.text(st.characters(max_codepoint=127), max_size=60))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_texts_without_new_characters_have_the_same_tokens(kind, pairs, text):
    old, new = pairs[kind]
    assert ids(old, text) == ids(new, text)


@pytest.mark.parametrize("kind", KINDS)
@given(TEXTS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_decoding_gives_what_it_gave(kind, pairs, text):
    old, new = pairs[kind]
    assert new.decode(ids(new, text)) == old.decode(ids(old, text))
    if kind == "byte-level":
        assert new.decode(ids(new, text)) == text


@given(TEXTS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_byte_level_text_has_its_old_tokens_with_the_new_merges_applied(pairs, text):
    old, new = (tokenizer.backend_tokenizer for tokenizer in pairs["byte-level"])
    read = lambda tokenizer: [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]  # noqa: E731
    merges = read(new)[len(read(old)) :]
    expected = []
    for word, _ in old.pre_tokenizer.pre_tokenize_str(text):
        parts = [part.value for part in old.model.tokenize(word)]
        for pair in merges:
            parts = apply(parts, pair)
        expected += parts
    assert new.encode(text, add_special_tokens=False).tokens == expected


@pytest.mark.parametrize("kind", KINDS)
def test_old_ids_special_tokens_and_template_stay(kind, pairs):
    old, new = pairs[kind]
    vocabulary = new.get_vocab()
    assert all(vocabulary[piece] == token for piece, token in old.get_vocab().items())
    assert sorted(new_pieces(old, new).values()) == list(range(len(old), len(new)))
    assert new.special_tokens_map == old.special_tokens_map
    assert new.chat_template == TEMPLATE
    assert new.encode(f"a{old.eos_token}b") == old.encode(f"a{old.eos_token}b")
    assert len(new.get_added_vocab()) == len(old.get_added_vocab()), "pieces are vocabulary, not added tokens"


def test_sentencepiece_and_tokenizers_agree(extended):
    """PITFALL 41."""
    import sentencepiece
    from tokenizers import Tokenizer

    folder = Path(extended["sentencepiece"]["settings"]["output"])
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    texts = [chinese(seed) for seed in range(2000, 2100)]
    assert [processor.encode(text) for text in texts] == [
        encoding.ids for encoding in fast.encode_batch(texts, add_special_tokens=False)
    ]
    assert extended["sentencepiece"]["agrees_after"]["sentencepiece"].different == 0


def test_the_json_equals_what_transformers_makes_of_the_extended_sentencepiece_model(extended, tmp_path):
    folder = Path(extended["sentencepiece"]["settings"]["output"])
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    written, made = load(folder), load(tmp_path)
    texts = [chinese(seed) for seed in range(2000, 2100)] + [english(1)]
    assert [ids(written, text) for text in texts] == [ids(made, text) for text in texts]


def test_sentencepiece_scores_stay_in_order_where_float32_is_coarse(tokenizers):
    from colossal_llama.tokenizer.sentencepiece_model import extend_model
    from colossal_llama.tokenizer.tokenizer_folder import open_tokenizer

    source = open_tokenizer(tokenizers["sentencepiece"])
    source.model.pieces[300].score = -1e9  # as Mistral's
    for letter in "人工智能":
        source.vocabulary.add(letter)
    extended = type(source.model).FromString(extend_model(source.model, source.vocabulary))
    scores = [piece.score for piece in extended.pieces][-4:]
    assert -1e9 > scores[0] > scores[1] > scores[2] > scores[3]


def test_ids_agree_where_tokens_were_added_behind_the_sentencepiece_model(tokenizers, corpus, tmp_path):
    import sentencepiece

    from colossal_llama.extend_tokenizer import main

    tokenizer = load(tokenizers["sentencepiece"])
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(tmp_path / "padded")
    (tmp_path / "padded" / "tokenizer.model").write_bytes(
        (Path(tokenizers["sentencepiece"]) / "tokenizer.model").read_bytes()
    )
    flags = ["--tokenizer", str(tmp_path / "padded"), "--corpus", corpus, "--output", str(tmp_path / "out")]
    assert main([*flags, "--size", "60"]) == 0
    new = load(tmp_path / "out")
    assert new.pad_token_id == len(tokenizer) - 1
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    assert processor.encode(chinese(5)) == ids(new, chinese(5))


def test_only_characters_of_the_chosen_scripts_change_a_text(tokenizers, corpus, tmp_path):
    from colossal_llama.extend_tokenizer import ExtendConfig, extend

    for kind in KINDS:
        output = str(tmp_path / kind)
        extend(ExtendConfig(tokenizer=tokenizers[kind], output=output, corpus=[corpus], characters=["han"], size=90))
        old, new = load(tokenizers[kind]), load(output)
        for text in ("，。", "“quoted”", "《é》、「」", "ーカ㌀"):
            assert ids(old, text) == ids(new, text)
        assert ids(old, "学习") != ids(new, "学习")
        assert "，" not in new.get_vocab()


def test_a_domain_is_learned_from_any_characters(tokenizers, tmp_path):
    from colossal_llama.extend_tokenizer import ExtendConfig, extend

    corpus = write_jsonl(tmp_path / "a.jsonl", [{"text": "pneumonoultra hepatocyte " * 3}] * 20)
    for kind in KINDS:
        output = str(tmp_path / kind)
        extend(ExtendConfig(tokenizer=tokenizers[kind], output=output, corpus=[corpus], characters=["any"], size=50))
        assert len(ids(load(output), "a hepatocyte")) == len(ids(load(tokenizers[kind]), "a")) + 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dead", ["reach", "drop", "keep"])
def test_given_pieces_are_reached_dropped_or_reported(kind, dead, tokenizers, tmp_path):
    """The original's way is "keep": words of three characters and more are never produced."""
    from colossal_llama.extend_tokenizer import ExtendConfig, extend

    wanted = ["图书馆", "机器学习", "机", "器", "图", "书", "馆", "学", "习", "学习"]
    if kind == "byte-level":
        wanted.append("qz")  # two tokens, so that one merge is enough
    pieces = write_jsonl(tmp_path / "p.jsonl", [{"piece": piece} for piece in wanted])
    output = str(tmp_path / "out")
    report = extend(ExtendConfig(tokenizer=tokenizers[kind], output=output, pieces=pieces, dead=dead))
    new = load(output)
    single = [piece for piece in wanted if ids(new, "\n" + piece)[-1] in tokens_with(new, piece)]
    if dead == "reach":
        assert single == wanted
        assert report["dropped"] == []
    else:
        assert "图书馆" not in single and "机器学习" not in single
        assert set(report["dead"]) >= {symbols(new, "图书馆", kind), symbols(new, "机器学习", kind)}
        assert (symbols(new, "图书馆", kind) in new.get_vocab()) == (dead == "keep")
    assert ("学习" if kind == "sentencepiece" else "qz") in single, "a pair of pieces is reachable as it is"


def symbols(tokenizer, text: str, kind: str) -> str:
    if kind == "sentencepiece":
        return text
    return tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)[0][0]


def tokens_with(tokenizer, text: str) -> set[int]:
    """The ids of pieces that stand for the whole text."""
    decode = tokenizer.backend_tokenizer.decoder.decode
    return {token for piece, token in tokenizer.get_vocab().items() if decode([piece]).strip() == text}


def test_a_piece_that_the_tokenizer_splits_is_dropped_and_named(tokenizers, tmp_path):
    from colossal_llama.extend_tokenizer import ExtendConfig, extend

    pieces = write_jsonl(tmp_path / "p.jsonl", [{"piece": "学习"}, {"piece": "学 习"}])
    settings = ExtendConfig(tokenizer=tokenizers["byte-level"], output=str(tmp_path / "out"), pieces=pieces)
    assert len(extend(settings)["dropped"]) == 1


def refusal(flags: list[str], capsys) -> str:
    from colossal_llama.extend_tokenizer import main

    assert main([*flags, "--progress", "off"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize("name", ["WordPiece", "Unigram", "WordLevel"])
def test_other_kinds_of_tokenizer_are_refused(name, corpus, tmp_path, capsys):
    from tokenizers import Tokenizer, models

    model = {
        "WordPiece": lambda: models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"),
        "Unigram": lambda: models.Unigram([("a", 0.0)]),
        "WordLevel": lambda: models.WordLevel({"a": 0}, unk_token="a"),
    }[name]()
    (tmp_path / "in").mkdir()
    Tokenizer(model).save(str(tmp_path / "in" / "tokenizer.json"))
    output = tmp_path / "out"
    error = refusal(["--tokenizer", str(tmp_path / "in"), "--corpus", corpus, "--output", str(output)], capsys)
    assert f"has a {name} tokenizer" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_character_bpe_and_a_sentencepiece_unigram_are_refused(corpus, tmp_path, capsys):
    from tokenizers import Tokenizer, models

    (tmp_path / "in").mkdir()
    Tokenizer(models.BPE({"a": 0, "b": 1}, [])).save(str(tmp_path / "in" / "tokenizer.json"))
    flags = ["--corpus", corpus, "--output", str(tmp_path / "out"), "--tokenizer"]
    assert "neither byte-level" in refusal([*flags, str(tmp_path / "in")], capsys)
    folder = write_sentencepiece(tmp_path / "unigram", "unigram", 300)
    assert "nigram" in refusal([*flags, folder], capsys)


def test_bad_input_is_named_and_leaves_nothing(tokenizers, corpus, tmp_path, capsys):
    output, bad = tmp_path / "out", tmp_path / "bad.txt"
    flags = ["--tokenizer", tokenizers["byte-level"], "--output", str(output)]
    bad.write_bytes(b"fine\n\xff\n")
    assert "bad.txt:2 is not UTF-8" in refusal([*flags, "--corpus", corpus, str(bad)], capsys)
    bad.write_bytes(b"")
    assert "bad.txt holds no text" in refusal([*flags, "--corpus", str(bad)], capsys)
    assert "does not exist" in refusal(["--tokenizer", "gone", "--output", str(output), "--corpus", corpus], capsys)
    assert "Nothing to add" in refusal(flags, capsys)
    assert "--min_frequency is 0" in refusal([*flags, "--corpus", corpus, "--min_frequency", "0"], capsys)
    assert "--characters 'klingon'" in refusal([*flags, "--corpus", corpus, "--characters", "klingon"], capsys)
    assert "No piece was added" in refusal([*flags, "--corpus", corpus, "--min_frequency", "999999"], capsys)
    assert list(tmp_path.iterdir()) == [bad]
    output.mkdir()
    assert "out exists" in refusal([*flags, "--corpus", corpus], capsys)
    assert list(output.iterdir()) == []


def test_a_torn_tokenizer_file_is_named(corpus, tmp_path, capsys):
    flags = ["--corpus", corpus, "--output", str(tmp_path / "out"), "--tokenizer", str(tmp_path)]
    for text in ("{", "[]", '{"model": null}'):
        (tmp_path / "tokenizer.json").write_text(text)
        assert "tokenizer.json is not a file of the tokenizers library" in refusal(flags, capsys)


def test_real_chinese_leaves_english_alone(tokenizers, real_texts, tmp_path):
    from colossal_llama.extend_tokenizer import ExtendConfig, extend

    report = extend(
        ExtendConfig(
            tokenizer=tokenizers["sentencepiece"],
            output=str(tmp_path / "out"),
            corpus=[str(real_texts / "zh_classics.jsonl")],
            old_text=[str(real_texts / "en_wiki_demo.jsonl")],
            characters=["han"],
            size=3000,
            min_frequency=3,
        )
    )
    assert report["dead"] == [] and report["new_size"] - report["old_size"] > 2000
    assert report["unchanged_lines_without_new_characters"].different == 0
    assert report["agrees_after"]["sentencepiece"].different == 0
    assert report["tokens_per_character_after"] < 0.5 * report["tokens_per_character_before"]
