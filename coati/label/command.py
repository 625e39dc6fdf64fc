"""The commands `coati label`, `coati label export` and `coati label import`."""

import argparse
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from coati.config import configure
from coati.config.generation import GenerationConfig
from coati.errors import UserError
from coati.label.drawing import draw_items, score_items
from coati.label.export import FORMATS, REASONS, export
from coati.label.imports import Fields, known_values, read_export
from coati.label.items import Item, join_items, read_items, read_prompts, read_scores
from coati.label.store import OWNER, Store
from coati.listening import is_loopback, listen
from coati.run_layout import model_folder, named_models


def main(argv: Sequence[str]) -> int:
    """Runs `coati label ARGUMENTS`; returns the exit status.

    Raises:
        UserError: a file, a row or an argument is wrong.
    """
    if argv[:1] == ["export"]:
        options = export_parser().parse_args(argv[1:])
        return write_export(options.labels, options.format, options.output, options.with_models)
    if argv[:1] == ["import"]:
        return read_labels(import_parser().parse_args(argv[1:]))
    options = label_parser().parse_args(argv)
    check(options)
    hold = 60 * options.hold_minutes
    if options.models:
        store, items, note = with_drawn_items(options, hold)
        scores = None
    else:
        store, items, scores, note = with_items_of_files(options, hold)
    if options.reward_model:
        every = {item.key: item for item in [*store.items(), *items]}
        scores = score_items(list(every.values()), options.reward_model)
    new = store.add_items(items, options.pairs, scores)
    if options.items or options.sources:
        print(f"{len(items)} items, {new} of them new{note}")
    store.add_people(options.people)
    if options.overlap is not None:
        store.set_overlap(options.overlap)
    progress = store.progress()
    if not progress["pairs"]:
        raise UserError(f"{options.labels} has no pairs; name a file of items with different responses")
    names = [person.name for person in store.people() if person.name != OWNER]
    if not names:
        raise UserError("nobody has a link; name people with --people")
    if len(names) < progress["overlap"]:
        print(f"note: --overlap is {progress['overlap']}, but only {len(names)} have links", file=sys.stderr)
    print(f"{progress['pairs']} pairs, {progress['labels']} of {progress['wanted']} labels", flush=True)
    serve(store, options.host, options.port)
    return 0


def label_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="coati label",
        description="A web page on which people compare responses. coati label export writes training data, "
        "coati label import reads labels of Argilla and Label Studio.",
    )
    parser.add_argument(
        "items",
        nargs="?",
        type=Path,
        metavar="ITEMS",
        help='rows of {"prompt", "responses": [{"text", "model"}, ...]}; with --model, of {"prompt"}',
    )
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        default=[],
        metavar="[NAME=]MODEL",
        help="draws the responses: a model's folder, an adapter's, a run's or a checkpoint's; may be given again",
    )
    parser.add_argument(
        "--responses", type=int, metavar="N", help="of each model to a prompt (default: 2 of one model, 1 of several)"
    )
    parser.add_argument("--max_new_tokens", type=int, default=512, help="longest of them (default: 512)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling; 0 for greedy (default: 1)")
    parser.add_argument("--top_p", type=float, default=1.0, help="nucleus mass (default: 1)")
    parser.add_argument(
        "--from",
        dest="sources",
        nargs="+",
        default=[],
        metavar="MODEL=FILE",
        help='files of {"prompt", "response"} rows by model, joined by prompt',
    )
    parser.add_argument("--labels", type=Path, required=True, metavar="FILE.sqlite", help="where labels are kept")
    parser.add_argument("--people", nargs="+", default=[], metavar="NAME", help="who gets a link")
    parser.add_argument("--overlap", type=int, help="how many people label each pair (default: 1, or as before)")
    parser.add_argument("--pairs", type=int, default=1, help="how many pairs of each new item's responses (default: 1)")
    parser.add_argument(
        "--uncertain", type=Path, metavar="SCORES", help="scores of responses: pairs of the least margin come first"
    )
    parser.add_argument(
        "--reward_model", metavar="MODEL", help="scores all responses: pairs of the least margin come first"
    )
    parser.add_argument("--seed", type=int, help="of all that is random, for a new file (default: 0)")
    parser.add_argument(
        "--hold_minutes", type=float, default=30.0, help="how long a pair is kept for who was shown it (default: 30)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, this machine alone")
    parser.add_argument("--port", type=int, default=8300, help="default: 8300; 0 for any that is free")
    return parser


def export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="coati label export", description="Labels as rows of training data.")
    parser.add_argument("labels", type=Path, metavar="FILE.sqlite")
    parser.add_argument("--format", choices=list(FORMATS), default="preference", help="default: preference")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--with_models", action="store_true", help="also write which models the responses are from")
    return parser


def import_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="coati label import", description="Labels of Argilla or Label Studio.")
    parser.add_argument("export", type=Path, metavar="EXPORT.json")
    parser.add_argument("--from", dest="tool", choices=["argilla", "label_studio"], required=True)
    parser.add_argument("--labels", type=Path, required=True, metavar="FILE.sqlite")
    parser.add_argument("--prompt", required=True, metavar="FIELD", help="the field of the prompt")
    parser.add_argument("--responses", required=True, nargs=2, metavar="FIELD", help="the fields of both responses")
    parser.add_argument("--models", nargs=2, default=["", ""], metavar="NAME", help="which models they are from")
    parser.add_argument("--question", metavar="NAME", help="the question or control, if there are several")
    parser.add_argument(
        "--values", nargs="+", default=[], metavar="CHOICE=VALUE", help="what values mean: first, second, tie, both_bad"
    )
    return parser


