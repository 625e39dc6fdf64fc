"""Writes the table of methods in docs/papers.md: `python tools/write_methods.py`.

What a method is and which functions it is made of is read from its settings' class; the papers and what a method was
checked against stand below. A test holds that the committed page is what this writes, and that every method is in it.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PAGE = ROOT / "docs" / "papers.md"
MARKED = re.compile(r"(<!-- methods -->\n).*?(<!-- end of methods -->)", re.DOTALL)
HEADER = "| Paper | Configuration | What it is | Functions | Checked |\n|---|---|---|---|---|\n"


@dataclass(frozen=True)
class Method:
    """What a class of settings doesn't tell.

    Attributes:
        papers: their names by number or address.
        checked: against what, beside the oracles.
        configuration: if more than its type belongs there.
    """

    papers: dict[str, str]
    checked: str
    configuration: str | None = None


def equal_to_trl(page: str) -> str:
    return f"[equal to TRL]({page}.md#the-same-numbers-as-trl)"


ON_PAIRS = equal_to_trl("preference")
OF_GROUPS = equal_to_trl("grpo")
ARITHMETIC = "[arithmetic](grpo.md#a-task-to-try-it-on)"
THEORY = "[theory](grpo.md#what-theory-says)"
WITH_CRITIC = "[theory](reading-the-curves.md#what-theory-says)"
PUBLIC_DATA = "[public data](real-data.md)"
INSTRUCT_GPT = {"2203.02155": "InstructGPT"}

METHODS = {
    "sft": Method(INSTRUCT_GPT, PUBLIC_DATA, "`coati sft`"),
    "reward": Method(
        {"1706.03741": "Christiano et al. 2017"} | INSTRUCT_GPT | {"2406.08673": "HelpSteer2"},
        PUBLIC_DATA,
        "`algorithm: {type: reward}`; scores: `objectives`",
    ),
    "prm": Method(
        {"2305.20050": "Let's Verify Step by Step", "2312.08935": "Math-Shepherd"}, "[sums](reward-model.md#steps)"
    ),
    "dpo": Method({"2305.18290": "DPO"}, f"{ON_PAIRS}, [theory](preference.md#what-theory-says)"),
    "robust-dpo": Method({"2403.00409": "Robust DPO"}, ON_PAIRS),
    "ipo": Method({"2310.12036": "IPO"}, ON_PAIRS),
    "hinge": Method({"2305.10425": "SLiC"}, ON_PAIRS),
    "simpo": Method({"2405.14734": "SimPO"}, f"{ON_PAIRS}, {ARITHMETIC}"),
    "orpo": Method({"2403.07691": "ORPO"}, f"{ON_PAIRS}, {ARITHMETIC}"),
    "cpo": Method({"2401.08417": "CPO"}, ON_PAIRS),
    "kto": Method({"2402.01306": "KTO"}, f"{ON_PAIRS}, {ARITHMETIC}"),
    "ppo": Method({"1707.06347": "PPO"} | INSTRUCT_GPT, f"{WITH_CRITIC}, {ARITHMETIC}, {PUBLIC_DATA}"),
    "sao": Method({"2607.07508": "SAO"}, f"{WITH_CRITIC}, {ARITHMETIC}"),
    "bpco": Method({"2608.23566": "BPCO"}, f"{WITH_CRITIC}, {ARITHMETIC}"),
    "grpo": Method(
        {"2402.03300": "GRPO"},
        f"{OF_GROUPS}, {THEORY}, {ARITHMETIC}",
        "`algorithm: {type: grpo, kl_coefficient: 0.04}`; without the coefficient, no KL penalty",
    ),
    "dr-grpo": Method({"2503.20783": "Dr. GRPO"}, f"{OF_GROUPS}, {THEORY}, {ARITHMETIC}"),
    "dapo": Method(
        {"2503.14476": "DAPO"},
        f"{OF_GROUPS}, {ARITHMETIC}",
        "`algorithm: {type: dapo}`; its length penalty is `overlong_buffer`",
    ),
    "gspo": Method({"2507.18071": "GSPO"}, f"{OF_GROUPS}, {ARITHMETIC}"),
    "luspo": Method({"2602.05261": "LUSPO"}, OF_GROUPS),
    "cispo": Method({"2506.13585": "CISPO"}, f"{OF_GROUPS}, {ARITHMETIC}"),
    "sapo": Method({"2511.20347": "SAPO"}, f"{OF_GROUPS}, {ARITHMETIC}"),
    "dppo": Method({"2602.04879": "DPPO"}, f"[losses](grpo.md#4-policy-update), {ARITHMETIC}"),
    "vespo": Method({"2602.10693": "VESPO"}, OF_GROUPS),
    "gdpo": Method({"2601.05242": "GDPO"}, OF_GROUPS),
    "maxrl": Method({"2602.02710": "MaxRL"}, f"[advantages](grpo.md#2-advantages), {ARITHMETIC}"),
    "echo": Method({"2605.24517": "ECHO"}, "[environments](environments.md#what-the-environment-says-as-a-lesson)"),
    "rloo": Method({"2402.14740": "RLOO"}, f"{OF_GROUPS}, {THEORY}, {ARITHMETIC}"),
    "reinforce++": Method({"2501.03262": "REINFORCE++"}, ARITHMETIC),
    "remax": Method({"2310.10505": "ReMax"}, ARITHMETIC),
    "distill": Method(
        {"2306.13649": "GKD"},
        f"[equal to TRL and to theory](distillation.md#what-was-verified), {ARITHMETIC}",
        "`algorithm: {type: distill, teacher: FOLDER, on_policy_share: 0.5, divergence: jsd}`; by default the "
        "student's own responses only, with the reverse KL",
    ),
    "sdpo": Method(
        {"2601.20802": "SDPO"},
        "[equal to a loop, and it learns](distillation.md#what-was-verified)",
        "`algorithm: {type: sdpo}`, and rewards; for LiveCodeBench the authors' script has `teacher_ema` 0.01",
    ),
}
# Methods that are settings of a command's, as rows.
VARIANTS = [
    (
        "[Score centering](https://arxiv.org/abs/2609.20807)",
        "`algorithm: {type: cispo, clip_low: 0, clip_high: 0, correction: {score_centering: 128}}`",
        "What a policy learns from rewards alone where another distribution has sampled",
        "`expected_scores`, `policy_loss` (cispo)",
        "[sums over a vocabulary](grpo.md#3-correction-of-the-rollouts), [theory](grpo.md#what-theory-says)",
    ),
    (
        "[DFT](https://arxiv.org/abs/2508.05629)",
        "`loss: dft`, for SFT",
        "SFT with each token weighted by its probability",
        "`cross_entropy` (dft)",
        "[loss](sft.md#the-loss)",
    ),
    (
        "[SDFT](https://arxiv.org/abs/2601.19897)",
        '`algorithm: {type: distill, teacher: self, teacher_ema: 0.01, teacher_prompt: "{prompt} {response}", '
        "divergence: forward, skip_tokens: 3}`",
        "Self-distillation from a teacher that reads a demonstration, as in the authors' code; the paper's equation 1 "
        "has `--divergence reverse`",
        "`vocabulary_divergence`",
        "[equal to a loop, and it learns](distillation.md#what-was-verified)",
    ),
]
OF_ADVANTAGES = {"gdpo": "decoupled_advantages", "turns": "turn_advantages", "reinforce++": "returns_to_go"}


def page() -> str:
    return MARKED.sub(lambda found: f"{found[1]}\n{table()}\n{found[2]}", PAGE.read_text(encoding="utf-8"))


def table() -> str:
    """A row for each command that trains, in their order."""
    from coati.commands import COMMANDS

    return (
        HEADER
        + "".join(row(*cells_of(command)) for command in COMMANDS.values())
        + "".join(row(*cells) for cells in VARIANTS)
    )


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


def cells_of(command) -> tuple[str, ...]:
    """Of a command's row."""
    method, kind = METHODS[command.name], settings_of(command)
    papers = ", ".join(f"[{name}](https://arxiv.org/abs/{number})" for number, name in method.papers.items())
    configuration = method.configuration or f"`algorithm: {{type: {command.name}}}`"
    what = re.sub(r" \([^()]*\)", "", command.title)
    return papers, configuration, what, functions_of(command.algorithm, kind), method.checked


