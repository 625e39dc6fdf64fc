"""Scores against slow oracles, and the properties that every score has."""

import itertools
import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coati.rewards.answers import extract_letters, extract_number, to_number
from colossal_eval.scores import metrics as scoring
from colossal_eval.scores.generated_text import same_number, same_text
from colossal_eval.scores.significance import compare, mcnemar, sign_flip

log_probs = st.lists(st.floats(-50, 0), min_size=2, max_size=6)
scores = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=30)
ABCD = list("ABCD")


@pytest.mark.parametrize(
    "text, letters",
    [
        ("The answer is B", "B"),
        ("the answer is (C).", "C"),
        ("答案：B", "B"),
        ("答案是 C。", "C"),
        ("故选 D", "D"),
        ("本题应选AC", "AC"),
        ("正确选项是：B", "B"),
        ("(B)", "B"),
        (" B", "B"),
        ("B. because it is red", "B"),
        ("【D】", "D"),
        ("A good question. The answer is B", "B"),  # PITFALL 42
        ("A good question.", ""),
        ("A", "A"),
        ("A\nA dog", "A"),
        ("The answer is A because lamps are red", "A"),
        ("The answer is A and C.", "AC"),
        ("The correct answer is: **D**", "D"),
        ("Therefore, the answer is option A, since 3 > 2", "A"),
        ("I first thought the answer is A. No: the answer is D.", "D"),
        ("Because of (A) nothing follows from (B)", ""),
        ("so it must be (C)", "C"),
        ("The answer is a lamp", ""),
        ("Answer: A lamp is red", ""),
        ("The answer is Because", ""),
        ("答案是ABD", "ABD"),
        ("A、C", "AC"),
        ("答案为 A 和 D", "AD"),
        ("", ""),
        ("DABC is a word", ""),
    ],
)
def test_letters_are_read_as_a_person_reads_them(text, letters):
    """PITFALL 42."""
    assert extract_letters(text, ABCD) == list(letters)


@given(
    st.sampled_from(ABCD), st.sampled_from(["The answer is {}", "Answer: ({})", "答案：{}", "故选{}。", "{}", "({})"])
)
def test_a_stated_letter_is_found_whichever_it_is(letter, pattern):
    assert extract_letters(pattern.format(letter), ABCD) == [letter]


@given(st.text(max_size=60))
def test_only_letters_of_the_question_are_given(text):
    assert set(extract_letters(text, ["A", "B"])) <= {"A", "B"}
    extract_number(text)


@pytest.mark.parametrize(
    "text, value",
    [
        ("5 + 3 = 8\n#### 1,008", 1008),
        ("The answer is $3.50. I have 7 lamps.", 3.5),
        (r"so \boxed{-3/4}", -0.75),
        ("first 12, then 7", 7),
        ("none", None),
        ("#### nothing", None),
        ("答案是 42。", 42),
    ],
)
def test_numbers_are_read_after_the_last_mark(text, value):
    assert extract_number(text) == (None if value is None else to_number(str(value)))


def test_equal_numbers_and_texts_are_the_same():
    assert same_number("#### 2.50", ["2.5"])
    assert same_number("some 3 lamps", ["3"], style="anywhere")
    assert not same_number("some 3 lamps", ["3"])
    assert not same_number("#### 2.51", ["2.5"])
    assert same_text("$\\frac{1}{2}$\nmore", ["$\\frac12$"])
    assert same_text("答案是 $-\\frac{10}{3}$。", ["$-\\frac{10}{3}$"])
    assert not same_text("$3$", ["$5$"])
    assert not same_text("", ["$5$"])


@given(st.lists(log_probs, min_size=2, max_size=5))
def test_choices_add_up_the_probabilities_of_their_variants(variants):
    found = scoring.choice_log_probs(variants)
    for value, of_choice in zip(found, variants, strict=True):
        assert math.exp(value) == pytest.approx(sum(math.exp(v) for v in of_choice))
    likeliest = scoring.argmax(found)
    assert scoring.first_token(found, likeliest) == 1
    assert all(found[likeliest] >= other for other in found)


def test_impossible_variants_and_ties_are_no_trouble():
    low = -math.inf
    assert scoring.choice_log_probs([[low, low], [low, -1.0]]) == [low, -1.0]
    assert scoring.argmax([1.0, 2.0, 2.0]) == 1


def multi_choice_oracle(given_, right, labels) -> float:
    """Letter by letter."""
    score = 0.0
    wrong = [label for label in labels if label not in right]
    for label in labels:
        if label in given_:
            score += 1 / len(right) if label in right else -1 / len(wrong)
    return max(score, 0.0)


subsets = st.sets(st.sampled_from(ABCD), min_size=1)


