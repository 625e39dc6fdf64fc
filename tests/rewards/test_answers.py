r"""What verifiers read as the answer of a text: what a person would read, and nothing where that isn't clear.

Each table has the response and the right answer; what is right is paid 1, what is wrong 0.
"""

import time

import pytest

from tests.rewards.samples import make_verifier, samples

SECONDS = 1.5  # of CPU time, for a response of 60,000 characters


def paid(name: str, response: str, answer, prompt: str = "", finish_reason: str = "eos", **settings) -> float:
    verifier = make_verifier(name, **settings)
    [score] = verifier.score(samples([prompt], [response], finish_reason, answer=[answer]))
    return score


# --- letters


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{B}", "B"),
        (r"$\boxed{\text{B}}$", "B"),
        (r"\boxed{\textbf{(B)}}", "B"),
        (r"\boxed{\mathrm{B}}", "B"),
        (r"\boxed{B. Nitrogen}", "B"),
        (r"\boxed{\boxed{B}}", "B"),
        ("Option B is correct.", "B"),
        ("Hence, B is the right option", "B"),
        ("Option C is wrong, option B is correct", "B"),
        ("The correct answer is option B.", "B"),
        ("The correct choice is B: Nitrogen", "B"),
        ("**Answer: B**", "B"),
        ("The answer is **B**.", "B"),
        ("$B$", "B"),
        ("Answer:\n- B", "B"),
        ("The best answer is B since A, C and D are wrong", "B"),
        ("I think A is correct. Actually, B is correct.", "B"),
        ("B\n\nThe air is nitrogen for the most part.\n\n(B)", "B"),
        ("(B) Nitrogen\n\nOption B", "B"),
        ("选项B正确，答案选B。", "B"),
        ("B", "B. Nitrogen"),
        ("B", "(B) Nitrogen"),
        ("B", "B) A noble gas"),
        ("B", r"\boxed{B}"),
        ("B", "The answer is B"),
        ("A", "A. A noble gas"),
        ("C, A", "AC"),
        ("Answer: B, C", ["B", "C"]),
    ],
)
def test_a_choice_is_read_however_it_is_stated(response, answer):
    """REPORT 10: in a box, in a sentence, with the choice's text; the right answer may bring its text too."""
    assert paid("choice", response, answer) == 1


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("N", "B. Nitrogen"),
        ("Nitrogen", "N. Boron"),
        ("The answer is B, or C", "B"),
        ("The answer is B (or C)", "B"),
        ("The answer is B or C", "B"),
        ("The answer is B, no wait, C", "B"),
        ("The answer is B, which is wrong", "B"),
        ("The answer is not B", "B"),
        ("B is incorrect", "B"),
        ("Is the answer B?", "B"),
        ("If the answer is B, then", "B"),
        (r"\boxed{A} or \boxed{B}", "B"),
        (r"\boxed{A}\boxed{B}\boxed{C}\boxed{D}", "A"),
        ("A. Argon\nB. Nitrogen\nC. Neon\nD. Xenon", "A"),
        ("A is correct. B is correct.", "A"),
        ("B\n\nLet me check that. It was wrong.\n\nC", "B"),
        ("B\nA\nC\nD", "B"),
        ("(B)\n(C)", "B"),
        ("Answer: A good one", "A"),
        ("A student runs.", "A"),
        ("Answer: B, C", "B"),
        ("Answer:\n- B\n- C", "B"),
        ('I was told "the answer is B"', "B"),
        (r"They ask for `put it in \boxed{B}` at the end", "B"),
    ],
)
def test_a_choice_that_is_not_made_is_not_paid(response, answer):
    """REPORT 10: two answers, a list of all, an answer taken back, asked for or quoted, the article A."""
    assert paid("choice", response, answer) == 0


