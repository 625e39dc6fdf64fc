"""What `coati.rewards.sandbox` runs as a process of its own, with nothing but the standard library: it builds a place
without a network or other files, starts a child there, and the child runs the program and then its tests."""

import ast
import builtins
import ctypes
import json
import os
import resource
import secrets
import signal
import socket
import sys
import traceback
import types

NEWNS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000  # linux/sched.h
MS_BIND, MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 4096, 16384, 1 << 18, 2, 4  # linux/mount.h
AT_RECURSIVE, READ_ONLY_NOSUID = 0x8000, 1 | 2
SYS_MOUNT_SETATTR = 442  # the same on every architecture
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
VISIBLE = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/zero", "/dev/urandom")
WORK = "/sandbox"
NOT_SET_UP = 3

libc = ctypes.CDLL(None, use_errno=True)


def main(channel: int):
    job = json.load(sys.stdin)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # ends with whoever asked
    root = os.getcwd()
    uid = isolate(root, job["disk"])
    child = os.fork()  # the first process of the new namespace: when it ends, so do all others there
    if child:
        os.waitpid(child, 0)
        return
    try:
        enter(root, uid, job)
        run(job["program"], job["tests"], channel)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(0)


def isolate(root: str, disk: int) -> int:
    """New namespaces of mounts, processes, network and shared memory; in `root` what Python needs, to be read only, and
    an empty folder to work in. Returns the user that the program will run as."""
    uid, gid = os.getuid(), os.getgid()
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, the kernel ends this and not the trainer
    call(libc.unshare, NEWNS | NEWPID | NEWNET | NEWIPC | (NEWUSER if uid else 0))
    if uid:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    call(libc.mount, None, b"/", None, MS_REC | MS_PRIVATE, None)
    call(libc.mount, b"tmpfs", root.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=755")
    for source in sorted({*VISIBLE, sys.prefix, sys.base_prefix}):
        show(source, root + source)
    os.mkdir(root + WORK)
    read_only = (ctypes.c_uint64 * 4)(READ_ONLY_NOSUID, 0, 0, 0)
    call(libc.syscall, SYS_MOUNT_SETATTR, -100, root.encode(), AT_RECURSIVE, read_only, ctypes.sizeof(read_only))
    options = f"size={disk},mode=777".encode()
    call(libc.mount, b"tmpfs", f"{root}{WORK}".encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options)
    # limits on the number of processes count by user and spare root: a user of this process' own
    return uid or 20000 + os.getpid() % 40000


def show(source: str, target: str):
    """Makes a file or folder visible at `target`, unless it is there as a part of another."""
    if os.path.lexists(target) or not os.path.exists(source):
        return
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(source):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT))
    call(libc.mount, source.encode(), target.encode(), None, MS_BIND | MS_REC, None)


def enter(root: str, uid: int, job: dict):
    """Enters for good: no privileges are left, and a process whose root was changed makes no namespace to regain
    any."""
    os.chroot(root)
    os.chdir(WORK)
    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
    for name, limit in job["limits"].items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if os.getuid() != uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    call(libc.capset, header, nothing)
    call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL)


def call(function, *arguments):
    if function(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function.__name__}: {os.strerror(number)}")


def run(program: str, tests: str, channel: int):
    """The program, then its tests in the same namespace. The token, which nobody has read before, is sent back after
    the last test; what the program did to builtins and to tracing is undone before the first."""
    module = sys.modules["program"] = types.ModuleType("program")
    equal = f"equal_{secrets.token_hex(16)}"
    tree = ast.fix_missing_locations(EqualityOfTests(equal).visit(ast.parse(tests, "tests")))
    test = types.FunctionType(compile(tree, "tests", "exec"), vars(module))
    originals, talk = dict(vars(builtins)), socket.socket(fileno=channel)
    types.FunctionType(compile(program, "program", "exec"), vars(module))()
    sys.settrace(None)
    sys.setprofile(None)
    vars(builtins).update(originals)
    vars(module)[equal] = lambda left, right, negated: compare(left, right, negated, vars(module))
    test()
    talk.send(talk.recv(64))


class EqualityOfTests(ast.NodeTransformer):
    """Has `compare` decide what stands on both sides of == and != in the tests.

    Args:
        name: of `compare` in their namespace.
    """

    def __init__(self, name: str):
        self.name = name

    def visit_Compare(self, node: ast.Compare):
        self.generic_visit(node)
        if len(node.ops) > 1 or not isinstance(node.ops[0], ast.Eq | ast.NotEq):
            return node
        negated = ast.Constant(isinstance(node.ops[0], ast.NotEq))
        call = ast.Call(ast.Name(self.name, ast.Load()), [node.left, *node.comparators, negated], [])
        return ast.copy_location(call, node)


def compare(left, right, negated: bool, namespace: dict):
    """left == right, or if negated left != right. What the program's own `__eq__` says counts only between objects
    that both have such a one: else one that equals everything would pass every test."""
    if decides_itself(left, namespace) != decides_itself(right, namespace):
        return negated
    return left != right if negated else left == right


def decides_itself(value, namespace: dict) -> bool:
    """Whether a function of the program's, or a mock, decides what the value or a part of it equals."""
    if issubclass(type(value), dict):
        parts = [*value.keys(), *value.values()]
    else:
        parts = value if issubclass(type(value), list | tuple | set | frozenset) else ()
    if any(decides_itself(part, namespace) for part in parts):
        return True
    places = [getattr(method, "__globals__", {}) for method in (type(value).__eq__, type(value).__ne__)]
    return any(place is namespace or place.get("__name__") == "unittest.mock" for place in places)


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]))
    except OSError as error:
        print(error)
        sys.exit(NOT_SET_UP)
