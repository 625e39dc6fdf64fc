"""The steps of `prepare_pretrain`, each of which is deterministic and can be resumed after a kill.

1. `read_files`: the files are hashed and split into parts. 2. `check_rows`: every row is parsed, so that a malformed
one is found before anything is written. 3. `tokenize`: a file of tokenized documents for each part. 4. `choose`:
duplicates are dropped and documents assigned to buckets. 5. `write_buckets`. 6. `verify`: the rows are read back
and counted, and must hold every token of every chosen document.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from coati.errors import UserError
from coati.tracking.config import TrackingConfig
from coati.tracking.progress import progress_bar
from colossal_llama.data import buckets, documents, token_store
from colossal_llama.data.document_tokens import TokenizerData, read_tokenizer
from colossal_llama.data.manifest import Counts, measure_bucket, print_tables, summarize
from colossal_llama.data.preparation_settings import PrepareConfig
from colossal_llama.data.skipped_rows import Problems
from colossal_llama.data.work_folder import WorkFolder, open_work_folder
from colossal_llama.data.worker_processes import Run, workers

FORMAT_VERSION = 1  # count up whenever the same rows and settings give other files
Chosen = list[dict[str, np.ndarray]]
"""The documents of each bucket by category."""


@dataclass(frozen=True)
class Job:
    """What to prepare: the parts of all files in order, the SHA-256 of each file; `run` runs functions over tasks."""

    config: PrepareConfig
    tokenizer: TokenizerData
    parts: list[documents.Part]
    hashes: dict[str, str]
    run: Run


@dataclass(frozen=True)
class Rows:
    """Documents in each file, and rows that were skipped: malformed, or dropped by filters and as duplicates."""

    documents: Counter[str] = field(default_factory=Counter)
    bad: Problems = field(default_factory=Problems)
    dropped: Problems = field(default_factory=Problems)


def prepare(config: PrepareConfig) -> None:
    """Run all steps and print the result. Raises `UserError`."""
    output = Path(config.output).expanduser()
    if output.exists():
        raise UserError(f"The output folder {output} exists; remove it or give another --output.")
    tokenizer = read_tokenizer(config.tokenizer, config.bos)
    parts, hashes = read_files(config)
    _announce(config, tokenizer, parts)
    with workers(config.processes) as run:
        manifest = _write(Job(config, tokenizer, parts, hashes, run), output)
    print_tables(manifest)
    total = manifest["total"]
    print(
        f"tokens in: {manifest['tokens_in']:,} of {total['documents']:,} documents; "
        f"tokens out: {total['tokens']:,} in {total['rows']:,} rows; written to {output}",
        flush=True,
    )


def _write(job: Job, output: Path) -> dict:
    """Make the output folder; returns its manifest."""
    rows = check_rows(job)
    tokenizer = {"folder": job.config.tokenizer, "sha256": job.tokenizer.hash, "files": job.tokenizer.files}
    settings = {**job.config.result_settings(), "format_version": FORMAT_VERSION}
    settings |= {"data_sha256": job.hashes, "tokenizer_sha256": job.tokenizer.hash}
    with open_work_folder(output, settings) as work:
        manifest = work.read_manifest() or {**_fill(job, rows, work), "settings": settings, "tokenizer": tokenizer}
        work.finish(manifest)
    return manifest


def _fill(job: Job, rows: Rows, work: WorkFolder) -> dict:
    """Steps 3 to 6; returns the manifest's figures."""
    paths = tokenize(job, work)
    store = token_store.TokenStore(paths)
    try:
        chosen = choose(job.config, store, rows)
    except UserError:
        work.remove()  # with these settings it would end so again
        raise
    write_buckets(job, paths, chosen, work)
    files = {path: {"rows": count + rows.bad.count(path), "documents": count} for path, count in rows.documents.items()}
    return {
        "tokens_in": sum(int(store.lengths[numbers].sum()) for bucket in chosen for numbers in bucket.values()),
        **summarize(verify(job, store, chosen, work), job.config.max_length),
        "files": files,
        "bad_rows": rows.bad.as_json(),
        "dropped": rows.dropped.as_json(),
    }


def read_files(config: PrepareConfig) -> tuple[list[documents.Part], dict[str, str]]:
    """The parts of all files and the SHA-256 of each file."""
    size = max(1, int(config.part_megabytes * 2**20))
    parts: list[documents.Part] = []
    hashes = {}
    with _progress(config, "reading files", len(config.data)) as bar:
        for path in config.data:
            digest = hashlib.sha256()
            parts.extend(documents.split_file(path, size, digest))
            hashes[path] = digest.hexdigest()
            bar.advance()
    return parts, hashes


def _announce(config: PrepareConfig, tokenizer: TokenizerData, parts: list[documents.Part]) -> None:
    megabytes = sum(part.size for part in parts) / 1e6
    bos = "no BOS" if tokenizer.bos_id is None else f"BOS {tokenizer.bos_id}"
    print(
        f"{megabytes:,.1f} MB in {len(config.data)} files, {len(parts)} parts, {config.processes} processes; "
        f"tokenizer {config.tokenizer} ({bos}, EOS {tokenizer.eos_id}); {config.buckets} buckets of rows of at most "
        f"{config.max_length} tokens; output {config.output}",
        flush=True,
    )


