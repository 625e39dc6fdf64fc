"""Settings of what learns from preferences: reward models, and the policies of the DPO family and of KTO."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from coati.config import ListOf, Settings, inherited, option, section, settings
from coati.trainers.config.base import TrainerConfig

OF_PAIRS = ("use_margin", "label_smoothing", "centering", "tie_theta", "share_prompts")  # settings of a reward model

SHARE_PROMPTS = "read what a pair's responses both begin with once: faster where prompts are long"


def problems_of_shared_prompts(config: "RewardConfig | PreferenceConfig") -> Iterator[str]:
    """What can't be read so."""
    if config.algorithm.share_prompts and config.model.padding_free:
        yield "share_prompts reads pairs without padding in its own way: leave out padding_free"
    if config.algorithm.share_prompts and config.parallel.splits_models:
        yield "share_prompts needs replicated models: leave it out with tensor, pipeline or sequence parallelism"


@settings
class RewardModeling(Settings):
    """Bradley-Terry rewards (1706.03741; InstructGPT, 2203.02155), or regression on scores (HelpSteer2, 2406.08673)."""

    type: Literal["reward"] = option("reward", "the method")
    use_margin: bool = option(False, "demand the data's margin between the two rewards (Llama 2)")
    label_smoothing: float = option(0.0, "share of the pairs taken to be labeled the wrong way round", ge=0, lt=1)
    centering: float = option(0.0, "weight of (chosen + rejected)^2, which keeps rewards near zero", ge=0)
    tie_theta: float = option(
        1.0, "theta of Rao and Kupper (1967), for data with ties: above 1, and they have a probability", ge=1
    )
    share_prompts: bool = option(False, SHARE_PROMPTS)
    objectives: ListOf[str] = option(
        (), "instead of pairs, learn the scores that rows have of these objectives, each as an output of the model"
    )

    def problems(self) -> Iterator[str]:
        if twice := [name for name in self.objectives if self.objectives.count(name) > 1]:
            yield f"objectives has {twice[0]} twice: name each once"
        fields = self.__pydantic_fields__
        changed = [name for name in OF_PAIRS if getattr(self, name) != fields[name].default]
        if self.objectives and changed:
            yield f"{', '.join(changed)} are for pairs, of which there are none with objectives: leave them out"


@settings
class RewardConfig(TrainerConfig):
    """Settings of a reward-model run."""

    algorithm: RewardModeling = section(RewardModeling, "what is learned from preferences, or from scores")

    @property
    def longest_row(self) -> int:
        return self.data.max_length if self.algorithm.objectives else 2 * self.data.max_length

    def problems(self) -> Iterator[str]:
        yield from problems_of_shared_prompts(self)


@settings
class ProcessRewardModeling(Settings):
    """Rewards of steps (Let's Verify Step by Step, 2305.20050; Math-Shepherd, 2312.08935)."""

    type: Literal["prm"] = option("prm", "the method")


@settings
class PRMConfig(TrainerConfig):
    """Settings of a process-reward-model run."""

    algorithm: ProcessRewardModeling = section(ProcessRewardModeling, "what is learned from the steps")


@settings
class PreferenceAlgorithm(Settings):
    """A loss on responses that are better or worse.

    Attributes:
        has_reference: whether it compares the policy with a reference; is_paired: whether it compares two responses.
    """

    has_reference: ClassVar[bool] = True
    is_paired: ClassVar[bool] = True
    # those that a method can't set
    label_smoothing: ClassVar[float] = 0.0
    gamma: ClassVar[float] = 0.0
    length_normalized: ClassVar[bool] = False
    share_prompts: ClassVar[bool] = False
    cache_reference: ClassVar[bool] = False

    beta: float = option(
        0.1, "scale of the rewards; with a reference, how strongly it holds the policy", gt=0, common=True
    )


