"""The sandbox: what a program may do, and that none of the rest gets out. Programs run as the user of the tests and,
where that is root, as `nobody` as well."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import venv

import psutil
import pytest

from coati.errors import UserError
from coati.rewards import sandbox
from coati.rewards.sandbox import MB, OUTPUT, SandboxResult, check_sandbox, run_tests
from tests.conftest import ROOT

QUICK = 5.0  # seconds


def available() -> bool:
    try:
        check_sandbox()
    except UserError:
        return False
    return True


pytestmark = pytest.mark.skipif(not available(), reason="no user namespaces here")


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch):
    """No process outlives its program: they are known by a variable of their environment."""
    mark = f"tests-of-{os.getpid()}"
    monkeypatch.setattr(sandbox, "ENVIRONMENT", sandbox.ENVIRONMENT | {"MARK": mark})
    yield
    deadline = time.monotonic() + 10
    while left := [process for process in psutil.process_iter() if mark_of(process) == mark]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def mark_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("MARK")
    except (psutil.Error, OSError):  # gone, or another user's
        return None


def shown(program: str, seconds: float = QUICK) -> str:
    """What a program prints, which must end by itself."""
    verdict = run_tests(program, "print('ended')", seconds)
    assert verdict.passed and verdict.output.endswith("ended\n"), verdict.output
    return verdict.output.removesuffix("ended\n")


@pytest.mark.parametrize(
    ("program", "tests", "passed"),
    [
        ("def add(a, b):\n    return a + b", "assert add(1, 2) == 3", True),
        ("def add(a, b):\n    return a - b", "assert add(1, 2) == 3", False),
        ("def add(a, b)", "assert add(1, 2) == 3", False),
        ("raise ValueError", "pass", False),
        ("", "def", False),
        ("x = 'ß'", "assert x == 'ß'", True),
        ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int = 1",
         "assert P(2) == P(x=2)", True),
        ("if __name__ == '__main__':\n    raise ValueError", "assert __name__ == 'program'", True),
        ("n = 1\ndef f():\n    global n\n    n += 1\n    return n", "n = 5\nassert f() == 6 == n", True),
        ("import tempfile\nfile = tempfile.TemporaryFile()\nfile.write(b'x')", "assert file.tell() == 1", True),
        ("print('x' * 99)", "assert input() == ''", False),
    ],
)  # fmt: skip
def test_the_tests_decide(program, tests, passed):
    assert run_tests(program, tests, QUICK).passed is passed


FORGERIES = {
    "_exit": "import os\nos._exit(0)",
    "exit": "import sys\nsys.exit(0)",
    "quit": "quit()",
    "print": "print('passed', True, 1)",
    "swallow": "import atexit, os, sys\nsys.excepthook = lambda *a: None\natexit.register(lambda: os._exit(0))",
    "error": "import builtins\nbuiltins.AssertionError = type('Fine', (SystemExit,), {})",
    "all": "import builtins\nbuiltins.all = lambda x: True\nbuiltins.abs = lambda x: 0",
    "exec": "import builtins\nbuiltins.exec = builtins.compile = lambda *a, **k: None",
    "loader": "import importlib.abc\nimportlib.abc.InspectLoader.exec_module = lambda *a: None",
    "trace": "import sys\ndef trace(frame, event, arg):\n    if event == 'line': frame.f_lineno = 2\n    return trace\n"
    "sys.settrace(trace)",
    "kill": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "fork": "import os\nif os.fork():\n    os._exit(0)",
    "quotes": "'''",
    "noise": "import os\nfor fd in range(1, 64):\n    try: os.write(fd, b'x' * 32)\n    except OSError: continue",
}


@pytest.mark.parametrize("program", FORGERIES.values(), ids=FORGERIES)
def test_a_verdict_is_not_to_be_had_without_the_tests(program):
    tests = "assert all([abs(1 - 2) == 0])\nassert '''x''' == 'y'"
    assert not run_tests(program, tests, QUICK).passed


EQUAL = "class Equal:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (EQUAL + "def f(x): return Equal()", "assert f(1) == 3"),
        (EQUAL + "def f(x): return [Equal()]", "assert f(1) == [3]"),
        (EQUAL + "def f(x): return {'a': (Equal(),)}", "assert 'b' in {'b'} and f(1) == {'a': (3,)}"),
        (EQUAL + "def f(x): return Equal()", "def check(g):\n    assert not g(1) != 3\ncheck(f)"),
        ("class f(int):\n    def __eq__(self, other): return True", "assert f(1) == 3"),
        ("class f:\n    def __init__(self, x): pass\n    def __eq__(self, other): return True", "assert f(1) == 3"),
        ("from unittest.mock import ANY\ndef f(x): return ANY", "assert f(1) == 3"),
    ],
)
def test_what_equals_everything_equals_no_plain_value(program, tests):
    assert not run_tests(program, tests, QUICK).passed


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (EQUAL + "x, y = Equal(), [Equal()]", "assert x == x and y == [Equal()] and not y != [x]"),
        (EQUAL + "x = Equal()", "assert x != 3 and not x == 3"),
        ("from fractions import Fraction\nx = Fraction(4, 2)", "assert x == 2 and 2 == x and x != 3"),
        ("from collections import Counter, namedtuple\nP = namedtuple('P', 'a')", "assert P(1) == (1,)"),
        ("from collections import Counter\nx = Counter('aab')", "assert x == {'a': 2, 'b': 1}"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    a: int", "assert P(1) == P(1) != P(2)"),
        ("from enum import IntEnum\nclass E(IntEnum):\n    A = 1", "assert E.A == 1"),
        ("x = float('nan')", "assert x != x and not x == x and 1 < 2 == 2"),
    ],
)
def test_equality_is_as_ever_elsewhere(program, tests):
    assert run_tests(program, tests, QUICK).passed, run_tests(program, tests, QUICK).output


def test_what_is_left_behind_would_be_seen():
    started = subprocess.Popen(["sleep", "60"], env=sandbox.ENVIRONMENT)
    try:
        deadline = time.monotonic() + 10
        while mark_of(psutil.Process(started.pid)) != sandbox.ENVIRONMENT["MARK"]:
            assert time.monotonic() < deadline
    finally:
        started.kill()
        started.wait()


def test_a_fork_bomb_meets_the_limit_of_processes():
    count = (
        "import os, time\nn = 0\ntry:\n    while n < 40:\n        if not os.fork(): time.sleep(60)\n        n += 1\n"
    )
    count += "except OSError as error:\n    print(n, error.errno)"
    assert shown(count) in ("6 11\n", "7 11\n")  # 8 with the program itself and, of a plain user, who waits for it
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: continue"
    started = time.monotonic()
    assert not run_tests(bomb, "pass", 1.0).passed
    assert time.monotonic() - started < 10


def test_threads_count_as_processes():
    many = (
        "import threading, time\nfor i in range(40):\n    try: threading.Thread(target=time.sleep, args=(9,)).start()\n"
    )
    many += "    except RuntimeError: break\nprint(i)"
    assert shown(many) in ("6\n", "7\n")


LOOPS = ["while True: pass", "import time\ntime.sleep(60)", "import os\nos.setsid()\nos.fork()\nwhile True: pass"]


@pytest.mark.parametrize("program", LOOPS)
def test_an_infinite_loop_ends_in_time(program):
    started = time.monotonic()
    assert not run_tests(program, "pass", 1.0).passed
    assert 0.9 < time.monotonic() - started < 10


def test_ten_gigabytes_are_refused():
    ask = "try:\n    x = bytearray(10 << 30)\nexcept MemoryError:\n    print('refused')"
    assert shown(ask) == "refused\n"
    assert shown("x = bytearray(100 << 20)\nprint(len(x))") == f"{100 * MB}\n"
    before = psutil.Process().memory_info().rss
    assert not run_tests("x = []\nwhile True: x.append(bytes(1 << 20))", "pass", QUICK).passed
    assert psutil.Process().memory_info().rss < before + 64 * MB


def test_files_outside_are_out_of_reach(tmp_path):
    """The user could delete them: only the sandbox stands between."""
    treasure = tmp_path / "treasure.txt"
    treasure.write_text("gold")
    os.chmod(treasure, 0o666)
    os.chmod(tmp_path, 0o777)
    delete = f"import os, shutil\nshutil.rmtree({str(tmp_path)!r}, ignore_errors=True)\n"
    delete += "for path in ('/usr/bin', '/etc', '/dev'):\n    shutil.rmtree(path, ignore_errors=True)\n"
    delete += f"for path in ({str(treasure)!r}, {str(ROOT / 'README.md')!r}, '/etc/passwd', '/proc/1/environ'):\n"
    delete += "    try: open(path)\n    except FileNotFoundError: print('gone')\n"
    delete += "for path in ('/x', '/usr/x', '/dev/x'):\n    try: open(path, 'a')\n"
    delete += "    except OSError as error: print(error.errno)"
    assert shown(delete) == "gone\n" * 4 + "30\n" * 3
    assert treasure.read_text() == "gold" and os.path.exists("/usr/bin/env")


def test_what_python_needs_is_read_only_even_where_anyone_may_write(tmp_path, monkeypatch):
    venv.create(tmp_path / "venv", symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv/bin/python"))
    package = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    (package / "treasure.py").write_text("gold = 1")
    os.chmod(package, 0o777)
    os.chmod(package / "treasure.py", 0o666)
    change = "import os, treasure\nfor do in (os.remove, lambda path: open(path, 'w')):\n"
    change += "    try: do(treasure.__file__)\n    except OSError as error: print(error.errno)"
    assert shown(change) == "30\n30\n"
    assert (package / "treasure.py").read_text() == "gold = 1"


def test_each_program_finds_an_empty_folder_of_bounded_size():
    write = "import os\nprint(os.listdir('.'))\nopen('left', 'w').write('x')"
    assert shown(write) == shown(write) == "[]\n"
    fill = "n = 0\ntry:\n    while True:\n        open(f'{n}', 'wb').write(bytes(8 << 20))\n        n += 1\n"
    fill += "except OSError as error:\n    print(n <= 8, error.errno)"
    assert shown(fill) == "True 28\n"
    assert not run_tests("open('x', 'wb').write(bytes(32 << 20))", "pass", QUICK).passed


def test_no_connection_gets_out():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        port = server.getsockname()[1]
        reach = "import socket\nfor host in ('127.0.0.1', '1.1.1.1', 'localhost'):\n    try:\n"
        reach += f"        socket.create_connection((host, {port}), timeout=1)\n    except OSError: print('none')"
        assert shown(reach) == "none\n" * 3
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_other_process_is_in_sight():
    look = "import os, signal\nprint(os.getpid(), os.getppid(), os.environ.get('HOME'))\n"
    look += f"for pid in ({os.getpid()}, {os.getppid()}):\n    try: os.kill(pid, signal.SIGTERM)\n"
    look += "    except ProcessLookupError: print('none')"
    assert shown(look) == "1 0 /sandbox\nnone\nnone\n"


def test_no_right_is_left_or_to_be_regained():
    regain = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
    regain += "for flags in (0x10000000, 0x20000, 0x40000000):\n    print(libc.unshare(flags))\n"
    regain += "print(libc.mount(b'tmpfs', b'/sandbox', b'tmpfs', 0, None), os.getuid() == 0)\n"
    regain += "try: os.chroot('/')\nexcept PermissionError: print('no')"
    assert shown(regain).split() == ["-1", "-1", "-1", "-1", "False", "no"]


def test_a_gigabyte_of_output_is_read_and_forgotten():
    loud = "import os\nfor _ in range(1024): os.write(1, bytes(1 << 20))"
    before = psutil.Process().memory_info().rss
    verdict = run_tests(loud, "pass", 60.0)
    assert verdict.passed and len(verdict.output) == OUTPUT
    assert psutil.Process().memory_info().rss < before + 32 * MB


def test_output_that_is_no_text_is_shown_somehow():
    assert run_tests("import os\nos.write(1, b'\\xff\\n')", "pass", QUICK).output == "�\n"


def test_the_same_program_gets_the_same_hashes():
    assert shown("print(hash('x'))") == shown("print(hash('x'))")


FOR_A_PLAIN_USER = (
    "fork_bomb or threads or infinite or outside or anyone or bounded_size or connection or in_sight or no_right"
)


@pytest.mark.skipif(os.getuid() != 0, reason="already runs as a plain user")
def test_a_plain_user_has_the_same_walls():
    """What depends on rights, as user 65534."""
    nobody = dict(user=65534, group=65534, extra_groups=[], cwd=ROOT, capture_output=True, text=True)
    try:
        subprocess.run([sys.executable, "-c", "import pytest, tests.conftest"], check=True, **nobody)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("that user can't start Python or read the code")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", FOR_A_PLAIN_USER]
        words += [f"--basetemp={folder}/tests", __file__]
        environment = os.environ | {"HOME": folder, "PYTHONDONTWRITEBYTECODE": "1"}
        ran = subprocess.run(words, env=environment, timeout=300, **nobody)
    assert ran.returncode == 0 and "skipped" not in ran.stdout, ran.stdout[-3000:] + ran.stderr[-2000:]


def test_a_machine_without_namespaces_runs_nothing(monkeypatch):
    monkeypatch.setattr(sandbox, "run_tests", lambda *a: (_ for _ in ()).throw(OSError("unshare: no")))
    check_sandbox.cache_clear()
    with pytest.raises(UserError, match=r"the verifier python needs .*namespaces \(unshare: no\)"):
        check_sandbox()
    monkeypatch.setattr(sandbox, "run_tests", lambda *a: SandboxResult(True, ""))
    with pytest.raises(UserError, match="its own check failed"):
        check_sandbox()
    check_sandbox.cache_clear()


def test_a_sandbox_that_cannot_be_built_is_an_error_and_no_verdict(monkeypatch):
    monkeypatch.setattr(sandbox, "ENVIRONMENT", {"PYTHONHOME": "/nowhere"})
    with pytest.raises(OSError, match="could not be set up"):
        run_tests("", "pass")
