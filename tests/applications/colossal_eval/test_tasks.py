"""Generated lm-eval tasks: the files, the prompts, whole examples or none, letters as the tokenizer has them."""

import pytest
import yaml

from coati.errors import UserError
from colossal_eval.benchmarks.benchmark_settings import TaskOptions
from colossal_eval.benchmarks.question import Question
from colossal_eval.run.prompt_tokenizer import PromptTokenizer, last_line
from colossal_eval.run.task_yaml import load_tasks, write_tasks
from colossal_eval.scores.generated_text import score_text
from tests.applications.colossal_eval.conftest import byte_tokenizer


def tasks_of(benchmark, prepared, tmp_path, **options):
    write_tasks(benchmark, prepared, tmp_path / "tasks", TaskOptions(**options))
    return load_tasks(tmp_path / "tasks", benchmark)


def test_a_benchmark_is_a_group_of_categories_of_subjects(prepared, tmp_path):
    loaded = tasks_of("agieval", prepared, tmp_path)
    names = {"agieval_gaokao_physics", "agieval_gaokao_physics_multi", "agieval_gaokao_mathcloze"}
    assert set(loaded["tasks"]) == names
    groups = {"agieval", "agieval_Gaokao_group", "agieval_Gaokao_group_multi_choice", "agieval_Gaokao_group_cloze"}
    assert set(loaded["groups"]) == groups
    assert [len(loaded["tasks"][name].eval_docs) for name in sorted(names)] == [1, 2, 1]
    config = (tmp_path / "tasks" / "mmlu_anatomy.yaml").exists() or (tmp_path / "tasks" / "agieval.yaml").read_text()
    assert yaml.safe_load(config)["aggregate_metric_list"] == [{"metric": "combined", "weight_by_size": True}]


def test_prompts_are_what_a_person_would_write(prepared, tmp_path):
    task = tasks_of("mmlu", prepared, tmp_path, shots=1)["tasks"]["mmlu_anatomy"]
    assert task.fewshot_context(task.eval_docs[1], 1) == (
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "Question: What is 0 + 0 in anatomy?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer: A\n\n"
        "Question: What is 3 + 1 in anatomy?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"
    )
    task = tasks_of("agieval", prepared, tmp_path)["tasks"]["agieval_gaokao_physics_multi"]
    assert task.fewshot_context(task.eval_docs[0], 5) == (
        "以下是关于高考物理的多项选择题，请直接给出所有正确答案的选项。\n\n"
        "题目：求值\nA. 一\tB. 二 C. 三 D. 四\n答案是：D\n\n题目：多选\nA. 一\nB. 二\nC. 三\nD. \n答案是："
    )
    task = tasks_of("gsm8k", prepared, tmp_path, shots=1)["tasks"]["gsm8k_gsm8k"]
    assert task.fewshot_context(task.eval_docs[1], 1) == (
        "Question: Ann has 0 red lamps and 0 blue. How many?\nAnswer: 0 + 0 = <<0+0=0>>0\n#### 0000\n\n"
        "Question: Really, Ann has 1 red lamps and 1 blue. How many?\nAnswer:"
    )


def test_examples_are_left_out_whole_and_counted(prepared, tmp_path, harness):
    """Never a silent cut: the prompt is that of fewer examples, to the letter."""
    task = tasks_of("mmlu", prepared, tmp_path)["tasks"]["mmlu_anatomy"]
    doc = task.eval_docs[0]
    by_shots = [task.fewshot_context(doc, shots) for shots in range(6)]
    for shots in range(6):
        tokenizer = task.prompt_tokenizer = harness().prompt_tokenizer
        room = len(tokenizer.encode(by_shots[shots]))
        for spare, dropped in ((1, 5 - shots), (0, 6 - shots)):
            tokenizer.max_length = room + spare
            text = task.fewshot_context(doc, 5)
            context = task.contexts[doc["id"]]
            if spare or shots:
                assert (text, context.dropped, context.fits) == (by_shots[5 - dropped], dropped, True)
            else:
                assert (context.dropped, context.fits) == (5, False)
                [request] = task.construct_requests(doc, text, metadata=("t", 0, 1))
                assert request.request_type == "unanswered"
                assert task.process_results(doc, [None]) == {"first_token": 0.0}


