"""The loop of every run: steps, evaluation, logs, checkpoints, stopping."""

import contextlib
import time
from dataclasses import asdict

from coati.errors import UserError, no_room
from coati.parallel import cpu_emulates_bf16, resolve_precision
from coati.parallel.update import SkippedSteps
from coati.tracking import make_tracker, progress_bar
from coati.trainers.card import model_card
from coati.trainers.hub import check_hub, push_to_hub
from coati.trainers.profiler import profiled


def run(trainer):
    """Runs a trainer to its end, or to the step after a stop was asked for (SIGTERM): then it saves and returns."""
    folder, config = trainer.folder, trainer.config
    config.tracking.check_profile_steps(trainer.total_steps)
    repo = config.export.push_to_hub
    if repo and trainer.runtime.is_main:
        check_hub(repo, config.export.hub_private)
    announce(trainer)
    folder.try_saving(trainer.engines, trainer.frozen, trainer.tokenizer)
    if trainer.runtime.is_main:
        for name in trainer.engines:
            model_card(trainer, name)  # what fails in it would fail after the last step
    folder.checkpoints.set_aside_after(trainer.steps_done)
    tracker = make_tracker(
        folder.path,
        config.tracking,
        algorithm=trainer.algorithm,
        settings=asdict(config),
        resume_step=trainer.steps_done if folder.resumed_from else None,
    )
    try:
        finished = do_steps(trainer, tracker)
        if finished:
            folder.export(trainer.engines, trainer.tokenizer, lambda name: model_card(trainer, name))
        tracker.finish("finished" if finished else "interrupted")
        if finished and repo:
            with trainer.runtime.main_first():
                if trainer.runtime.is_main:
                    push_to_hub(folder.product, repo, trainer.steps_done)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk must not hide the error
            tracker.finish("failed")
        if words := explain(error, trainer):
            raise UserError(words) from error
        raise
    finally:
        folder.release()


def do_steps(trainer, tracker) -> bool:
    """The steps that are left; whether all were done."""
    config, runtime = trainer.config, trainer.runtime
    if trainer.steps_done == 0:
        if config.data.eval_data:  # which may take minutes, before any step is shown
            runtime.say(f"{trainer.algorithm}: evaluating before the first step ...")
        evaluate(trainer, tracker)
    with progress_bar(trainer.total_steps, trainer.algorithm, config.tracking, initial=trainer.steps_done) as bar:
        while trainer.steps_done < trainer.total_steps:
            with profiled(trainer.steps_done + 1, config.tracking.profile_steps, trainer.folder.path, runtime):
                started = time.monotonic()
                metrics = trainer.step(trainer.steps_done)
                metrics["tokens_per_second"] = metrics["tokens"] / (time.monotonic() - started)
            metrics["skipped_steps"] = trainer.skipped_steps
            trainer.steps_done += 1
            if is_due(trainer, config.log_every):
                tracker.log(metrics, trainer.steps_done)
            bar.advance(tokens=int(metrics["tokens"]), **short(metrics))
            stop = runtime.communicator.any(runtime.stop_requested is not None)
            score = None
            if is_due(trainer, config.evaluation.eval_every) and not stop:
                score = evaluate(trainer, tracker)
            if stop or is_due(trainer, config.checkpoints.save_every):
                trainer.save(score)
            if stop and trainer.steps_done < trainer.total_steps:
                runtime.say(f"{runtime.stop_requested or 'a stop'} received: saved step {trainer.steps_done}")
                return False
    return True


def is_due(trainer, every: int) -> bool:
    """Whether something that is done every so many steps, and after the last one, is done now."""
    return trainer.steps_done == trainer.total_steps or (every > 0 and trainer.steps_done % every == 0)


def evaluate(trainer, tracker) -> float | None:
    """Evaluates and logs; returns the metric that tells the best checkpoint, turned so that higher is better."""
    metrics, samples = trainer.evaluate()
    for evaluator in trainer.evaluators:
        metrics |= evaluator(trainer)
    if not metrics:
        return None
    tracker.log({f"eval/{name}": value for name, value in metrics.items()}, trainer.steps_done)
    if samples:
        tracker.log_samples(samples, trainer.steps_done)
    found = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    trainer.runtime.say(f"{trainer.algorithm} step {trainer.steps_done}: {found}")
    name, higher = trainer.best_metric
    if name not in metrics:
        return None
    return metrics[name] if higher else -metrics[name]


def announce(trainer):
    """One line: what will run, where and how big; another if the CPU is slow at what was asked for."""
    c, runtime, product = trainer.config, trainer.runtime, next(iter(trainer.engines.values()))
    size = f"{product.parameters / 1e6:.1f}M parameters"
    if product.trained_parameters < product.parameters:
        size += f" ({product.trained_parameters / 1e6:.2f}M trained)"
    line = (
        f"{trainer.algorithm}: {size} · {c.parallel.plugin} {resolve_precision(c.parallel)} · {runtime.world_size} x "
        f"{runtime.device.type} · {trainer.total_steps} steps of {c.batch_size} rows · {trainer.folder.path}"
    )
    if trainer.folder.resumed_from:
        line += f" · from step {trainer.steps_done}"
    runtime.say(line)
    if runtime.device.type == "cpu" and c.parallel.precision == "bf16" and cpu_emulates_bf16():
        runtime.say("this CPU has no instructions for bf16: --precision fp32 is several times as fast")


def short(metrics: dict[str, float]) -> dict[str, float]:
    """The few metrics that fit beside the progress bar."""
    return {name: metrics[name] for name in ("loss", "accuracy", "reward", "kl") if name in metrics}


def explain(error: BaseException, trainer) -> str | None:
    """An error that ended a run, in words where its user can do something about it."""
    newest = trainer.folder.checkpoints.newest() or "not written yet"
    if isinstance(error, SkippedSteps):
        return f"step {trainer.steps_done + 1}: {error}; the newest checkpoint is {newest}"
    if reason := no_room(error):
        return (
            f"{trainer.folder.path} can't be written at step {trainer.steps_done} ({reason}): make room there, then go "
            f"on with --resume auto; the newest checkpoint is {newest}"
        )
    return None