@given(subsets, subsets)
def test_multi_choice_equals_the_oracle_and_all_letters_earn_nothing(given_, right):
    """PITFALL 43."""
    assert scoring.multi_choice(given_, right, ABCD) == pytest.approx(multi_choice_oracle(given_, right, ABCD))
    assert scoring.multi_choice(right, right, ABCD) == 1
    if len(right) < 4:
        assert scoring.multi_choice(ABCD, right, ABCD) == pytest.approx(0)  # PITFALL 43
        extra = next(label for label in ABCD if label not in right)
        assert scoring.multi_choice(right | {extra}, right, ABCD) < 1


@given(subsets)
def test_random_guesses_earn_what_many_draws_do(right):
    answers = sorted(right)
    rng = np.random.default_rng(0)
    every = [s for n in range(1, 5) for s in itertools.combinations(ABCD, n)]
    draws = [multi_choice_oracle(every[i], answers, ABCD) for i in rng.integers(len(every), size=4000)]
    expected = scoring.random_guess("multi_choice", ABCD, answers)
    assert abs(statistics.mean(draws) - expected) <= 5 * statistics.stdev(draws) / math.sqrt(4000) + 1e-12
    assert scoring.random_guess("single_choice", list("ABCDE"), ["A"]) == 0.2
    assert scoring.random_guess("math", [], ["3"]) == 0


@given(scores)
def test_the_mean_has_the_textbook_standard_error(values):
    """PITFALL 44."""
    score = scoring.mean(values)
    assert score.value == pytest.approx(statistics.mean(values))
    assert score.stderr == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)))
    assert scoring.mean([1.0]).stderr is None


def test_the_macro_mean_weighs_subjects_alike():
    parts = [scoring.mean([1.0] * 98 + [0.0] * 2), scoring.mean([0.0, 1.0])]
    macro = scoring.macro_mean(parts)
    assert macro.value == pytest.approx((0.98 + 0.5) / 2)
    assert macro.stderr == pytest.approx(math.sqrt(parts[0].stderr ** 2 + parts[1].stderr ** 2) / 2)
    assert macro.n == 102
    assert scoring.macro_mean([parts[0], scoring.mean([1.0])]).stderr is None


def test_the_standard_errors_cover_the_truth():
    """Of many samples, about 95 % have the true mean within 1.96 standard errors; the ratio's too."""
    rng = np.random.default_rng(1)
    hits = ratio_hits = 0
    for _ in range(400):
        score = scoring.mean((rng.random(200) < 0.3).astype(float).tolist())
        hits += abs(score.value - 0.3) <= 1.96 * score.stderr
        sizes = rng.integers(50, 150, 100)
        ratio = scoring.per_byte_perplexity([-(s * 0.7 + rng.normal(0, 9)) for s in sizes], sizes.tolist())
        ratio_hits += abs(ratio.value - math.exp(0.7)) <= 1.96 * ratio.stderr
    assert 0.91 <= hits / 400 <= 0.99
    assert 0.91 <= ratio_hits / 400 <= 0.99


def test_perplexities():
    assert scoring.choice_perplexity([-4.0, -9.0], [1, 3], 1) == 1  # 3 nats per token against 4
    assert scoring.choice_perplexity([-4.0, -9.0], [2, 3], 1) == 0
    assert scoring.per_byte_perplexity([-8.0], [4]).value == pytest.approx(math.exp(2))
    assert scoring.combined(0.0, 1.0) == scoring.combined(1.0, 0.0) == 1
    assert scoring.exact_match(["C", "A"], ["A", "C"]) == 1
    assert scoring.exact_match([], ["A"]) == 0


signs = st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=2, max_size=11)
halves = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=2, max_size=9)


def flips_oracle(d) -> float:
    d = [x for x in d if x]
    sums = [abs(sum(s * x for s, x in zip(sign, d, strict=True))) for sign in itertools.product([-1, 1], repeat=len(d))]
    return sum(total >= abs(sum(d)) - 1e-9 for total in sums) / len(sums)


@given(signs)
def test_mcnemar_is_the_exact_permutation_test_of_wins_and_losses(differences):
    assert mcnemar(differences) == pytest.approx(flips_oracle(differences))


@given(halves)
def test_the_permutation_test_is_exact_for_few_questions(differences):
    assert sign_flip(differences) == pytest.approx(flips_oracle(differences))


def test_compare_is_antisymmetric_and_sees_a_real_difference():
    rng = np.random.default_rng(2)
    first = (rng.random(500) < 0.4).astype(float).tolist()
    second = [max(x, float(rng.random() < 0.2)) for x in first]
    there, back = compare(first, second), compare(second, first)
    assert there.value == -back.value > 0.05
    assert there.p_value == back.p_value < 1e-6
    assert compare(first, first).p_value == 1
    partial = compare([x / 2 for x in first], second)
    assert partial.p_value < 1e-3
    assert there.stderr == pytest.approx(np.std(np.subtract(second, first), ddof=1) / math.sqrt(500))
