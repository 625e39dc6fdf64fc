"""What PPO and GRPO are put together from: a policy that responds to prompts, rewards that score, and a reference."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coati.config.generation import GenerationConfig
from coati.data import TokenizedDataset, TokenSequence
from coati.errors import UserError
from coati.models import ObjectiveRewardModel, ProcessRewardModel, RewardModel
from coati.parallel import Engine, Runtime, resolve_precision
from coati.parallel.engine import DTYPES
from coati.rewards import EnvironmentReward, ModelReward, ObjectivesReward, ProcessReward, Reward, Scorer
from coati.rewards.config import ModelRewardSettings, ProcessRewardSettings
from coati.rollout import (
    RolloutShape,
    RolloutSource,
    Sampler,
    ScoredGeneration,
    SynchronousRollouts,
    has_kv_cache,
    prompt_of,
)
from coati.rollout.ahead import AsynchronousRollouts, GenerationAhead
from coati.rollout.partial import GenerationInParts
from coati.rollout.remote import DifferenceWriter, Generators, RemoteSampler, WeightVersions
from coati.rollout.remote.journal import remove_before
from coati.rollout.source import environment_metrics
from coati.run_layout import ACTOR, JOURNAL, WEIGHTS, step_of
from coati.samples import Sample
from coati.trainers.batching import Batching
from coati.trainers.config import RolloutConfig
from coati.trainers.generator import check_generators
from coati.trainers.policy import LanguageModel
from coati.trainers.trainer import Trainer

TEXTS = ("prompt", "response", "conversation")  # of a sample's row for the report; the rest are numbers
ROWS_CHECKED = 1000  # by the rewards, of each data set, before anything is generated


class RolloutTrainer(Trainer):
    """Trains an `Actor` on its own responses. An algorithm fills in `build_models` and `step`.

    Args:
        rewards: rewards of weight 1 beside those that `config` names.
        **options: those of `Trainer`.

    Attributes:
        data, eval_data: the prompts; order: those of each iteration.
        actor: the engine of the policy.
        reference: what the policy's KL is measured to; None without a penalty.
        generation: completes and scores prompts on this process.
        rollouts: where an iteration's samples come from.
        versions: the weights that generators sample with, if there are any.
    """

    config: Any  # of a class derived from RolloutConfig
    best_metric = ("reward", True)
    learns_responses = False  # those of its data
    reference: LanguageModel | None
    rollouts: RolloutSource
    versions: WeightVersions | None = None

    def __init__(self, config: RolloutConfig, runtime: Runtime, *, rewards: Sequence[Reward] = (), **options):
        self.given_rewards = rewards
        super().__init__(config, runtime, **options)

    # --- for the algorithm to fill in

    def build_models(self) -> dict[str, Engine]:
        """The trained models by name, with `actor` first."""
        raise NotImplementedError

    def build_reference(self) -> LanguageModel | None:
        """A frozen copy of the policy that the run starts from, or the policy without its adapter."""
        c = self.config
        if not c.algorithm.needs_reference:
            return None
        frozen = self.factory.frozen_policy(c.model.path)
        if frozen is None:
            return LanguageModel(self.actor, adapter=False, group=c.shared_prefix_group)
        return LanguageModel(frozen, group=c.shared_prefix_group)

    def prompts(self, sources: list[str], weights: list[float] | None = None) -> TokenizedDataset | None:
        """The prompts of data sets; None for no sources."""
        return self.factory.dataset(sources, "row" if self.config.environment.path else "prompt", weights)

    def sampling(self, k: int) -> GenerationConfig:
        """How the tokens of iteration k are drawn."""
        return self.config.generation

    def longest_sequence(self) -> int:
        """The most tokens of a row that the run's models read: a prompt and its response, or an episode."""
        if self.config.environment.path:
            return self.config.environment.max_tokens
        prompts = [int(data.lengths.max()) for data in (self.data, self.eval_data) if data is not None]
        return max(prompts) + self.config.generation.max_new_tokens

    # --- building

    def build(self):
        c = self.config
        self.data = self.prompts(c.data.train_data, c.data.train_weights)
        self.eval_data = self.prompts(c.data.eval_data)
        self.order, self.total_steps = self.factory.order(self.data, self.start)
        self.batching = Batching(self.ranks, c.micro_batch_size, c.max_tokens_per_batch, c.model.padding_free)
        self.factory.longest_sequence = self.longest_sequence()
        self.engines = self.build_models()
        self.actor = self.engines[ACTOR]
        if not has_kv_cache(self.actor.module):
            raise UserError(
                f"{self.algorithm} needs a policy whose layers all keep keys and values; "
                f"{self.actor.module.config.model_type} has others"
            )
        self.reference = self.build_reference()
        scorer = self.build_scorer()
        for data in (self.data, self.eval_data):
            if data is not None:
                every = 1 + len(data) // ROWS_CHECKED
                scorer.check([data[row].columns for row in range(0, len(data), every)])
        for name, (reward, _) in scorer.rewards.items():
            if reward.about:
                self.runtime.say(f"reward {name}: {reward.about}")
        self.generation = ScoredGeneration(self.build_sampler(), scorer)
        self.rollouts = self.build_rollouts()

    def build_scorer(self) -> Scorer:
        environment, rewards = self.config.environment, list(self.given_rewards)
        if environment.path:
            rewards.append(EnvironmentReward(environment.turn_rewards))
        return self.factory.scorer(self.load_reward_model, rewards)

    def build_sampler(self) -> Sampler:
        """What samples on this process, with the current weights."""
        generator = self.factory.generator(self.actor, self.config.generation)
        return self.factory.sampler(generator, self.actor.module)

    def build_rollouts(self) -> RolloutSource:
        """Samples of the policy: drawn here when an iteration asks for them, or by generators if there are any."""
        c, generators = self.config, Generators.from_environment()
        if generators is None:
            if c.generators.max_staleness:
                raise UserError(
                    "max_staleness needs generators to be ahead: coati run --nproc_per_node N --generators 1 ..., or "
                    "leave it at 0"
                )
            return self.drawn_from(self.generation)
        check_generators(c)
        self.runtime.say(f"generators: {generators.count}, ahead by {c.generators.max_staleness} iterations")
        self.versions = self.build_versions()
        sampler = RemoteSampler(
            generators,
            self.versions,
            self.folder.path / JOURNAL,
            plays_episodes=self.generation.sampler.plays_episodes,
            settings=asdict(c.environment) | {"heads": c.heads, "routing": c.router_replay},
            rank=self.ranks.rank,
            world_size=self.ranks.world_size,
        )
        remote = ScoredGeneration(sampler, self.generation.scorer)
        ahead: GenerationAhead | GenerationInParts = GenerationAhead(remote)
        if c.generators.partial_rollouts:
            ahead = GenerationInParts(remote, c.generators.max_staleness, c.generation.max_new_tokens)
        return AsynchronousRollouts(self.drawn_from(ahead), ahead, self.versions, self.total_steps)

    def build_versions(self) -> WeightVersions:
        """The policy's weights as generators get them."""
        c, where = self.config, self.config.generators.weights_folder
        return WeightVersions(
            self.folder.path / WEIGHTS if where is None else Path(where),
            self.actor.state_dict,
            self.actor.whole,
            DTYPES[resolve_precision(c.parallel)],
            self.runtime,
            c.generators.max_staleness,
            DifferenceWriter() if c.generators.weights_format == "differences" else None,
        )

    def drawn_from(self, generation: ScoredGeneration | GenerationAhead | GenerationInParts) -> SynchronousRollouts:
        """The samples of an iteration's prompts."""
        c = self.config
        group_size, minibatches = c.responses // c.batch_size, c.algorithm.minibatches
        return SynchronousRollouts(
            generation,
            self.data,
            self.order,
            RolloutShape(prompts=c.prompts, group_size=group_size, minibatches=minibatches),
            self.ranks,
            seed=c.seed,
            sampling=self.sampling,
            pad_id=self.factory.pad_id,
            device=self.runtime.device,
            max_refills=c.refills,
            oversampling=c.oversampling,
            rest_epochs=c.rest_epochs,
            staleness=c.generators.max_staleness,
        )

    def load_reward_model(
        self, source: str, settings: ModelRewardSettings | ProcessRewardSettings | None = None
    ) -> Reward:
        """A reward model, or a process reward model, which reads the policy's tokens.

        Args:
            settings: of the reward; None for a reward model of one score.

        Raises:
            UserError: its tokenizer is another one; it is no such model; see `objective_weights`.
        """

        def loaded(model_class):
            model = self.factory.model(model_class, source)
            self.factory.check_head(model, source)
            return self.factory.frozen(model).forward_all

        self.factory.check_reward_vocabulary(source)
        how = (self.factory.pad_id, self.runtime.device, self.batching.split)
        if isinstance(settings, ProcessRewardSettings):
            steps = dict(tokenizer=self.tokenizer, separator=self.factory.step_separator(source))
            return ProcessReward(loaded(ProcessRewardModel), *how, **steps, reduce=settings.reduce)
        weights = self.factory.objective_weights(source, settings.objectives if settings else None)
        if weights is None:
            return ModelReward(loaded(RewardModel), *how)
        return ObjectivesReward(ModelReward(loaded(ObjectiveRewardModel), *how), weights)

    def accumulates(self) -> bool:
        """Whether a minibatch may take several micro-batches."""
        c = self.config
        return c.responses // c.algorithm.minibatches // self.ranks.world_size > c.micro_batch_size

    # --- files

    def state(self):
        return self.rollouts.state()

    def load_state(self, state):
        self.rollouts.load_state(state, self.steps_done)
        if self.versions is not None:
            self.versions.load(self.folder.resumed_from / WEIGHTS, self.steps_done)

    def save_files(self, checkpoint):
        if self.versions is None:
            return
        self.versions.save(checkpoint / WEIGHTS, self.steps_done)
        before = self.folder.checkpoints.newest()  # this one isn't complete yet
        if before is not None and self.runtime.is_main and not self.config.generators.keep_journal:
            remove_before(self.folder.path / JOURNAL, step_of(before) - self.config.generators.max_staleness)

    # --- evaluation

    def evaluate(self):
        """Mean reward, length and share of finished responses on the evaluation prompts, and as `METRIC/VALUE` on those
        with each value of `eval_column`; the texts.

        Raises:
            UserError: no prompt has the column, or a value has a reward's name.
        """
        data, ranks, column = self.eval_data, self.ranks, self.config.evaluation.eval_column
        if data is None:
            return {}, []
        # every rank completes equally many prompts; the copies that fill up are left out
        filled = list(range(len(data))) + [0] * (-len(data) % ranks.world_size)
        mine = list(enumerate(filled))[ranks.rank :: ranks.world_size]
        prompts = [prompt_of(data, row, [self.config.seed, place]) for place, row in mine]
        samples = self.generation.sample(prompts, self.config.evaluation_sampling).samples
        told = zip(self.sample_rows(samples), [sample.columns.get(column) for sample in samples], strict=True)
        found = [(place, of_sample) for (place, _), of_sample in zip(mine, told, strict=True)]
        of_places = dict(pair for of_rank in ranks.gather(found) for pair in of_rank)
        rows, values = zip(*(of_places[place] for place in range(len(data))), strict=True)
        metrics = mean_row(rows)
        parts = sorted({str(value) for value in values if value is not None})
        if column is not None and not parts:
            raise UserError(f"no row of eval_data has the field {column!r}: correct --eval_column")
        for part in parts:
            of_part = mean_row([row for row, value in zip(rows, values, strict=True) if str(value) == part])
            of_part = {f"{name}/{part}": mean for name, mean in of_part.items()}
            if twice := of_part.keys() & metrics.keys():
                raise UserError(f"{min(twice)} would be two metrics: give the reward another `name` than {part!r}")
            metrics |= of_part
        return metrics, list(rows[: self.config.evaluation.samples])

    def sample_rows(self, samples: list[Sample]) -> list[dict[str, Any]]:
        """What the report tells of each of this rank's samples; numbers are averaged over all samples."""
        return [sample_row(sample) for sample in samples]