def check(options: argparse.Namespace) -> None:
    """Raises `UserError` if arguments don't fit."""
    if options.items and options.sources:
        raise UserError("give a file of items or --from, not both")
    counts = {"--overlap": options.overlap, "--pairs": options.pairs, "--responses": options.responses}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; give 1 or more")
    if not 0 < options.hold_minutes <= 60 * 24 * 365:
        raise UserError(f"--hold_minutes is {options.hold_minutes}; give more than 0, and a year at most")
    if not 0 <= options.port < 1 << 16:
        raise UserError(f"--port is {options.port}; give 0 to 65535")
    if options.models and not options.items:
        raise UserError("--model draws responses to prompts; name their file too")
    if options.responses and not options.models:
        raise UserError("--responses is of models that draw; name them with --model")
    if options.responses == 1 and len(options.models) == 1:
        raise UserError("--responses 1 of one model leaves nothing to compare; give 2 or more, or another --model")
    if options.uncertain and (options.models or options.reward_model):
        raise UserError("--uncertain reads scores of responses that are there; leave out --model and --reward_model")
    if options.uncertain and not (options.items or options.sources):
        raise UserError("--uncertain needs the items that are scored; name their file too")
    for name in options.people:
        if not name.strip() or name == OWNER or len(name) > 100:
            raise UserError(f"--people has {name!r}; give names of up to 100 characters")


def with_drawn_items(options: argparse.Namespace, hold: float) -> tuple[Store, list[Item], str]:
    """The file of labels, items of new prompts with responses that `--model` has drawn, and a note on prompts that were
    left out."""
    models, prompts = named_models(options.models), read_prompts(options.items)
    for path in models.values():
        model_folder(path, "--model")
    limits = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p")}
    sampling = configure(GenerationConfig, **limits)
    store = Store.prepare(options.labels, options.seed, hold=hold)
    count = options.responses or (2 if len(models) == 1 else 1)
    items, left_out = draw_items(store, prompts, models, count, sampling)
    return store, items, f"; {left_out} left out whose responses are the same or empty" if left_out else ""


def with_items_of_files(
    options: argparse.Namespace, hold: float
) -> tuple[Store, list[Item], dict[str, list[float]] | None, str]:
    """The file of labels, the items that the arguments name, their scores if a file has some, and a note on prompts
    that were left out."""
    items, left_out = items_of(options)
    if not items:
        return Store.open(options.labels, hold=hold), [], None, ""
    scores = read_scores(options.uncertain, items) if options.uncertain else None
    store = Store.prepare(options.labels, options.seed, hold=hold)
    return store, items, scores, f"; {left_out} prompts with a single response left out" if left_out else ""


def items_of(options: argparse.Namespace) -> tuple[list[Item], int]:
    """The items that the arguments name, and how many prompts with a single response were left out; no items if they
    name none."""
    if not options.items and not options.sources:
        return [], 0
    if options.items:
        items, left_out = read_items(options.items), 0
    else:
        items, left_out = join_items(read_sources(options.sources))
    if not items:
        raise UserError("no prompt has two responses; correct the files of items")
    return items, left_out


def read_sources(words: Sequence[str]) -> dict[str, Path]:
    """Files by model, from `MODEL=FILE` words."""
    sources = {}
    for word in words:
        model, separator, path = word.partition("=")
        if not (model and separator and path):
            raise UserError(f"--from has {word!r}; write MODEL=FILE.jsonl")
        if model in sources:
            raise UserError(f"--from names the model {model!r} twice; give each file another name")
        sources[model] = Path(path)
    return sources


def serve(store: Store, host: str, port: int) -> None:
    """Serves the pages until Ctrl-C, after a line with each person's link."""
    import uvicorn

    from coati.label.application import application

    listener = listen(host, port)
    named = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    for person in store.people():
        print(f"{person.name:<12} http://{named}:{listener.getsockname()[1]}/{person.token}/")
    if not is_loopback(host):
        print(
            f"note: {host} is reached from other machines. Who has a link gets in, and HTTP isn't encrypted: put a "
            "proxy with TLS in front, or use an SSH tunnel.",
            file=sys.stderr,
        )
    print("Each link is a secret. Ctrl-C stops; the same command continues.", flush=True)
    settings = dict(log_level="warning", access_log=False, server_header=False, http="h11", lifespan="off")
    config = uvicorn.Config(application(store), **settings, timeout_keep_alive=15, timeout_graceful_shutdown=5)
    uvicorn.Server(config).run([listener])


def read_labels(options: argparse.Namespace) -> int:
    """Adds the items and labels of another tool's export, and says how many."""
    names = (options.responses[0], options.responses[1])
    models = (options.models[0], options.models[1])
    values = known_values(names, options.values)
    fields = Fields(options.prompt, names, options.question, values, models)
    items, labels = read_export(options.tool, options.export, fields)
    store = Store.prepare(options.labels)
    new_items, new_labels = store.add_items(items), store.add_labels(labels)
    print(f"{options.labels}: {len(items)} items, {new_items} of them new; {len(labels)} labels, {new_labels} new")
    return 0


def write_export(labels: Path, format: str, output: Path, with_models: bool) -> int:
    """Writes training data, and says how much and what was left out."""
    rows, left_out = export(Store.open(labels), format, output, with_models)
    print(f"{output}: {rows} rows")
    for reason, count in left_out.items():
        print(f"  left out {count}: {REASONS.get(reason, reason)}")
    return 0
