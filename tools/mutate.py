"""Runs mutmut over the losses and the code that makes masks; prints the table and survivors of docs/mutation.md.

    .venv/bin/python tools/mutate.py [PROCESSES]

Makes .venv-mutation beside this Python's packages once, and works on a copy of the code in there. A mutant is a small
change of the code (another operator, a number plus 1, None for an argument); a mutant that no test notices survives.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-mutation"
WORK = VENV / "work"
MUTMUT = "mutmut==3.8.1"
MUTATED = ("coati/losses/*", "coati/data/tokenize.py", "coati/data/collate.py")
TESTS = ("tests/losses", "tests/data/test_masks.py", "tests/data/test_collate.py")
KILLED = (1, 3)  # pytest's exit codes: a test failed; it could not even be set up
TIMEOUT = -24  # SIGXCPU
# the same examples every time, and no complaints that tracing makes them slow
HYPOTHESIS = """
from hypothesis import HealthCheck, settings
calm = dict(deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("mutation", derandomize=True, database=None, **calm)
settings.load_profile("mutation")
"""


def make_environment():
    if (VENV / "bin" / "mutmut").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], check=True)
    lib = VENV / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (lib / "coati-environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([VENV / "bin" / "python", "-m", "pip", "install", "--quiet", MUTMUT], check=True)


def copy_code():
    shutil.rmtree(WORK, ignore_errors=True)
    (WORK / "mutants").mkdir(parents=True)  # Python forgets places that aren't there when it starts
    for folder in ("coati", "tests"):
        shutil.copytree(ROOT / folder, WORK / folder, ignore=shutil.ignore_patterns("__pycache__"))
    settings = {
        "source_paths": ["coati"],
        "only_mutate": MUTATED,
        "also_copy": ["tests", "pyproject.toml"],
        "pytest_add_cli_args_test_selection": TESTS,
        "process_isolation": "forkserver",  # torch's threads don't survive a fork
        "timeout_constant": 60,  # seconds of CPU that tests of any mutant may take: fixtures need some
    }
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in settings.items()]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (WORK / "pyproject.toml").write_text(text + "\n[tool.mutmut]\n" + "".join(lines), encoding="utf-8")
    # imported once, not for every mutant
    with open(WORK / "tests" / "conftest.py", "a", encoding="utf-8") as conftest:
        conftest.write("\nfrom transformers import PreTrainedTokenizerFast\n" + HYPOTHESIS)


def run(*words: str, **options) -> subprocess.CompletedProcess:
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(WORK / "mutants"))
    return subprocess.run([VENV / "bin" / "mutmut", *words], cwd=WORK, env=environment, text=True, **options)


def results() -> dict[str, dict[str, int]]:
    """Exit codes of the tests by mutant, by file."""
    found = {}
    for meta in sorted(WORK.glob("mutants/coati/**/*.meta")):
        if codes := json.loads(meta.read_text())["exit_code_by_key"]:
            found[str(meta.relative_to(WORK / "mutants").with_suffix(""))] = codes
    return found


def difference(mutant: str) -> str:
    shown = run("show", mutant, capture_output=True).stdout.splitlines()
    changed = [line for line in shown if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return "\n".join([f"# {mutant}", *changed])


def main():
    make_environment()
    copy_code()
    processes = sys.argv[1] if len(sys.argv) > 1 else str(os.cpu_count())
    for part in ("coati.losses*", "coati.data*"):
        run("run", "--max-children", processes, part, check=True)
    files = results()
    print("\n| file | mutants | killed | timed out | survived |\n|---|---|---|---|---|")
    rows = {name: list(codes.values()) for name, codes in files.items()}
    rows["all"] = [code for codes in rows.values() for code in codes]
    for name, codes in rows.items():
        killed, late = sum(c in KILLED for c in codes), codes.count(TIMEOUT)
        print(f"| {name} | {len(codes)} | {killed} | {late} | {len(codes) - killed - late} |")
    for codes in files.values():
        for mutant, code in codes.items():
            if code not in KILLED:
                print(f"\n[exit code {code}] {difference(mutant)}")


if __name__ == "__main__":
    main()