@settings
class PairedAlgorithm(PreferenceAlgorithm):
    """A loss on pairs."""

    nll_coefficient: float = option(0.0, "weight of the chosen responses' negative log-likelihood per token", ge=0)
    share_prompts: bool = option(False, SHARE_PROMPTS)


@settings
class ReferencedAlgorithm(PairedAlgorithm):
    """A loss on pairs that compares the policy with a reference."""

    cache_reference: bool = option(
        False, "compute the reference's log-probs once, keep them in --cache_dir and leave its model out"
    )


@settings
class DPO(ReferencedAlgorithm):
    """Direct preference optimization (2305.18290)."""

    type: Literal["dpo"] = option("dpo", "the method")
    label_smoothing: float = option(0.0, "share of the pairs labeled the wrong way round (cDPO)", ge=0, lt=1)
    length_normalized: bool = option(False, "average a response's log-probs")


@settings
class RobustDPO(ReferencedAlgorithm):
    """DPO for noisy labels (2403.00409)."""

    type: Literal["robust-dpo"] = option("robust-dpo", "the method")
    label_smoothing: float = option(0.1, "share of the pairs labeled the wrong way round", ge=0, lt=0.5)
    length_normalized: bool = option(False, "average a response's log-probs")


@settings
class IPO(ReferencedAlgorithm):
    """Identity preference optimization (2310.12036)."""

    type: Literal["ipo"] = option("ipo", "the method")


@settings
class Hinge(ReferencedAlgorithm):
    """SLiC's hinge loss on DPO's rewards (2305.10425)."""

    type: Literal["hinge"] = option("hinge", "the method")
    length_normalized: bool = option(False, "average a response's log-probs")


@settings
class SimPO(PairedAlgorithm):
    """SimPO (2405.14734)."""

    has_reference: ClassVar[bool] = False
    type: Literal["simpo"] = option("simpo", "the method")
    beta: float = inherited(PreferenceAlgorithm, "beta", 2.0)
    gamma: float = option(0.5, "the margin by which the chosen response's reward should be the larger", ge=0)
    label_smoothing: float = option(0.0, "share of the pairs labeled the wrong way round", ge=0, lt=1)


@settings
class ORPO(PairedAlgorithm):
    """Odds ratio preference optimization (2403.07691)."""

    has_reference: ClassVar[bool] = False
    type: Literal["orpo"] = option("orpo", "the method")
    nll_coefficient: float = inherited(PairedAlgorithm, "nll_coefficient", 1.0)


@settings
class CPO(PairedAlgorithm):
    """Contrastive preference optimization (2401.08417)."""

    has_reference: ClassVar[bool] = False
    type: Literal["cpo"] = option("cpo", "the method")
    nll_coefficient: float = inherited(PairedAlgorithm, "nll_coefficient", 1.0)
    label_smoothing: float = option(0.0, "share of the pairs labeled the wrong way round", ge=0, lt=1)
    length_normalized: bool = option(False, "average a response's log-probs")


@settings
class KTO(PreferenceAlgorithm):
    """Kahneman-Tversky optimization (2402.01306), from responses that are good or bad."""

    is_paired: ClassVar[bool] = False
    type: Literal["kto"] = option("kto", "the method")
    desirable_weight: float = option(1.0, "weight of good responses", ge=0)
    undesirable_weight: float = option(1.0, "weight of bad responses", ge=0)


@settings
class PreferenceConfig(TrainerConfig):
    """Settings of a preference run."""

    algorithm: Annotated[DPO | RobustDPO | IPO | Hinge | SimPO | ORPO | CPO | KTO, Field(discriminator="type")] = (
        section(DPO, "what is learned from the preferences, see docs/preference.md")
    )

    @property
    def longest_row(self) -> int:
        return 2 * self.data.max_length if self.algorithm.is_paired else self.data.max_length

    def problems(self) -> Iterator[str]:
        yield from problems_of_shared_prompts(self)
        if not self.algorithm.is_paired and self.batch_size < 2:
            yield "kto pairs each prompt with another row's response: batch_size must be at least 2"