def settings_of(command) -> dict:
    """The defaults of a method's settings, by name; none for SFT."""
    from coati.config.schema import section_classes, types_of
    from coati.trainers.algorithms import ALGORITHMS

    field = ALGORITHMS[command.algorithm].config.__pydantic_fields__.get("algorithm")
    kinds = {} if field is None else {types_of(kind)[0]: kind for kind in section_classes(field.annotation)}
    if command.name not in kinds:
        return {}
    fields = kinds[command.name].__pydantic_fields__
    return {name: field.get_default(call_default_factory=True) for name, field in fields.items()}


def functions_of(algorithm: str, a: dict) -> str:
    """Those of `coati.losses` that a method's objective is made of."""
    match algorithm:
        case "sft":
            names = ["cross_entropy"]
        case "reward":
            names = ["pairwise_reward_loss", "objective_loss"]
        case "prm":
            names = ["step_reward_loss", "first_wrong"]
        case "preference":
            names = ["kto_loss" if a["type"] == "kto" else "preference_loss"]
        case "ppo":
            names = ["gae", "length_adaptive_lambda" if a["length_adaptive_alpha"] else "", "policy_loss", "value_loss"]
            names += ["bounded_values"] if a["value_range"] else []
        case "grpo":
            names = [OF_ADVANTAGES.get(a["advantage"], "group_advantages"), "policy_loss", "aggregation_weights"]
            names += ["observation_loss"] if a["observation_coefficient"] else []
        case "distill":
            names = ["vocabulary_divergence"]
    options = {"group_advantages": "advantage", "policy_loss": "policy_loss", "aggregation_weights": "aggregation"}
    options |= {"preference_loss": "type"}
    told = [f"`{name}` ({a[options[name]]})" if name in options else f"`{name}`" for name in names if name]
    return ", ".join(told)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
