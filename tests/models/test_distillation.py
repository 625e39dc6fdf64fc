"""A student's divergence from its teacher: of whole logits, of a few at a time, and of models of other shapes."""

import pytest
import torch
from torch.nn.functional import pad
from transformers import Gemma2Config, LlamaConfig

from coati.losses import vocabulary_divergence
from coati.losses.distillation import Divergence
from coati.models import Actor, LoraSettings
from coati.models.distillation import Student, Teacher
from coati.planner.live import LiveMemory

SIZES = dict(intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
VOCABULARY = 50


def llama(vocabulary: int = VOCABULARY, width: int = 32):
    return LlamaConfig(vocab_size=vocabulary, hidden_size=width, **SIZES)


def capped(vocabulary: int = VOCABULARY, width: int = 32):
    """An architecture that changes the logits of its output layer."""
    return Gemma2Config(vocab_size=vocabulary, hidden_size=width, head_dim=16, final_logit_softcapping=2.0, **SIZES)


def sharp(model):
    """Makes distributions that are far from flat."""
    torch.nn.init.normal_(model.transformer.get_output_embeddings().weight, std=0.5)
    return model


def batch():
    """Three rows with padding on the right, and targets with a hole."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    mask = torch.arange(9) < torch.tensor([[9], [6], [4]])
    targets = mask & (torch.arange(9) > 2)
    targets[0, 5] = False
    return dict(input_ids=ids, attention_mask=mask, targets=targets, right_padded=True)


def plain_logits(model, inputs):
    """Those that predict each token, `[batch, seq, vocab]`, as transformers gives them."""
    logits = model.transformer(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"].long()).logits
    return pad(logits[:, :-1], (0, 0, 1, 0))


@pytest.mark.parametrize("max_logits", [None, 1], ids=["at once", "a few at a time"])
@pytest.mark.parametrize(
    ("student_config", "teacher_config"),
    [
        (llama(), llama(width=16)),
        (llama(), llama(VOCABULARY + 6)),
        (llama(VOCABULARY + 6), llama()),
        (capped(), llama()),
        (llama(), capped()),
    ],
    ids=["another width", "a padded teacher", "a padded student", "a capped student", "a capped teacher"],
)
def test_the_divergence_and_its_gradient_are_those_of_whole_logits(
    student_config, teacher_config, max_logits, monkeypatch
):
    monkeypatch.setattr("coati.models.actor.ROWS", 3)
    torch.manual_seed(0)
    student, teacher = sharp(Student(config=student_config)), sharp(Teacher(config=teacher_config))
    student.max_logits, inputs, how = max_logits, batch(), Divergence("jsd", 0.3, 0.7)
    with torch.no_grad():
        states = teacher(**inputs)
        of_teacher = plain_logits(teacher, inputs)
    assert len(states) == inputs["targets"].sum()
    weights = torch.randn(inputs["targets"].shape, generator=torch.Generator().manual_seed(1))
    found = student(**inputs, teacher=teacher, teacher_states=states, divergence=how)
    (weights * found).sum().backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    of_student = plain_logits(student, inputs)[..., : of_teacher.shape[-1]]
    whole = vocabulary_divergence(of_student, of_teacher[..., : of_student.shape[-1]], how) * inputs["targets"]
    (weights * whole).sum().backward()
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    assert whole.max() > 0.01 and (found[~inputs["targets"]] == 0).all()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_student_without_a_teacher_is_an_actor():
    torch.manual_seed(0)
    student = Student(config=llama())
    actor = Actor(config=llama())
    actor.load_state_dict(student.state_dict())
    assert torch.equal(student(**batch()), actor(**batch()))


def test_only_the_adapter_of_a_student_gets_gradients():
    torch.manual_seed(0)
    student, teacher = Student(config=llama(), lora=LoraSettings(rank=2)), Teacher(config=llama())
    with torch.no_grad():
        states = teacher(**batch())
    student(**batch(), teacher=teacher, teacher_states=states, divergence=Divergence()).sum().backward()
    assert {"lora" in name for name, p in student.named_parameters() if p.grad is not None} == {True}


def test_a_teachers_own_head_gives_the_same_logits():
    """For plugins that gather weights in the forward pass only; it is no part of the module that they shard."""
    torch.manual_seed(0)
    teacher = Teacher(config=llama())
    names = set(teacher.state_dict())
    states = teacher(**batch())
    expected = teacher.logits_of(states)
    teacher.keep_head(torch.float32, torch.device("cpu"))
    assert torch.equal(teacher.logits_of(states), expected) and set(teacher.state_dict()) == names
    torch.nn.init.zeros_(teacher.model.lm_head.weight)
    assert torch.equal(teacher.logits_of(states), expected)


@pytest.mark.slow
def test_a_large_vocabulary_takes_a_fraction_of_the_memory_of_whole_logits():
    """The peak of what lives at once in a forward and backward pass of 1024 tokens, weights' gradients included; the
    figures are in docs/distillation.md."""
    vocabulary, tokens = 2**17, 1024
    torch.manual_seed(0)
    student, teacher = (
        cls(config=LlamaConfig(vocab_size=vocabulary, hidden_size=64, **SIZES)) for cls in (Student, Teacher)
    )
    ids = torch.randint(3, vocabulary, (1, tokens + 1))
    inputs = dict(input_ids=ids, targets=torch.arange(tokens + 1)[None] > 0)
    with torch.no_grad():
        states = teacher(**inputs)
    peaks = []
    for max_logits in (None, 2**40):
        student.max_logits, live = max_logits, LiveMemory()
        with live:
            live.begin_phase("learn")
            student(**inputs, teacher=teacher, teacher_states=states, divergence=Divergence("jsd")).sum().backward()
        peaks.append(live.peaks["learn"].total())
        student.zero_grad()
    print(f"{peaks[0] / 2**20:.0f} MiB, with whole logits {peaks[1] / 2**20:.0f} MiB")
    assert peaks[0] < 0.3 * peaks[1]
