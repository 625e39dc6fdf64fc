"""Substitutes for a trainer's data, models and generators, so that its own code shows what it needs."""

import copy
import math
from collections import defaultdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coati.config.plugin import PLUGINS
from coati.data import PreferenceSample, PromptSample, ScoredSample, StepwiseSample, TokenSequence, UnpairedSample
from coati.data.teaching import Teaching
from coati.judges.local import SharedModel
from coati.models import Actor, ActorCritic, Critic, ObjectiveRewardModel, ProcessRewardModel, RewardModel
from coati.models.actor import MAX_LOGITS
from coati.models.distillation import Student, Teacher
from coati.models.lora import is_adapter
from coati.models.quantized import wanted_quantization
from coati.models.shared_weights import SharedWeights
from coati.parallel import Communicator, Runtime
from coati.parallel.factory import describing_class
from coati.planner.engine import PlannedEngine
from coati.planner.live import LiveMemory
from coati.planner.parallel import Part
from coati.planner.quantized import bits_per_weight, pack_linear_layers
from coati.planner.rollouts import PlannedEpisodes, PlannedGenerator, PlannedReader, PlannedReward, PlannedSharedJudge
from coati.rewards import Scorer
from coati.rewards.config import (
    ClassifierRewardSettings,
    EnsembleRewardSettings,
    JudgedRewardSettings,
    JudgeRewardSettings,
)
from coati.trainers.factory import Factory

NAMES = {Actor: "actor", ActorCritic: "actor", Critic: "critic", RewardModel: "reward model"}
NAMES |= {ObjectiveRewardModel: "reward model", ProcessRewardModel: "process reward model"}
NAMES |= {Student: "actor", Teacher: "teacher"}
QUESTION = 256  # tokens that a judge reads beside a prompt and its responses