def mean_row(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each number over the rows that have it, NaN if none has."""
    means = {}
    for name in dict.fromkeys(name for row in rows for name in row if name not in TEXTS):
        values = [row[name] for row in rows if row.get(name) is not None]
        means[name] = sum(values) / len(values) if values else float("nan")
    return means


def after_prompt(prompt: list[int], sample: Sample) -> TokenSequence:
    """A sample's response after another prompt."""
    start = sample.response_mask.index(True)
    mask = [False] * len(prompt) + sample.response_mask[start:]
    return TokenSequence(prompt + sample.tokens[start:], mask)


def sample_row(sample: Sample) -> dict[str, Any]:
    """What the report tells of a sample."""
    rewards = {f"reward/{name}": value for name, value in sample.rewards.items()}
    if sample.rewards:
        rewards = {"reward": sample.total_reward} | rewards
    failed = {f"reward/{name}/failed": float(value) for name, value in sample.failed.items()}
    details = {f"reward/{name}": value for name, value in sample.details.items()}
    told = {"response": transcript(sample), "conversation": conversation(sample)} if sample.turns else {}
    row = {
        "prompt": sample.prompt,
        "response": sample.response,
        **told,
        **rewards,
        **failed,
        **details,
        "response_length": sample.response_length,
        "finished": float(not sample.truncated),
    }
    return row | (environment_metrics(sample) if sample.messages else {})


def transcript(sample: Sample) -> str:
    """An episode from its first response on."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in from_first_response(sample))


def conversation(sample: Sample) -> list[dict[str, Any]]:
    """The same as messages: role and content, of the policy's also the turn's reward and how many tokens it has."""
    turns, told = iter(sample.turns), []
    for message in from_first_response(sample):
        row = {"role": message["role"], "content": message["content"]}
        if message["role"] == "assistant":
            turn = next(turns)
            row |= {"reward": turn.reward, "tokens": turn.end - turn.start}
            row |= {"malformed_call": message["malformed_call"]} if "malformed_call" in message else {}
        told.append(row)
    return told


def from_first_response(sample: Sample) -> list[dict[str, Any]]:
    """An episode's messages."""
    first = next(i for i, message in enumerate(sample.messages) if message["role"] == "assistant")
    return sample.messages[first:]
