"""What every run does whatever the algorithm: steps, evaluation, logs, checkpoints, resuming, stopping."""

import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coati.data import BatchSampler, TokenisedDataset, build_dataset, deal, prepare_tokenizer
from coati.errors import UserError, no_room
from coati.models import Actor
from coati.models.adapters import vocabulary
from coati.models.base import BaseModel, stored_dtype
from coati.models.generation_config import align_eos
from coati.models.lora import base_of_adapter, is_adapter
from coati.models.packed import check_packing
from coati.models.positions import row_limit
from coati.models.quantized import is_quantized
from coati.parallel import Checkpoints, Engine, Runtime, check_plugin, make_engine, resolve_precision
from coati.parallel.checkpoint import NAME, lock_folder, write_json
from coati.parallel.engine import DTYPES
from coati.parallel.factory import engine_class
from coati.parallel.runtime import seed_everything, use_deterministic_kernels
from coati.parallel.update import SkippedSteps
from coati.rewards import import_function
from coati.tracking import make_tracker, progress_bar, read_metrics
from coati.tracking.files import to_json
from coati.trainers.config import FINAL_MODEL, TrainerConfig
from coati.trainers.first_save import check_room, checkpoint_bytes, export_bytes, try_saving
from coati.trainers.resume import OTHER_ROWS, UNSAID, changed_settings, lines_of, refuse_other_models
from coati.trainers.schedule import learning_rate_at

MODELS = ("model", "critic_model", "reward_model")  # settings that name one


@dataclasses.dataclass(frozen=True)
class LossPart:
    """A term of the loss on this rank's micro-batches.

    Attributes:
        count: what the term is divided by, of one micro-batch (tokens, pairs, ...).
        loss: the share of the global term and of its metrics, given the model's output for a micro-batch, the
            micro-batch and the global count.
        options: keywords of the model's forward, beside token ids and mask.
        targets: of one micro-batch the tokens whose log-probs the loss reads, bool `[batch, seq]`; None for a model
            that gives something else.
    """

    micro_batches: Sequence[Any]
    count: Callable[[Any], Tensor]
    loss: Callable[[Any, Any, float], tuple[Tensor, dict[str, Tensor]]]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    targets: Callable[[Any], Tensor] | None = None