def test_the_chat_template_gets_an_example_a_turn_and_one_bos(prepared, tmp_path, harness):
    task = tasks_of("mmlu", prepared, tmp_path, shots=1)["tasks"]["mmlu_anatomy"]
    model = harness()
    task.prompt_tokenizer = model.prompt_tokenizer
    text = task.fewshot_context(task.eval_docs[1], 1, apply_chat_template=True, chat_template=model.apply_chat_template)
    head = "The following are multiple choice questions (with answers) about anatomy."
    shot = "Question: What is 0 + 0 in anatomy?\nA. 0\nB. 1\nC. 2\nD. 3\nAnswer:"
    asked = "Question: What is 3 + 1 in anatomy?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"
    assert text == f"<bos><user>{head}\n\n{shot}\n<assistant>A\n<user>{asked}\n<assistant>"
    assert model.prompt_tokenizer.encode(text).tolist().count(0) == 1  # PITFALL 18
    model.loaded.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        task.fewshot_context(task.eval_docs[1], 1, apply_chat_template=True, chat_template=model.apply_chat_template)


def tokenizer_of(kind: str):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if kind == "bytes":
        return byte_tokenizer()
    words = ["<unk>", "<bos>", "<eos>", "Answer:", "▁Answer:", *"ABCD", *(f"▁{c}" for c in "ABCD"), " ", ":"]
    if kind == "words":
        backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    elif kind == "characters":
        vocabulary = {c: i for i, c in enumerate(["<unk>", "<bos>", "<eos>", *"AnswerBCD: \n?"])}
        backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    else:  # as sentencepiece does: spaces are part of the word
        merges = [("▁", c) for c in "ABCD"]
        vocabulary = {
            c: i for i, c in enumerate(["<unk>", "<bos>", "<eos>", *"▁AnswerBCD:?", *("▁" + c for c in "ABCD")])
        }
        backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    ends = [("<bos>", backend.token_to_id("<bos>")), ("<eos>", backend.token_to_id("<eos>"))]
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize(
    "kind, styles",
    [("bytes", ("{}", " {}")), ("metaspace", ("{}", " {}")), ("characters", ("{}",)), ("words", (" {}",))],
)
def test_letters_are_single_tokens_of_their_own_after_the_prompt(kind, styles):
    """ "A" and " A" both count where both are one token; where they are the same token, once."""
    text, prompt = PromptTokenizer(tokenizer_of(kind), 100), "What?\nAnswer:"
    assert text.letter_styles(prompt, tuple("ABCD")) == styles
    encoded = text.encode(prompt).tolist()
    for style in styles:
        for letter in "ABCD":
            [token] = text.continuation(prompt, style.format(letter))
            assert [*encoded, token] == text.encode(prompt + style.format(letter)).tolist()


def test_prompts_begin_as_the_tokenizer_begins_and_never_end_with_eos():
    text = PromptTokenizer(tokenizer_of("characters"), 100)
    assert text.encode("A").tolist() == [1, 3]
    assert text.encode("<bos>A").tolist() == [1, 3]
    assert last_line("a\nAnswer:") == "Answer:"
    assert last_line("a\n<assistant>\n") == "<assistant>\n"


def test_unknown_names_are_refused(prepared, tmp_path):
    with pytest.raises(UserError, match="'nlu' is none of mmlu"):
        write_tasks("nlu", prepared, tmp_path, TaskOptions())
    with pytest.raises(UserError, match="holds no prepared benchmark"):
        write_tasks("cmmlu", prepared, tmp_path, TaskOptions())
    with pytest.raises(UserError, match="'guess' is none of first_token"):
        TaskOptions(methods=["guess"]).check()


def test_texts_are_worth_what_their_kind_says():
    one = Question("q", "s", "c", "en", "single_choice", "?", list("wxyz"), list("ABCD"), ["B"])
    several = Question("q", "s", "c", "zh", "multi_choice", "?", list("wxyz"), list("ABCD"), ["A", "C"])
    number = Question("q", "s", "c", "en", "math", "?", answers=["2000"], solution="")
    assert [score_text(one, text) for text in (" B", "A good one. The answer is B.", "AB", "")] == [1, 1, 0, 0]
    assert [score_text(one, text) for text in ("Since x grows, (B) it is.", "(A) falls, thus (B) it is.")] == [1, 0]
    assert [score_text(several, text) for text in ("AC", "A", "ABC", "ABCD", "")] == [1, 0.5, 0.5, 0, 0]
    assert [score_text(number, text) for text in ("so\n#### 2,000", "The answer is 2000.0", "2000", "#### 1")] == [
        1,
        1,
        0,
        0,
    ]