# --- numbers


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{9{,}500}", "9500"),
        (r"\boxed{1\,234}", "1234"),
        ("The answer is 1 234", "1234"),
        ("The answer is 1,234,567.89", "1234567.89"),
        ("The answer is .5", "0.5"),
        (r"\boxed{\frac34}", "0.75"),
        (r"The answer is $\frac{3}{4}$", "0.75"),
        ("The answer is 3 1/2.", "3.5"),
        ("The answer is 3½", "3.5"),
        ("The answer is ¾", "0.75"),
        ("The answer is 1.5e3", "1500"),
        ("Result:\n- 18", "18"),
        ("Answer:\n1. 18", "18"),
        ("* 18", "18"),
        ("Answer: She has 16 - 3 - 4 = 9 eggs", "9"),
        ("The answer is 18 - 4 = 14", "14"),
        ("The answer to 18 + 1 is 19", "19"),
        ("The answer is −5", "-5"),
        (r"The answer is:\n\n\[ \boxed{18} \]", "18"),
        (r"\boxed{\boxed{18}}", "18"),
        (r"\boxed{18^\circ}", "18"),
        ("The answer is 18 cm^2", "18"),
        ("The answer is 18 cm²", "18"),
        ("Final answer: **$18**", "18"),
        ("The answer is\n18. She keeps them.", "18"),
        ('The answer is "18".', "18"),
        ("The answer is 18, since 9 + 9 = 18 and not 20", "18"),
        ("x = 18", "18"),
    ],
)
@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_a_number_is_what_a_person_reads(name, response, answer):
    """REPORT 11: thousands, decimals, fractions, mixed numbers, bullets, sums with their result."""
    assert paid(name, response, answer) == 1


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"\boxed{9{,}500}", "9"),
        ("The answer is .5", "5"),
        (r"\boxed{\frac34}", "4"),
        ("The answer is 3 1/2.", "2"),
        ("The answer is 3½", "3"),
        ("The answer is 18²", "18"),
        ("The answer is 1.5e3", "1.5"),
        ("Result:\n- 18", "-18"),
        ("Answer:\n1. 18", "1"),
        ("Answer:\n- 18\n- 12", "18"),
        ("Answer:\n1. 18\n2. 12", "1"),
        ("Answer: She has 16 - 3 ...", "16"),
        ("Answer: She has 16 - 3 ...", "3"),
        ("The answer is 18 - 4 = 14", "18"),
        ("The answer is 18 apples and 3 oranges", "18"),
        ("The answer is 18 or 19", "18"),
        ("The answer is 18 (or 19)", "18"),
        ("The answer is 18, or rather 19", "18"),
        ("The answer is 18, I guess, or 19", "18"),
        ("The answer is 18, no wait, 19", "18"),
        ("The answer is 18, which is wrong", "18"),
        ("The answer is 18 when x = 3, else 19", "18"),
        ("The answer is 18 if it rains", "18"),
        ("The answer is 18 and 19", "18"),
        (r"\boxed{18}, \boxed{19}", "18"),
        (r"First \boxed{18}. Then \boxed{19}.", "18"),
        ("#### 18\n#### 19", "18"),
        ("The answer is between 10 and 20", "20"),
        ("The answer is 10-20", "10"),
        ("The answer is more than 18", "18"),
        ("The answer is not 18", "18"),
        ("The answer is 2 million", "2"),
        ("The answer is 18k", "18"),
        ("The answer is 18 choose 2", "18"),
        ("The answer is 36 divided by 2", "36"),
        ("The answer is half of 18", "18"),
        (r"The answer is 5 \times 10^3", "5"),
        ("The answer is 3:30", "3"),
        ("The answer is 2024-05-18", "18"),
        ("2x = 18", "18"),
        ("x = 5, y = 18", "18"),
        ("x + y = 18", "18"),
        ("The answer is 18?", "18"),
        ("If the answer is 18, she has more", "18"),
        ("She sold 18 of them and went home", "18"),
        ('They told me "the answer is 18"', "18"),
        ("> The answer is 18\nI don't know", "18"),
        (r"\boxed{18", "18"),
    ],
)
@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_a_part_of_a_number_or_one_of_several_is_not_paid(name, response, answer):
    """REPORT 11, REPORT 12: nothing rather than a wrong number."""
    assert paid(name, response, answer) == 0


