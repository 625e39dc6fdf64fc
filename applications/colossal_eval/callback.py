"""Benchmarks during training. In a file of yours, such as benchmarks.py:

    from colossal_eval.callback import Benchmarks
    quick = Benchmarks(tasks=["mmlu"], data="runs/eval/data", limit=10)

and `--evaluators benchmarks.py:quick --eval_every 100` with any of coati's trainers of a language model.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from coati.errors import UserError
from colossal_eval.evaluate import EvaluateConfig, options
from colossal_eval.results.summaries import main_metric, scores_of
from colossal_eval.run.model_loading import Loaded
from colossal_eval.run.question_records import run_benchmark
from colossal_eval.run.response_store import ResponseStore
from colossal_eval.run.task_yaml import subjects_of, write_tasks
from colossal_eval.scores.metrics import mean, per_byte_perplexity


class Benchmarks:
    """What `evaluate.py` finds, as metrics `mmlu`, `cmmlu`, ... of an evaluation.

    Args:
        tasks: prepared benchmarks.
        data: what `prepare.py` wrote.
        **settings: others of `evaluate.py`: limit, shots, methods, max_new_tokens, chat_template, batch_tokens.
    """

    def __init__(self, tasks: Sequence[str], data: str, **settings):
        self.config = EvaluateConfig(tasks=list(tasks), data=data, progress="off", **settings)
        self.data = Path(self.config.data)
        options(self.config).check()
        for name in self.config.tasks:
            subjects_of(name, self.data)

    def __call__(self, trainer) -> dict[str, float]:
        """The scores of the trainer's model as it is now; every rank must call it.

        Raises:
            UserError: it is no language model.
        """
        from coati.models import Actor
        from coati.models.opened import longest_sequence
        from colossal_eval.run.harness_model import CoatiLM

        engine = next(iter(trainer.engines.values()))
        if not isinstance(engine.module, Actor):
            raise UserError(f"{type(engine.module).__name__} is no language model: evaluators support those only")
        folder, scores = self._folder(trainer), {}
        with engine.full() as model:
            training = model.training
            model.eval()
            length = longest_sequence(model, trainer.tokenizer)
            loaded = Loaded("model", model, trainer.tokenizer, length, str(trainer.steps_done))
            store = ResponseStore(folder / "answers", trainer.runtime.rank)
            trainer.runtime.communicator.barrier()  # nobody writes before all have read
            lm = CoatiLM(loaded, store, trainer.ranks, batch_tokens=self.config.batch_tokens)
            for name in self.config.tasks:
                records, _ = run_benchmark(lm, folder / "tasks", name, self.config.limit, self.config.chat_template)
                scores |= _scores(name, records)
            model.train(training)
        return scores

    def _folder(self, trainer) -> Path:
        """For the tasks, and the responses of this step, which a killed run may have left unfinished."""
        folder = trainer.folder.path / "benchmarks"
        if trainer.runtime.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            for name in self.config.tasks:
                write_tasks(name, self.data, folder / "tasks", options(self.config))
        trainer.runtime.communicator.barrier()
        return folder


def _scores(benchmark: str, records: list[dict]) -> dict[str, float]:
    """The mean of each kind of question, under the benchmark's name if it has one kind only; of texts, the perplexity
    per byte."""
    if benchmark == "texts":
        read = per_byte_perplexity([r["log_prob"] for r in records], [r["bytes"] for r in records])
        return {"texts": read.value}
    scores = {}
    for kind in sorted({record["kind"] for record in records}):
        alike = [record for record in records if record["kind"] == kind]
        metric = main_metric(benchmark, kind, alike)
        name = benchmark if len(alike) == len(records) else f"{benchmark}/{kind}"
        scores[name] = mean(scores_of(alike, metric)).value
    return scores