def check_rows(job: Job) -> Rows:
    """Parse every row. Raises `UserError` for a malformed one (unless they are counted) and for files without rows."""
    config, rows = job.config, Rows(Counter(dict.fromkeys(job.config.data, 0)))
    categories: Counter[str] = Counter()
    check = partial(documents.check_part, category=config.category)
    with _progress(config, "checking rows", len(job.parts)) as bar:
        for part, (by_category, bad) in zip(job.parts, job.run(check, job.parts), strict=True):
            categories.update(by_category)
            rows.documents[part.path] += by_category.total()
            rows.bad.extend(bad)
            bar.advance()
            if bad and config.bad_rows == "error":
                first = next(iter(bad))
                place = f"{first.file} line {first.first_lines[0]}"
                raise UserError(f"{place}: {first.reason}; correct the row or count such rows with --bad_rows count.")
    for path in config.data:
        if not rows.documents[path]:
            raise UserError(
                f"{path} holds no documents ({rows.bad.count(path)} malformed rows); leave it out of --data."
            )
    buckets.check_buckets(dict(categories), config.buckets)
    return rows


def tokenize(job: Job, work: WorkFolder) -> list[Path]:
    """Tokenize the parts that are not done yet; returns the files of all."""
    config, tokenizer = job.config, job.tokenizer
    backend = work.write("tokenizer.json", tokenizer.backend)
    special = dict(tokenizer=str(backend), bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    rules = dict(category=config.category, filters=config.filters, deduplication=config.deduplication)
    paths = [work.documents / f"{number:06d}.arrow" for number in range(len(job.parts))]
    tasks = [
        token_store.TokenizeTask(part=part, output=path, **special, **rules)
        for part, path in zip(job.parts, paths, strict=True)
        if not path.exists()
    ]
    with _progress(config, "tokenizing parts", len(paths), len(paths) - len(tasks)) as bar:
        for tokens in job.run(token_store.tokenize_part, tasks):
            bar.advance(tokens)
    return paths


def choose(config: PrepareConfig, store: token_store.TokenStore, rows: Rows) -> Chosen:
    """Drop duplicates and assign the rest to buckets; what was dropped is counted in `rows`.

    Raises `UserError` if a category is left with fewer documents than there are buckets.
    """
    rows.dropped.extend(store.dropped())
    is_kept = config.deduplication.is_first(store.signatures())
    for document in np.flatnonzero(~is_kept).tolist():
        rows.dropped.add(store.path(document), int(store.lines[document]), f"a duplicate ({config.deduplicate})")
    if not is_kept.any():
        raise UserError("The filters drop every document; loosen them (--min_characters, --max_...).")
    of_category = {
        name: np.flatnonzero(is_kept & (store.categories == code)) for code, name in enumerate(store.category_names)
    }
    buckets.check_buckets({name: len(numbers) for name, numbers in of_category.items()}, config.buckets)
    assigned = {n: buckets.split(numbers, n, config.buckets, config.seed) for n, numbers in of_category.items()}
    return [{name: parts[number] for name, parts in assigned.items()} for number in range(config.buckets)]


def write_buckets(job: Job, paths: list[Path], chosen: Chosen, work: WorkFolder) -> None:
    """Write the buckets that are not there yet."""
    settings = dict(parts=paths, max_length=job.config.max_length, seed=job.config.seed)
    tasks = [
        buckets.BucketTask(number=number, output=work.bucket(number), documents=of_bucket, **settings)
        for number, of_bucket in enumerate(chosen)
        if not work.bucket(number).exists()
    ]
    with _progress(job.config, "packing buckets", len(chosen), len(chosen) - len(tasks)) as bar:
        for tokens in job.run(buckets.write_bucket, tasks):
            bar.advance(tokens)


def verify(job: Job, store: token_store.TokenStore, chosen: Chosen, work: WorkFolder) -> list[dict[str, Counts]]:
    """Read the buckets back and count; every token of every chosen document must be there."""
    measured = []
    folders = [work.bucket(number) for number in range(len(chosen))]
    with _progress(job.config, "verifying buckets", len(folders)) as bar:
        for of_bucket, folder, by_name in zip(chosen, folders, job.run(measure_bucket, folders), strict=True):
            expected = {name: int(store.lengths[numbers].sum()) for name, numbers in of_bucket.items()}
            written = {name: counts.tokens for name, counts in by_name.items()}
            if written != expected:
                raise RuntimeError(f"{folder} holds the tokens {written}, the documents in it have {expected}")
            measured.append({name: counts + Counts(documents=len(of_bucket[name])) for name, counts in by_name.items()})
            bar.advance(sum(written.values()))
    return measured


def _progress(config: PrepareConfig, description: str, total: int, done: int = 0):
    return progress_bar(total, description, TrackingConfig(progress=config.progress), initial=done)