# --- mathematics


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("To find 67 - 67, we need", "0"),
        ("The answer is 67 - 67", "0"),
        (r"\boxed{67-67}", "0"),
        (r"\boxed{2 \cdot 9}", "18"),
        (r"\boxed{\frac{36}{2}}", "18"),
        (r"\boxed{\sqrt{324}}", "18"),
        (r"\boxed{3!}", "6"),
        (r"\boxed{\sum_{i=1}^{3} i}", "6"),
        (r"\boxed{\binom{4}{2}}", "6"),
        (r"\boxed{\log_2 64}", "6"),
        (r"\boxed{101_2}", "5"),
        (r"\boxed{3.14159}", r"\pi"),
        (r"\boxed{0}", r"\emptyset"),
        ("1, 2", "1"),
        (r"\boxed{x<3}", r"x \le 3"),
        (r"\boxed{3-4i}", "3+4i"),
        (r"The answer is $\frac{\pi}{2}$ or $\frac{\pi}{3}$", r"\frac{\pi}{2}"),
        (r"\boxed{\pi}, \boxed{2\pi}", r"\pi"),
        ("", "0"),
        (r"\boxed{}", "0"),
    ],
)
def test_what_is_left_to_compute_is_no_number(response, answer):
    """REPORT 12: an answer is stated, and of the right one's kind."""
    pytest.importorskip("math_verify")
    assert paid("math", response, answer) == 0


@pytest.mark.parametrize(
    ("question", "expression", "answer", "simplified"),
    [
        ("Simplify $\\sqrt{18}$.", r"\sqrt{18}", r"3\sqrt{2}", r"3 \sqrt 2"),
        ("Expand (x + 1)^2.", "(x+1)^2", "x^2+2x+1", "1 + 2x + x^2"),
        ("What is $\\dfrac{2\\pi}{4}$ in lowest terms?", r"\frac{2\pi}{4}", r"\frac{\pi}{2}", r"\pi/2"),
        ("Factor x^2 - 1 over the integers.", "x^2-1", "(x-1)(x+1)", "(x+1)(x-1)"),
    ],
)
def test_the_questions_own_expression_is_not_paid(question, expression, answer, simplified):
    """REPORT 12: although it equals the right answer."""
    pytest.importorskip("math_verify")
    for form in (r"\boxed{%s}", "The answer is $%s$.", "It is $%s$"):
        assert paid("math", form % expression, answer, question) == 0
        assert paid("math", form % simplified, answer, question) == 1
        assert paid("math", form % answer, answer, f"{question} Is it {answer}?") == 1


@pytest.mark.parametrize("name", ["math", "gsm8k"])
@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("To find 18, we need", 0),
        ("So we have\n18", 0),
        ("The answer is 18", 0),  # it may have become 180
        ("Total: 18", 0),
        (r"\boxed{18", 0),
        ("#### 18", 0),
        ("The answer is 18.", 0),  # or 18.5
        ("The answer is 18.\nBut", 1),
        ("#### 18\n", 1),
        (r"So \boxed{18}. Let me", 1),
        ("<answer>18</answer>\nAs", 1),
        ("The answer is 19. Now", 0),
    ],
)
def test_a_response_that_was_cut_has_stated_only_what_it_finished(name, response, score):
    """REPORT 12: a box, a whole line or sentence, a closed tag."""
    assert paid(name, response, "18", finish_reason="length") == score


def test_a_cut_choice_is_none():
    """REPORT 12."""
    assert paid("choice", "The answer is B", "B", finish_reason="length") == 0
    assert paid("choice", "B", "B", finish_reason="length") == 0
    assert paid("choice", r"\boxed{B} as", "B", finish_reason="length") == 1


