"""The making of what a run needs: tokenizer, data, models and their engines."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from coati.config.generation import GenerationConfig
from coati.config.plugin import PLUGINS
from coati.data import BatchSampler, TokenizedDataset, build_dataset, prepare_tokenizer
from coati.data.teaching import Teaching
from coati.errors import UserError
from coati.judges.local import LocalJudge, SharedModel, load_judge
from coati.models import Actor
from coati.models.adapters import vocabulary
from coati.models.base import BaseModel, ValueHeadModel
from coati.models.distillation import Teacher
from coati.models.generation_config import align_eos
from coati.models.long_rows import Pack, Unpack, from_host, split_feed_forward, to_host
from coati.models.lora import is_adapter
from coati.models.objectives import objective_weights
from coati.models.opened import open_model
from coati.models.packed import check_isolation
from coati.models.positions import row_limit
from coati.models.process_reward_model import stored_separator
from coati.models.quantized import is_quantized
from coati.models.shared_weights import SharedWeights
from coati.parallel import Engine, Runtime, make_engine, resolve_precision
from coati.parallel.engine import DTYPES
from coati.parallel.factory import engine_class
from coati.rewards import Reward, Scorer, load_rewards
from coati.rollout import (
    EpisodeSampler,
    Generator,
    PolicyGenerator,
    ResponseSampler,
    Sampler,
    check_conversations,
    load_environment,
    rendering_of,
)
from coati.rollout.prompts import eos_ids
from coati.run_layout import VERDICTS, model_folder
from coati.trainers.config import TrainerConfig


class Factory:
    """Makes a run's parts by its settings.

    Args:
        learns_responses: whether the data's responses are learned, which the chat template must then write and end.

    Attributes:
        tokenizer: of the run.
        longest_sequence: the most tokens of a row that the run's models read; set once the data is there.
    """

    def __init__(self, config: TrainerConfig, runtime: Runtime, *, learns_responses: bool):
        self.config, self.runtime = config, runtime
        self.tokenizer = self._load_tokenizer(learns_responses)
        self.longest_sequence = 0
        self.shared_weights = SharedWeights()
        self._said: set[str] = set()

    @property
    def pad_id(self) -> int:
        """What fills the rows of a batch; masks come from lengths, so any id would do."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    # --- data

    def dataset(
        self,
        sources: list[str],
        kind: str,
        weights: list[float] | None = None,
        teaching: Teaching | None = None,
        part_column: str | None = None,
        objectives: Sequence[str] = (),
    ) -> TokenizedDataset | None:
        """Tokenized rows, built on rank 0 first; None for no sources. See `build_dataset`."""
        if not sources:
            return None
        with self.runtime.main_first():
            how = (weights, teaching, part_column, objectives)
            data = build_dataset(sources, kind, self.tokenizer, self.config.data, *how)
        self.runtime.say(str(data.report))
        return data

    def order(self, data: TokenizedDataset, start: tuple[int, int]) -> tuple[BatchSampler, int]:
        """The order of the training data, and how many steps the run has.

        Args:
            start: the step that the run begins with, and the rows that were seen before it.
        """
        c, (step, seen) = self.config, start
        order = BatchSampler(len(data), c.batch_size, c.seed, weights_per_row=data.weights_per_row, start=start)
        left = math.ceil(c.epochs * order.batches_per_epoch) - seen / c.batch_size
        return order, c.steps or step + max(0, math.ceil(left))

    # --- models

    def model(
        self,
        model_class: type[BaseModel],
        pretrained: str | Path | None,
        *,
        lora=None,
        own_config: bool = False,
        dtype: torch.dtype | None = None,
        **options,
    ) -> BaseModel:
        """A model from a folder, or from `--model_config` with random weights.

        Args:
            own_config: the folder's config is used, whatever `--model_config` says.
            dtype: of the weights; what the plugin trains if not given.
            **options: of this class alone.

        Raises:
            UserError: neither is given; the tokenizer has more tokens than the model; the run's rows are too long for
                its positions.
        """
        c = self.config
        dtype = dtype or engine_class(c.parallel).loads_in(c.parallel)
        config = None
        if c.model.model_config and not own_config:
            config = self._model_config(from_scratch=pretrained is None)
        if pretrained is None and config is None:
            raise UserError("give --model FOLDER, or --model_config FILE to start from random weights")
        options |= dict(lora=lora, dtype=dtype, attn_implementation=c.model.attn_implementation)
        model = model_class(pretrained, config, quantize_base=self._quantizes(pretrained, lora), **options)
        tokens = vocabulary(model.transformer)
        if len(self.tokenizer) > tokens:
            raise UserError(
                f"the tokenizer has {len(self.tokenizer)} tokens but the model's vocabulary is {tokens}: "
                "use the model's own tokenizer, or resize its embeddings first"
            )
        if is_quantized(model.transformer) and c.parallel.model_parallel_size > 1:
            raise UserError(
                f"the weights of {pretrained} are quantized, which doesn't combine with tensor, pipeline or sequence "
                "parallelism: use --plugin zero2 alone, or the model in full precision"
            )
        self._spare_memory(model, (to_host, from_host))
        model.padding_free = c.model.padding_free
        self._check_length(model)
        align_eos(model.transformer, self.tokenizer.eos_token_id)
        for note in model.notes:
            self._say_once(note)
        self._share_frozen_weights(model)
        return model

    def _spare_memory(self, model: BaseModel, host: tuple[Pack, Unpack]):
        """Makes a model keep less for the backward pass, by the settings.

        Args:
            host: keeps tensors in the host's memory, and gives them back.
        """
        parallel = self.config.parallel
        if parallel.feed_forward_tokens:
            split_feed_forward(model.transformer, parallel.feed_forward_tokens)
        if parallel.gradient_checkpointing:
            model.enable_gradient_checkpointing(host if parallel.offload_activations else None)

    def _quantizes(self, pretrained: str | Path | nn.Module | None, lora) -> bool:
        """Whether the settings want a model's base in 4 bits: that of every adapter, and what the policy starts from.
        Not a teacher or a reward model that has all its weights for itself."""
        if self.config.model.quantize_base is None or isinstance(pretrained, nn.Module):
            return False
        is_start = pretrained is not None and str(pretrained) == self.config.model.path
        return lora is not None or is_start or (pretrained is not None and is_adapter(pretrained))

    def trained(self, model: BaseModel, *, accumulates: bool, generates: bool = False) -> Engine:
        """A model and its optimizer under the configured plugin.

        Args:
            accumulates: whether a step may take several micro-batches.
            generates: whether it samples, with unsharded weights.

        Raises:
            UserError: quantized weights, which only carry adapters; a loss of routers for a model without experts.
        """
        if is_quantized(model.transformer) and not model.has_adapter:
            raise UserError(
                f"the weights of {self.config.model.path} are quantized, so they can't be trained: train adapters on "
                "them (--lora_rank 16), or have the model in full precision"
            )
        c = self.config.optimizer
        optimizer = {"weight_decay": c.weight_decay, "betas": (c.adam_beta1, c.adam_beta2)}
        router_loss = self.config.model.router_loss
        how = dict(generates=generates, optimizer=optimizer, accumulates=accumulates, router_loss=router_loss)
        return self._make_engine(model, **how)

    def frozen(self, model: BaseModel, *, changes: bool = False) -> Engine:
        """A model that only computes.

        Args:
            changes: other weights will be written into its own, which no other model may have then.
        """
        if not changes:
            self._share_frozen_weights(model.requires_grad_(False))
        return self._make_engine(model)

    def _make_engine(self, model: BaseModel, **how) -> Engine:
        engine = make_engine(model, self.config.parallel, self.runtime, **how)
        if model.padding_free:
            check_isolation(model, engine.forward_all, self.runtime.device, wants_targets=isinstance(model, Teacher))
        return engine

    def frozen_policy(self, start) -> Engine | None:
        """A frozen copy of the policy that the run starts from; None where that is the policy without its adapter."""
        c = self.config
        if c.model.lora is not None and not (c.model.path and is_adapter(c.model.path)):
            return None
        return self.frozen(self.model(Actor, start))

    def frozen_teacher(self, model: Teacher, *, changes: bool = False) -> Engine:
        """A teacher, of which a student reads the output layer. Arguments as `frozen`."""
        parallel = self.config.parallel
        if PLUGINS[parallel.plugin].shards_weights:
            model.keep_head(DTYPES[resolve_precision(parallel)], self.runtime.device)
        return self.frozen(model, changes=changes)

    def averaged_teacher(self, model: Teacher, student: BaseModel) -> Engine:
        """A teacher whose weights are averages of the student's (`Engine.average_in`).

        Args:
            model: in float32.
            student: before its engine is made.
        """
        trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
        weights = {name: parameter.detach() for name, parameter in model.named_parameters() if name in trained}
        engine = self.frozen_teacher(model, changes=True)
        engine.keep_averages(weights)
        return engine

    def judge(self, path: str, batch_size: int) -> LocalJudge:
        """A judge in the run's processes: whole in each where models are, else spread over them by the plugin.

        Args:
            path: its folder; batch_size: questions per forward pass.

        Raises:
            UserError: it can't be opened, or can't be spread so.
        """
        parallel, device = self.config.parallel, self.runtime.device
        if parallel.holds_whole_models:
            return load_judge(path, device, batch_size)
        opened = open_model(model_folder(path, "judge"), engine_class(parallel).loads_in(parallel), "cpu")
        if is_quantized(opened.actor.transformer):
            raise UserError(
                f"the weights of the judge in {path} are quantized, and processes of this run share their models: give "
                "it in full precision, or put it behind an endpoint (endpoint, model)"
            )
        try:
            engine = self.frozen(opened.actor)
        except UserError as error:
            raise UserError(f"the judge in {path}: {error}; or put it behind an endpoint (endpoint, model)") from error
        opened.max_length -= 1  # a token more is read, see `SharedModel`
        reader = SharedModel(engine.forward_all, engine.data_ranks, device)
        return LocalJudge(path, opened, reader, device, batch_size)

    # --- rollouts

    def generator(self, engine: Engine, sampling: GenerationConfig) -> Generator:
        """Completes prompts with the weights that an engine has at the time of each call.

        Raises:
            UserError: this machine lacks what the settings need.
        """
        sampling.check_installed()
        return PolicyGenerator(engine.full, self.tokenizer, self.pad_id, sampling.generation_batch_size)

    def sampler(self, generator: Generator, policy: BaseModel) -> Sampler:
        """What samples single responses, or episodes with the environment of the settings.

        Raises:
            UserError: there is no such environment, or the chat template can't write its conversations.
        """
        c, ends = self.config, eos_ids(self.tokenizer, policy)
        if c.environment.path is None:
            return ResponseSampler(generator, self.tokenizer, ends, c.heads, c.router_replay)
        environment = load_environment(c.environment.path)
        renderer, call_format = rendering_of(
            environment, self.tokenizer, ends, c.environment.call_format, c.data.template_arguments
        )
        for note in check_conversations(renderer):
            self.runtime.say(note)
        return EpisodeSampler(generator, self.tokenizer, ends, environment, renderer, c.environment, call_format)

    def scorer(self, load_model: Callable[[str], Reward], given: Sequence[Reward]) -> Scorer:
        """The rewards of the settings.

        Args:
            load_model: makes a reward of a reward model's folder.
            given: further rewards, of weight 1.
        """
        c = self.config
        return load_rewards(
            c.rewards,
            c.scoring,
            load_model,
            self.runtime.device,
            given,
            load_local=self.judge,
            verdicts=Path(c.output_dir) / VERDICTS,
            group_size=c.responses // c.batch_size,
        )

    def check_reward_vocabulary(self, source: str):
        """Raises a UserError where a reward model's tokenizer is another one than the policy's."""
        way_out = "give it as a reward of type classifier with a tokenizer, which reads texts by its own"
        self._check_vocabulary(source, ("reward model", "policy"), way_out)

    def check_head(self, model: ValueHeadModel, source: str):
        """Raises a UserError where a reward model has a new head, since its folder has none."""
        model.check_head(source)

    def step_separator(self, source: str) -> str:
        """What separates the steps that a process reward model scores. Raises a UserError for any other model."""
        return stored_separator(source)

    def objective_weights(self, source: str, given: Mapping[str, float] | None) -> dict[str, float] | None:
        """How the objectives of a reward model count. See `coati.models.objectives.objective_weights`."""
        return objective_weights(source, given)

    def check_teacher_vocabulary(self, source: str):
        """Raises a UserError where a teacher's tokenizer is another one than the student's."""
        self._check_vocabulary(source, ("teacher", "student"), "choose a teacher of the student's family")

    def _check_vocabulary(self, source: str, roles: tuple[str, str], way_out: str):
        """Raises a UserError where the tokenizer beside a model is another one than the run's.

        Args:
            roles: that model's and the trained model's; way_out: what to do where it can't have the same.
        """
        from transformers import AutoTokenizer

        try:
            theirs = AutoTokenizer.from_pretrained(source).get_vocab()
        except (OSError, ValueError) as error:
            raise UserError(
                f"the {roles[0]} in {source} has no tokenizer beside it: copy the {roles[1]}'s there, or {way_out} "
                f"({str(error).splitlines()[0]})"
            ) from error
        ours = self.tokenizer.get_vocab()
        if theirs != ours:
            raise UserError(
                f"the {roles[0]} in {source} has another vocabulary than the {roles[1]} "
                f"({difference(ours, theirs)}): train it with the {roles[1]}'s tokenizer, or {way_out}"
            )

    def _check_length(self, model: BaseModel):
        limit, longest = row_limit(model.transformer), self.longest_sequence
        if limit is not None and longest > limit.tokens:
            raise UserError(
                f"rows of this run have up to {longest} tokens, and {type(model.transformer).__name__} {limit.reason} "
                f"{limit.tokens}: lower --max_length (of prompts: --max_prompt_length, of responses: --max_new_tokens)"
            )

    def _share_frozen_weights(self, model: BaseModel):
        """Only where each process has whole models: elsewhere a plugin makes other weights of a model's."""
        if not self.config.parallel.holds_whole_models:
            return
        saved = self.shared_weights.share(model) / 2**20
        if saved:
            self.runtime.say(
                f"{type(model).__name__}: {saved:.1f} MiB of frozen weights are shared with models before it"
            )

    def _say_once(self, note: str):
        if note not in self._said:
            self.runtime.say(note)
        self._said.add(note)

    def _load_tokenizer(self, learns_responses: bool):
        from transformers import AutoTokenizer

        c = self.config
        source = c.model.tokenizer or c.model.path
        if source is None:
            raise UserError("give --tokenizer FOLDER (or --model FOLDER, if the tokenizer is in it)")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(f"can't load a tokenizer from {source}: {str(error).splitlines()[0]}") from error
        how = dict(arguments=c.data.template_arguments, learns_responses=learns_responses)
        tokenizer, notes = prepare_tokenizer(tokenizer, c.data.chat_template, c.data.eos_token, **how)
        for note in notes:
            self.runtime.say(note)
        return tokenizer

    def _model_config(self, *, from_scratch: bool):
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.config.model.model_config)
        except (OSError, ValueError) as error:
            raise UserError(f"--model_config {self.config.model.model_config}: {str(error).splitlines()[0]}") from error
        if from_scratch:
            tokenizer = self.tokenizer
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            config.pad_token_id = self.pad_id
        return config


def difference(ours: dict[str, int], theirs: dict[str, int]) -> str:
    """The first token, by its id, that two vocabularies don't share, in words."""
    others = [(number, token) for token, number in ours.items() if theirs.get(token) != number]
    if not others:
        number, token = min((number, token) for token, number in theirs.items() if token not in ours)
        return f"token {number}, {token!r}, is there only"
    number, token = min(others)
    if token not in theirs:
        return f"token {number}, {token!r}, is missing there"
    return f"token {number}, {token!r}, is number {theirs[token]} there"