class Trainer:
    """The loop. An algorithm fills in `build`, `train_step` and `evaluate`.

    Attributes:
        algorithm: the stage's name in logs and reports.
        headline: the evaluation metric that tells the best checkpoint, and whether higher is better.
        rows_per_sample: what the model reads of a sample; 2 for pairs.
        learns_responses: whether it learns the data's answers, which the chat template must then write and end.
        members: rows of a batch whose common beginning is read once, see `PackedGroups`; 1 for none.
        engines: the trained models by name, saved with every checkpoint; the first is the run's product.
        frozen: models that are saved with every checkpoint although no optimiser moves them.
        step: optimiser steps (PPO: iterations) done.
        start: the step that this run begins with, and the rows of training data that were seen before it.
        lock: on the output folder, on rank 0, so that no other run writes there.
    """

    algorithm: str
    headline: tuple[str, bool]
    rows_per_sample = 1
    members = 1
    learns_responses = True
    lock = None

    def __init__(self, config: TrainerConfig, runtime: Runtime):
        self.config, self.runtime = config, runtime
        check_plugin(config, lora=config.lora_rank > 0 or bool(adapters_in(config)), world_size=runtime.world_size)
        self.communicator = runtime.data_ranks(config.model_parallel_size)
        config.check(self.communicator.world_size)
        if config.lora_rank > 0 and config.model is None:
            raise UserError("LoRA adapts a trained model: give --model FOLDER, or train all weights (--lora_rank 0)")
        self.evaluators = [import_function(place, "evaluator") for place in config.evaluators]
        self.output = Path(config.output_dir)
        self.checkpoints = Checkpoints(self.output / "checkpoints", runtime, config.keep_checkpoints)
        self.step = 0
        self.engines: dict[str, Engine] = {}
        self.frozen: dict[str, Engine] = {}
        try:
            self._prepare()
        except BaseException:
            self._unlock()
            raise

    def _prepare(self):
        """Takes the output folder, loads data and models, and what the checkpoint holds of them."""
        self.resumed_from = self._find_resume()
        self.stored = self._read_stored()
        self.start = (self.stored.get("step", 0), self.stored.get("rows", 0))
        self.tokenizer = self._load_tokenizer()
        self.said: set[str] = set()
        use_deterministic_kernels(self.config.deterministic)
        seed_everything(self.config.seed)  # models are created alike on every rank
        self.build()
        # from here on ranks draw their own, but for those that share one model's work
        seed_everything(self.config.seed + 1 + self.communicator.rank)
        if self.resumed_from:
            self._restore(self.resumed_from)

    # --- for the algorithm to fill in

    total_steps: int

    def build(self):
        """Makes data, models and `self.engines`; sets `total_steps`."""
        raise NotImplementedError

    def train_step(self, step: int) -> tuple[dict[str, float], int]:
        """One step: its metrics (the same on every rank) and the tokens it went through on all ranks."""
        raise NotImplementedError

    def longest_sequence(self) -> int:
        """The most tokens of a row that this run's models read: known once `build` has the data."""
        raise NotImplementedError

    def evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics (without prefix) and sample rows, on the evaluation data."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What the algorithm must remember besides models and random states, as JSON."""
        return {}

    def load_state(self, state: dict[str, Any]):
        """The inverse of `state`."""

    # --- the run

    def train(self):
        """Runs to the end, or to the step after a stop was asked for (SIGTERM): then it saves and returns."""
        self._announce()
        self._try_saving()
        settings = dataclasses.asdict(self.config)
        self.checkpoints.set_aside_after(self.step)
        resume_step = self.step if self.resumed_from else None
        tracker = make_tracker(
            self.output, self.config, algorithm=self.algorithm, settings=settings, resume_step=resume_step
        )
        try:
            status = self._loop(tracker)
            if status == "finished":
                self._export()
            tracker.finish(status)
        except BaseException as error:
            with contextlib.suppress(OSError):  # a full disk must not hide the error
                tracker.finish("failed")
            if isinstance(error, SkippedSteps):
                newest = self.checkpoints.newest() or "not written yet"
                raise UserError(f"step {self.step + 1}: {error}; the newest checkpoint is {newest}") from error
            if reason := no_room(error):
                raise UserError(
                    f"{self.output} can't be written at step {self.step} ({reason}): make room there, then go on with "
                    f"--resume auto; the newest checkpoint is {self.checkpoints.newest() or 'not written yet'}"
                ) from error
            raise
        finally:
            self._unlock()

    @property
    def skipped_steps(self) -> int:
        return sum(engine.skipped_steps for engine in self.engines.values())

    def _loop(self, tracker) -> str:
        if self.step == 0:
            self._evaluate(tracker)
        with progress_bar(self.total_steps, self.algorithm, self.config, initial=self.step) as bar:
            while self.step < self.total_steps:
                started = time.monotonic()
                metrics, tokens = self.train_step(self.step)
                self.step += 1
                metrics |= {"tokens_per_second": tokens / (time.monotonic() - started), "tokens": tokens}
                metrics["skipped_steps"] = self.skipped_steps
                if self._due(self.config.log_every):
                    tracker.log(metrics, self.step)
                bar.advance(tokens=tokens, **self._short(metrics))
                stop = self.communicator.any(self.runtime.stop_requested is not None)
                score = self._evaluate(tracker) if self._due(self.config.eval_every) and not stop else None
                if stop or self._due(self.config.save_every):
                    self._save(score)
                if stop and self.step < self.total_steps:
                    self.runtime.say(f"{self.runtime.stop_requested or 'a stop'} received: saved step {self.step}")
                    return "interrupted"
        return "finished"

    def _due(self, every: int) -> bool:
        return self.step == self.total_steps or (every > 0 and self.step % every == 0)

    def _evaluate(self, tracker) -> float | None:
        """Evaluates and logs; returns the headline, turned so that higher is better."""
        metrics, samples = self.evaluate()
        for evaluator in self.evaluators:
            metrics |= evaluator(self)
        if not metrics:
            return None
        tracker.log({f"eval/{name}": value for name, value in metrics.items()}, self.step)
        if samples:
            tracker.log_samples(samples, self.step)
        name, higher = self.headline
        self.runtime.say(f"{self.algorithm} step {self.step}: " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        if name not in metrics:
            return None
        return metrics[name] if higher else -metrics[name]

    def _short(self, metrics: dict[str, float]) -> dict[str, float]:
        """The few metrics that fit beside the progress bar."""
        names = ("loss", "accuracy", "reward", "kl")
        return {name: metrics[name] for name in names if name in metrics}

    # --- helpers for algorithms

    def inputs(self, batch, targets: Tensor | None = None) -> dict[str, Tensor]:
        """What a model is called with."""
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "right_padded": True}
        inputs |= {"members": self.members} if self.members > 1 else {}
        return inputs if targets is None else inputs | {"targets": targets}

    def check_packing(self, engine: Engine, batch, targets: Tensor):
        """Refuses models that don't give the same log-probs when what the batch's rows begin with is read once."""
        exact = resolve_precision(self.config) == "fp32"
        check_packing(engine.module, engine.forward_all, self.inputs(batch, targets), exact)

    def optimise(self, engine: Engine, parts: Sequence[LossPart], learning_rate: float) -> dict[str, float]:
        """One optimiser step. Each part of the loss is divided by its own global count, over all ranks.

        A step whose loss or gradient is not finite on some rank is skipped on all of them, see `Engine.step`.

        Raises:
            UserError: `max_skipped_steps` of this model's steps in a row were skipped.
        """
        with engine.update(learning_rate) as update:
            for part in parts:
                update.add(part.micro_batches, functools.partial(self.inputs_of, part), part.loss, part.count)
        return update.metrics

    def inputs_of(self, part: LossPart, batch) -> dict[str, Any]:
        return self.inputs(batch, part.targets(batch) if part.targets else None) | part.options

    def deal(self, rows: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """This rank's micro-batches of a global batch."""
        c, ranks = self.config, self.communicator
        budget = c.max_tokens_per_batch and c.max_tokens_per_batch // self.rows_per_sample
        return deal(rows, lengths, ranks.rank, ranks.world_size, c.micro_batch_size, budget)

    def learning_rate(self, peak: float) -> float:
        """The learning rate of the step being done: a function of the step alone, so nothing of it is stored."""
        c = self.config
        return learning_rate_at(self.step, self.total_steps, peak, c.schedule, c.warmup, c.final_rate)

    def dataset(self, sources: list[str], kind: str, weights: list[float] | None = None) -> TokenisedDataset | None:
        """Tokenised rows, built on rank 0 first; None for no sources."""
        if not sources:
            return None
        with self.runtime.main_first():
            data = build_dataset(sources, kind, self.tokenizer, self.config, weights)
        self.runtime.say(str(data.report))
        return data

    def rows_before(self, step: int) -> int:
        """Rows of the batches before this step, whatever size they had."""
        first, rows = self.start
        return rows + (step - first) * self.config.batch_size

    def sampler(self, data: TokenisedDataset) -> BatchSampler:
        """The order of the training data; sets `total_steps` if the config counts epochs."""
        c = self.config
        sampler = BatchSampler(len(data), c.batch_size, c.seed, weights_per_row=data.weights_per_row, start=self.start)
        step, seen = self.start
        left = math.ceil(c.epochs * sampler.batches_per_epoch) - seen / c.batch_size
        self.total_steps = c.steps or step + max(0, math.ceil(left))
        return sampler

    def model(self, model_class: type[BaseModel], pretrained: str | Path | None, *, lora=None) -> BaseModel:
        """A model from a folder, or from `--model_config` with random weights."""
        c = self.config
        dtype = engine_class(c).loads_in(c)
        config = self._model_config(from_scratch=pretrained is None) if c.model_config else None
        if pretrained is None and config is None:
            raise UserError("give --model FOLDER, or --model_config FILE to start from random weights")
        model = model_class(pretrained, config, lora=lora, dtype=dtype, attn_implementation=c.attn_implementation)
        tokens = vocabulary(model.transformer)
        if len(self.tokenizer) > tokens:
            raise UserError(
                f"the tokenizer has {len(self.tokenizer)} tokens but the model's vocabulary is {tokens}: "
                "use the model's own tokenizer, or resize its embeddings first"
            )
        if c.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        self._check_length(model)
        align_eos(model.transformer, self.tokenizer.eos_token_id)
        for note in model.notes:
            self._say_once(note)
        return model

    def _check_length(self, model: BaseModel):
        limit = row_limit(model.transformer)
        if limit is not None and (longest := self.longest_sequence()) > limit.tokens:
            raise UserError(
                f"rows of this run have up to {longest} tokens, and {type(model.transformer).__name__} {limit.reason} "
                f"{limit.tokens}: lower --max_length (of prompts: --max_prompt_length, of answers: --max_new_tokens)"
            )

    def _say_once(self, note: str):
        if note not in self.said:
            self.runtime.say(note)
        self.said.add(note)

    def frozen_copy(self, start) -> Engine | None:
        """A frozen copy of the policy that the run starts from; None where that is the policy without its adapter."""
        c = self.config
        if c.lora is not None and not (c.model and is_adapter(c.model)):
            return None
        return make_engine(self.model(Actor, start), c, self.runtime)

    def engine(self, model: BaseModel, *, accumulates: bool, generates: bool = False) -> Engine:
        """A trained model under the configured plugin.

        Raises:
            UserError: quantized weights, which only carry adapters.
        """
        if is_quantized(model.transformer) and not model.has_adapter:
            raise UserError(
                f"the weights of {self.config.model} are quantized, so they can't be trained: train adapters on them "
                "(--lora_rank 16), or give the model in full precision"
            )
        settings = dict(optimizer={"weight_decay": self.config.weight_decay}, accumulates=accumulates)
        return make_engine(model, self.config, self.runtime, generates=generates, **settings)

    def source(self, name: str) -> Path | None:
        """The folder of a trained model in the checkpoint that the run resumes from."""
        return self.resumed_from / name / "model" if self.resumed_from else None

    # --- files

    def _find_resume(self) -> Path | None:
        if self.runtime.is_main:
            self._make_output_folder()
            self.lock = lock_folder(self.output)
        if self.config.resume == "never":
            if self.communicator.any(self.runtime.is_main and holds_work(self.output)):
                raise UserError(
                    f"{self.output} already holds a run: pass --resume auto to go on with it, or another --output_dir"
                )
            found = None
        else:
            found = self.checkpoints.find(self.config.resume)
        return self.communicator.broadcast(found)

    def _unlock(self):
        if self.lock is not None:
            Path(self.lock.lock_file).unlink(missing_ok=True)
            self.lock.release()

    def _make_output_folder(self):
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            probe = self.output / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise UserError(f"--output_dir {self.output} can't be written ({error.strerror}): name another") from error

    def _save(self, score: float | None):
        def write(folder: Path):
            for name, engine in self.engines.items():
                self._save_model(engine, folder / name / "model")
                engine.save_optimizer(folder / name)
            for name, engine in self.frozen.items():
                self._save_model(engine, folder / name / "model")
            if self.runtime.is_main:
                state = {"algorithm": self.algorithm, "step": self.step, "state": self.state()}
                state["skipped_steps"] = {name: engine.skipped_steps for name, engine in self.engines.items()}
                state |= {"world_size": self.runtime.world_size, "plugin": self.config.plugin}
                state |= {"rows": self.rows_before(self.step), "data": self.data.key}
                state["settings"] = self._settings()
                write_json(folder / "trainer.json", state)

        self.checkpoints.save(self.step, write, score)

    def _settings(self) -> dict[str, Any]:
        """The settings that a checkpoint tells, as JSON has them."""
        settings = json.loads(to_json(dataclasses.asdict(self.config)))
        return {name: value for name, value in settings.items() if name not in UNSAID}

    def _read_stored(self) -> dict[str, Any]:
        """What the checkpoint's trainer.json says; empty for a new run. Says which settings are others now.

        Raises:
            UserError: the checkpoint is another algorithm's, or its weights can't go on under these settings.
        """
        if self.resumed_from is None:
            return {}
        stored = json.loads((self.resumed_from / "trainer.json").read_text())
        if stored["algorithm"] != self.algorithm:
            raise UserError(f"{self.resumed_from} is a checkpoint of {stored['algorithm']}, not of {self.algorithm}")
        changed = changed_settings(stored.get("settings", {}), self._settings())
        refuse_other_models(changed, self.resumed_from)
        for line in lines_of(changed):
            self.runtime.say(line)
        # the first checkpoints held no count of rows
        return {"rows": stored["step"] * self.config.batch_size} | stored

    def _restore(self, folder: Path):
        stored = self.stored
        self.step = stored["step"]
        if stored.get("data", self.data.key) != self.data.key:
            self.runtime.say(OTHER_ROWS)
        self.load_state(stored["state"])
        for name, engine in self.engines.items():
            engine.load_optimizer(folder / name)
            engine.skipped_steps = stored["skipped_steps"][name]
        if not self.checkpoints.restore_random_state(folder):
            self.runtime.say(
                f"{folder} was written by {stored['world_size']} processes, now there are {self.runtime.world_size}: "
                "weights, optimiser and data order go on exactly, sampling and dropout start from new random states"
            )
            seed_everything(self.config.seed + 1 + self.communicator.rank + 1000 * self.step)

    def _try_saving(self):
        c, main = self.config, self.runtime.is_main
        if main:
            try_saving(self.output, self.engines | self.frozen, self.tokenizer, c.merge_lora)
            checkpoint = sum(checkpoint_bytes(engine) for engine in (self.engines | self.frozen).values())
            dtypes = {name: self._export_dtype(engine) for name, engine in self.engines.items()}
            export = sum(export_bytes(e, c.merge_lora, dtypes[name]) for name, e in self.engines.items())
            check_room(self.output, checkpoint, export)

    def _export_dtype(self, engine: Engine) -> torch.dtype | None:
        """Of the final model's weights; None to leave them as they are."""
        c = self.config
        if c.export_dtype != "auto":
            return DTYPES[c.export_dtype]
        own = None if c.model is None else stored_dtype(base_of_adapter(c.model) if is_adapter(c.model) else c.model)
        trained = engine.loads_in(c)
        return own if own is not None and own.itemsize <= trained.itemsize else None

    def _save_model(self, engine: Engine, folder: Path, merge: bool = False, dtype: torch.dtype | None = None):
        state = engine.state_dict()
        if self.runtime.is_main:
            folder.mkdir(parents=True)
            engine.module.save_pretrained(folder, state, merge, dtype)
            self.tokenizer.save_pretrained(str(folder))

    def _export(self):
        """The finished models as HF folders, written aside and renamed."""
        for i, (name, engine) in enumerate(self.engines.items()):
            target = self.output / (FINAL_MODEL if i == 0 else name)
            partial = target.with_name(target.name + ".partial")
            if self.runtime.is_main:
                shutil.rmtree(partial, ignore_errors=True)
            self._save_model(engine, partial, self.config.merge_lora, self._export_dtype(engine))
            if self.runtime.is_main:
                shutil.rmtree(target, ignore_errors=True)
                os.replace(partial, target)
        self.communicator.barrier()
        self.runtime.say(f"{self.algorithm}: finished, the model is in {self.output / FINAL_MODEL}")

    # --- start

    def _announce(self):
        c, product = self.config, next(iter(self.engines.values()))
        total, trained = product.parameters, product.trained_parameters
        size = f"{total / 1e6:.1f}M parameters" + (f" ({trained / 1e6:.2f}M trained)" if trained < total else "")
        self.runtime.say(
            f"{self.algorithm}: {size} · {c.plugin} {resolve_precision(c)} · {self.runtime.world_size} x "
            f"{self.runtime.device.type} · {self.total_steps} steps of {c.batch_size} rows · {self.output}"
            + (f" · from step {self.step}" if self.resumed_from else "")
        )

    def _load_tokenizer(self):
        from transformers import AutoTokenizer

        source = self.config.tokenizer or self.config.model
        if source is None:
            raise UserError("give --tokenizer FOLDER (or --model FOLDER, if the tokenizer is in it)")
        try:
            tokenizer = AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise UserError(f"can't load a tokenizer from {source}: {str(error).splitlines()[0]}") from error
        tokenizer, notes = prepare_tokenizer(
            tokenizer,
            self.config.chat_template,
            self.config.eos_token,
            arguments=self.config.template_arguments,
            learns_responses=self.learns_responses,
        )
        for note in notes:
            self.runtime.say(note)
        return tokenizer

    @property
    def pad_id(self) -> int:
        """What fills the rows of a batch; masks come from lengths, so any id would do."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def _model_config(self, *, from_scratch: bool):
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.config.model_config)
        except (OSError, ValueError) as error:
            raise UserError(f"--model_config {self.config.model_config}: {str(error).splitlines()[0]}") from error
        if from_scratch:
            tokenizer = self.tokenizer
            config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
            config.pad_token_id = self.pad_id
        return config


def holds_work(output: Path) -> bool:
    """Whether a run has left more in its folder than what it writes before its first step."""
    if not (output / "run.json").exists():
        return False
    saved = (output / FINAL_MODEL).exists() or any((output / "checkpoints").glob(NAME))
    return saved or any(row["step"] > 0 for row in read_metrics(output))


def adapters_in(config) -> list[str]:
    """Models of the config that are adapters' folders."""
    sources = [getattr(config, name, None) for name in MODELS]
    return [source for source in sources if source is not None and is_adapter(source)]