@pytest.mark.parametrize("response", ["18.90", r"\boxed{\$18.90}", "$18.90", "The answer is 18.9 dollars"])
@pytest.mark.parametrize(
    "answer", [r"\$18.90", "$18.90", r"$\$18.90$", r"\text{\$}18.90", 18.9, r"18.90 \text{ dollars}"]
)
def test_money_is_a_number(response, answer):
    """REPORT 12: a right answer in dollars once raised for every response."""
    pytest.importorskip("math_verify")
    assert paid("math", response, answer) == 1
    assert paid("math", "19", answer) == 0


HUGE = [r"9^{9^{9^{9}}}", "100000000!", "(x+1)^{100000}", r"\sqrt{" * 300 + "2" + "}" * 300, "9" * 100_000, "x" * 9_000]


@pytest.mark.parametrize("expression", HUGE, ids=lambda text: text[:12])
def test_a_huge_expression_is_wrong_at_once_where_a_number_is_right(expression):
    """REPORT 12: no algebra is done with it."""
    started = time.process_time()
    assert paid("math", rf"\boxed{{{expression}}}", "7") == paid("gsm8k", rf"\boxed{{{expression}}}", "7") == 0
    assert time.process_time() - started < SECONDS


PIECES = ["(", "1,", "1 ", "1/", "9", "$", r"\boxed{", r"\boxed{1}", "The answer is ", "answer to ", "{", "}", r"\frac"]
PIECES += [
    "- 1\n",
    "is ",
    "= ",
    "A ",
    "(A) ",
    "A or ",
    "B. ",
    "\n",
    "<<",
    "<answer>",
    "</answer>",
    "```",
    "x=1\n",
    r"\(",
]
PIECES += ["if the answer is 1", "$1$", "'", '"', " 'a", "#### ", "1e9", r"1\,", "{,}", "答案是", "or ", ".", "a the "]


@pytest.mark.parametrize("piece", PIECES, ids=repr)
def test_a_response_that_repeats_itself_is_read_in_no_time(piece):
    """REPORT 12: policies learn to write such; none may hang whoever reads it."""
    text = piece * (60_000 // len(piece))
    for name, answer in (("gsm8k", "7"), ("choice", "E"), ("exact", "7"), ("math", "7")):
        started = time.process_time()
        assert paid(name, text, answer) == 0
        assert time.process_time() - started < SECONDS, name


# --- texts


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("15", "1.5"),
        ("-5", "5"),
        ("−5", "5"),
        ("C", "C++"),
        ("C", "C#"),
        ("1,5", "15"),
        ("1/2", "12"),
        ("5!", "5"),
        ("x+1", "x1"),
        ("x > 1", "x < 1"),
        ("a = b", "a != b"),
        ("10:30", "1030"),
        ("5%", "5"),
        ("$5", "5"),
        ("2^3", "23"),
        ("(1, 2)", "(12)"),
        ("f(x)", "fx"),
        ("a & b", "a | b"),
        ("3.14", "314"),
        ("user@host", "userhost"),
        ("", "the"),
    ],
)
def test_signs_points_and_operators_count(one, other):
    """REPORT 14."""
    assert paid("exact", one, other) == paid("exact", other, one) == 0
    if one:
        assert paid("exact", one, one) == paid("exact", other, other) == 1


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The Eiffel Tower!", "eiffel  tower"),
        ("“Paris.”", "paris"),
        ("**Paris**", "Paris"),
        ("C++.", "c++"),
        ("-5.", "−5"),
        ("1,500", "1500"),
        ("yes, please", "Yes please"),
        ("don't", "don’t"),
        ("(B)", "B"),
        ("a cat", "the cat"),
        ("ｆｕｌｌ", "full"),
    ],
)
def test_case_quotes_articles_and_marks_of_a_sentence_do_not_count(response, answer):
    """REPORT 14: what was equal stays so."""
    assert paid("exact", response, answer) == paid("exact", answer, response) == 1