class RanksAlike(Communicator):
    """Ranks that all have what this one has."""

    def data_parallel(self, processes):
        return RanksAlike(self.rank, self.world_size // processes, self.device)

    def sum(self, x):
        alone = Communicator(0, 1, self.device)
        return alone.sum(x) * self.world_size

    def any(self, flag):
        return flag

    def gather(self, obj):
        return [obj] * self.world_size

    def broadcast(self, obj):
        return obj


class PlannedRuntime(Runtime):
    """Rank 0 of a run that is not started."""

    def __init__(self, processes: int):
        device = torch.device("cpu")
        super().__init__(0, processes, 0, device, RanksAlike(0, processes, device))

    def say(self, line):
        """A plan is silent."""


class PlannedTokenizer:
    """Tokens have no texts."""

    bos_token_id, eos_token_id, pad_token_id = None, 1, 2
    all_special_ids = (1, 2)

    def __len__(self) -> int:
        return 1000

    def __call__(self, text: str, **_) -> dict[str, list]:
        return {"input_ids": [], "offset_mapping": []}

    def decode(self, ids, **_) -> str:
        return ""

    def batch_decode(self, rows, **_) -> list[str]:
        return [""] * len(rows)


class LongestRows:
    """Rows of the maximum length that the settings allow, no two alike.

    Args:
        kind: as `build_dataset`.
        rows: how many there are.
        learned: whether all tokens but the first are targets; else only the last one is.
        teaching: how teachers read them.
        objectives: how many scores each has.
    """

    key, part_names, weights_per_row = "planned", ["planned"], None

    def __init__(self, kind: str, rows: int, config, *, learned: bool, teaching: Teaching, objectives: int):
        self.kind, self.config, self.learned, self.objectives = kind, config, learned, objectives
        self.length = config.data.max_prompt_length if kind == "prompt" else config.data.max_length
        self.teaching = teaching
        self.teacher_length = None if teaching.prompt is None or kind != "prompt" else config.data.max_length
        self.lengths = np.full(rows, max(self.length, self.teacher_length or 0))
        self.part_of_row = np.zeros(rows, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.lengths)

    def teachers_of(self, rows):
        """In turn."""
        return [self.teaching.names[row % len(self.teaching.names)] if self.teaching.names else None for row in rows]

    def __getitem__(self, row: int):
        ids = np.random.default_rng(row).integers(3, 1000, self.length).tolist()
        if self.kind in ("prompt", "row"):
            if self.teacher_length is None:
                return PromptSample(ids, "", {})
            return PromptSample(ids, "", {}, [3] * self.teacher_length, [] if self.teaching.has_place else None)
        first = min(1, self.length - 1) if self.learned else self.length - 1
        targets = [place >= first for place in range(self.length)]
        sequence = TokenSequence(ids, targets)
        if self.kind == "unpaired":
            return UnpairedSample(sequence, row % 2 == 0)
        if self.kind == "stepwise":
            return StepwiseSample(sequence, [1.0 if target else math.nan for target in targets])
        if self.kind == "scored":
            return ScoredSample(sequence, [1.0] * self.objectives)
        if self.kind in ("preference", "comparison"):  # responses that differ from the middle of the row on
            half = self.length // 2
            other = TokenSequence([*ids[:half], *(id + 1 for id in ids[half:])], targets)
            return PreferenceSample(sequence, other, 0.0)
        return sequence


class PlannedFactory(Factory):
    """Makes models without weights, and data of the maximum length.

    Args:
        model_config_of: the transformers config of the model in a folder; base_of: whose weights they are, without
            adapters.
        layers: that deeper models are truncated to.
        part: which part of split models is this rank's.

    Attributes:
        depths: layers that the models really have, by name.
    """

    def __init__(
        self,
        live: LiveMemory,
        model_config_of,
        base_of,
        layers: int,
        part: Part,
        on_gpu: bool,
        config,
        runtime,
        *,
        learns_responses: bool,
    ):
        self.live, self.model_config_of, self.base_of = live, model_config_of, base_of
        self.layers, self.part, self.on_gpu = layers, part, on_gpu
        self.config, self.runtime, self.tokenizer, self.longest_sequence = config, runtime, PlannedTokenizer(), 0
        self.depths: dict[str, int] = {}
        self.shared_weights = defaultdict(lambda: SharedWeights(same_shape))  # by the folder they come from
        self.kept: list[Any] = []

    def dataset(self, sources, kind, weights=None, teaching=None, part_column=None, objectives=()):
        if not sources:
            return None
        c, learned = self.config, sources != self.config.data.eval_data
        rows = 1  # which is in all batches, on every rank
        if learned and kind in ("prompt", "row"):  # equal prompts would be read once
            rows = max(c.batch_size, len(teaching.names) if teaching else 0)
        if not learned and kind == "sft":  # whose first rows are completed
            rows = max(c.evaluation.samples, 1)
        how = dict(learned=learned, teaching=teaching or Teaching(), objectives=len(objectives))
        return LongestRows(kind, rows, c, **how)

    def model(self, model_class, pretrained, *, lora=None, own_config=False, dtype=None, **options):
        c, model_config = self.config, copy.deepcopy(self.model_config_of(pretrained))
        depth = truncate_layers(model_config, self.layers)
        if self.on_gpu:  # fused attention recomputes its dropout in the backward pass; a CPU keeps all of it
            model_config.attention_dropout = model_config.attn_pdrop = 0.0
        kind = describing_class(c.parallel)
        is_adapted = pretrained is not None and is_adapter(pretrained)
        with torch.device("meta"):
            how = dict(  # as `BaseModel`: a folder's own adapter is trained
                lora=None if is_adapted else lora,
                dtype=dtype or kind.loads_in(c.parallel),
                attn_implementation=c.model.attn_implementation,
            )
            model = model_class(None, model_config, **how, **options)
            if is_adapted:
                add_adapter(model, pretrained)
        quantization = self._quantization(pretrained, model_config, lora)
        if quantization is not None:
            pack_linear_layers(model.transformer, bits_per_weight(quantization))
        on_host = (forget, remember) if self.on_gpu else (Tensor.clone, Tensor.clone)
        self._spare_memory(model, on_host)
        if self.on_gpu:  # fake tensors are on the CPU
            model.max_logits = MAX_LOGITS["cuda"]
        model.depth, model.base = depth, self.base_of(pretrained)
        self._share_frozen_weights(model)
        return model

    def _quantization(self, pretrained, model_config, lora):
        """How a model's weights are quantized: where they are stored, when its adapter was trained, or by the
        settings."""
        if (stored := getattr(model_config, "quantization_config", None)) is not None:
            return stored
        adapter = pretrained if pretrained is not None and is_adapter(pretrained) else None
        return wanted_quantization(adapter, self._quantizes(pretrained, lora))

    def trained(self, model, *, accumulates, generates=False):
        return self._engine(NAMES[type(model)], model, trained=True, accumulates=accumulates, generates=generates)

    def frozen(self, model, *, changes=False):
        if not changes and not model.has_adapter:  # adapters of one base are different ones
            self._share_frozen_weights(model.requires_grad_(False))
        name = "reference" if type(model) is Actor else NAMES[type(model)]
        return self._engine(name, model, trained=False)

    def frozen_teacher(self, model, *, changes=False):
        if PLUGINS[self.config.parallel.plugin].shards_weights:  # its own output layer, see `Teacher.keep_head`
            head = model.transformer.get_output_embeddings().weight
            self.kept.append(self.live.make(2 * head.numel(), ("teacher", "parameters")))
        return self.frozen(model, changes=changes)

    def averaged_teacher(self, model, student):
        if self.config.parallel.precision != "fp32":  # see `Engine.keep_averages`
            trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
            self.kept.append(self.live.make(4 * trained, ("teacher", "parameters")))
        return self.frozen_teacher(model, changes=True)

    def _share_frozen_weights(self, model):
        """Those that come from the same folder are taken to be the same."""
        if self.config.parallel.holds_whole_models:
            self.shared_weights[model.base].share(model)

    def _engine(self, name: str, model, **how) -> PlannedEngine:
        how |= dict(on_gpu=self.on_gpu)
        self.depths[name] = model.depth
        return PlannedEngine(self.live, name, model, self.config.parallel, self.runtime, self.part, **how)

    def generator(self, engine, sampling):
        return PlannedGenerator(self.live, engine, self.tokenizer.eos_token_id, sampling.generation_batch_size)

    def sampler(self, generator, policy):
        limits = self.config.environment
        return super().sampler(generator, policy) if limits.path is None else PlannedEpisodes(generator, limits)

    def scorer(self, load_model, given):
        rewards = [(PlannedReward(), 1.0)]
        for entry in self.config.rewards:
            how = () if isinstance(entry, EnsembleRewardSettings) else (entry,)
            rewards += [(load_model(path, *how), 1.0) for path in entry.model_paths]
            if isinstance(entry, ClassifierRewardSettings):
                rewards.append((self.reader("classifier", "AutoModelForSequenceClassification", entry), 1.0))
            if isinstance(entry, JudgedRewardSettings) and entry.path is not None:
                whole = self.config.parallel.holds_whole_models
                judge = self.reader("judge", "AutoModelForCausalLM", entry) if whole else self.shared_judge(entry)
                rewards.append((judge, 1.0))
        return Scorer(rewards)

    def reader(self, name: str, auto_class: str, entry: ClassifierRewardSettings | JudgedRewardSettings):
        """The model that a reward loads itself."""
        model_config, length = self.model_config_of(entry.path), partial(text_length, entry)
        return PlannedReader(self.live, name, auto_class, model_config, entry.batch_size, length)

    def shared_judge(self, entry: JudgedRewardSettings) -> PlannedSharedJudge:
        """The judge of which each process has a part."""
        engine = self._engine("judge", self.model(Actor, entry.path), trained=False)
        read = SharedModel(engine.forward_all, engine.data_ranks, self.runtime.device)
        return PlannedSharedJudge(read, entry.batch_size, partial(text_length, entry))

    def check_reward_vocabulary(self, source):
        """A plan needs no tokenizer."""

    check_teacher_vocabulary = check_reward_vocabulary

    def check_head(self, model, source):
        """Models of a plan have no files."""

    def step_separator(self, source):
        """Texts of a plan have no steps."""
        return "\n"

    def objective_weights(self, source, given):
        """A plan counts a model of several objectives as one of one score."""


def forget(x: Tensor) -> tuple[torch.Size, Tensor]:
    """What is kept of a tensor that waits in the host's memory."""
    return x.shape, x.new_empty(0)


def remember(kept: tuple[torch.Size, Tensor]) -> Tensor:
    shape, like = kept
    return like.new_empty(shape)


def text_length(entry: ClassifierRewardSettings | JudgedRewardSettings, tokens: int) -> int:
    """Tokens of a text that a reward's own model reads.

    Args:
        tokens: of the policy's longest sample.
    """
    if isinstance(entry, ClassifierRewardSettings):
        return min(tokens, entry.max_length or tokens)
    two_responses = isinstance(entry, JudgeRewardSettings) and entry.mode == "pairwise"
    return QUESTION + (2 if two_responses else 1) * tokens


def same_shape(one: torch.nn.Parameter, other: torch.nn.Parameter) -> bool:
    return one.shape == other.shape


def truncate_layers(model_config, layers: int) -> int:
    """Truncates a transformers config to so many layers; returns how many there were."""
    text_config = model_config.get_text_config()
    depth = text_config.num_hidden_layers
    text_config.num_hidden_layers = min(layers, text_config.num_hidden_layers)
    if isinstance(kinds := getattr(text_config, "layer_types", None), list):
        text_config.layer_types = kinds[: text_config.num_hidden_layers]
    return depth


def add_adapter(model, folder: str):
    """Puts an adapter like the one in a folder on a model."""
    from peft import PeftConfig, get_peft_model

    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False
    config.base_model_name_or_path = None  # a planned base has no name, and peft would tell that it is another
    model.model = get_peft_model(model.model, config)
