"""Where a process finds its place in the run, and whom it watches."""

import importlib
import logging
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from coati import watch
from coati.errors import UserError
from coati.watch import launchers

runtime_module = importlib.import_module("coati.parallel.runtime")  # coati.parallel.runtime is the function

STEP = dict(
    SLURM_JOB_ID="7",
    SLURM_STEP_ID="0",
    SLURM_PROCID="5",
    SLURM_LOCALID="1",
    SLURM_STEP_NUM_TASKS="8",
    SLURM_STEP_NODELIST="gpu[03-04],x1",
)


def placed(monkeypatch, **environment) -> dict[str, str]:
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in runtime_module.RANK_VARIABLES:
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for name in runtime_module.RANK_VARIABLES:  # so that monkeypatch takes back what is written below
        monkeypatch.setenv(name, environment.get(name, ""))
        if name not in environment:
            os.environ.pop(name)
    runtime_module._rank_from_environment()
    return {name: os.environ[name] for name in runtime_module.RANK_VARIABLES}


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("a1,b2", "a1"),
        ("n[1-2]", "n1"),
        ("n[001-016,020],m[1-2]", "n001"),
        ("n[7,9-12]", "n7"),
        ("rack[1-2]node[3-4]-ib,z", "rack1node3-ib"),
    ],
)
def test_the_first_host_of_slurms_list(hosts, first):
    assert runtime_module._first_host(hosts) == first


def test_a_task_of_srun_finds_its_place(monkeypatch):
    found = placed(monkeypatch, **STEP)
    assert found == dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="gpu03", MASTER_PORT="10112")


def test_steps_and_jobs_get_different_ports_below_those_of_linux(monkeypatch):
    ports = [
        int(placed(monkeypatch, **STEP | dict(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)))["MASTER_PORT"])
        for job in (7, 8, 9_999_999)
        for step in (0, 1, 15)
    ]
    assert len(set(ports)) == len(ports)
    assert min(ports) >= 10000
    assert max(ports) < 32768


def test_a_task_with_one_gpu_of_its_own_uses_it(monkeypatch):
    monkeypatch.setattr(runtime_module.torch.cuda, "device_count", lambda: 1)
    assert placed(monkeypatch, **STEP)["LOCAL_RANK"] == "0"


def test_address_and_port_of_the_user_win(monkeypatch):
    found = placed(monkeypatch, **STEP, MASTER_ADDR="10.0.0.1", MASTER_PORT="4000")
    assert (found["RANK"], found["MASTER_ADDR"], found["MASTER_PORT"]) == ("5", "10.0.0.1", "4000")


def test_torchrun_inside_slurm_wins(monkeypatch):
    mine = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="h", MASTER_PORT="1")
    assert placed(monkeypatch, **STEP, **mine) == mine


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_plain_python_inside_a_slurm_job_is_one_process(step, monkeypatch):
    """A batch script and a shell of salloc have SLURM_PROCID and SLURM_NTASKS too."""
    batch = dict(SLURM_JOB_ID="7", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="8", SLURM_NODELIST="n[1-2]")
    found = placed(monkeypatch, **batch, **step)
    assert (found["RANK"], found["WORLD_SIZE"], found["MASTER_ADDR"]) == ("0", "1", "127.0.0.1")


def test_a_launchers_variables_in_part_are_refused(monkeypatch):
    with pytest.raises(UserError, match="WORLD_SIZE, LOCAL_RANK is not"):
        placed(monkeypatch, RANK="0", MASTER_ADDR="h", MASTER_PORT="1")


@pytest.mark.parametrize("works", [True, False])
def test_a_launcher_that_hangs_without_workers_is_ended(works, monkeypatch):
    """A worker outlives the limit, which leaves a busy machine the time to end its launcher after it."""
    monkeypatch.setattr(watch, "SECONDS_WITHOUT_WORKERS", 4.0)
    worker = "subprocess.run(['sleep', '6'])" if works else "time.sleep(60)"
    launcher = subprocess.Popen([sys.executable, "-c", f"import subprocess, time; {worker}"])
    while works and not psutil.Process(launcher.pid).children():
        time.sleep(0.05)
    waiting = subprocess.Popen(["sleep", "60"])
    watch.clean_up(launcher.pid, waiting.pid)
    assert launcher.wait(5) == (0 if works else -signal.SIGKILL)
    assert waiting.wait(5) == -signal.SIGTERM


PRINT_CHAIN = "from coati.watch import launchers; print(*[p.pid for p in launchers()])"


def test_only_launchers_and_shells_between_them_are_watched(tmp_path):
    """A shell script stands for the user's, above a launcher, above a shell that it starts, above us."""
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(
        "import subprocess, os, sys\n"
        "print(os.getpid(), flush=True)\n"
        f"subprocess.run(['sh', '-c', sys.executable + ' -c \"{PRINT_CHAIN}\"; true'])\n"
    )
    script = tmp_path / "mine.sh"
    script.write_text(f"{sys.executable} {torchrun}\ntrue\n")
    done = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=True)
    launcher, chain = done.stdout.splitlines()
    assert chain.split()[1:] == [launcher]  # the shell between, then the launcher, and nothing above


def test_nobody_is_watched_without_a_launcher():
    assert launchers() == []


STUBBORN = """
import os, signal, time
from coati.watch import watch_launcher
watch_launcher()
signal.signal(signal.SIGTERM, lambda *_: None)  # as after `launch`, with a step that never ends
print(os.getpid(), flush=True)
time.sleep(60)
"""


def test_a_process_that_cannot_save_ends_once_its_launcher_is_gone(tmp_path):
    torchrun = tmp_path / "torchrun"
    torchrun.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {STUBBORN!r}])\n")
    environment = dict(os.environ, COATI_SECONDS_TO_SAVE="2")
    launcher = subprocess.Popen(
        [sys.executable, str(torchrun)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    worker = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    gone, _ = psutil.wait_procs([worker], timeout=10)
    assert gone == [worker]
    assert "the launcher is gone" in launcher.communicate()[1]


FORKS = """
import os, signal, time
from coati.watch import watch_launcher
watch_launcher()
signal.signal(signal.SIGINT, lambda *_: None)  # as after `launch`
reader, writer = os.pipe()
child = os.fork()
if child:
    os.read(reader, 1)
    print("forked", flush=True)
else:
    os.write(writer, b".")
time.sleep(2)
if child:
    os.waitpid(child, 0)
    print("lives")
"""


def test_a_ctrl_c_that_reaches_forked_children_too_counts_once():
    process = subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout.readline() == "forked\n"
    os.killpg(process.pid, signal.SIGINT)
    assert (process.communicate()[0], process.returncode) == ("lives\n", 0)


@pytest.fixture
def a_gpu_that_torch_can_not_use(monkeypatch, tmp_path):
    """As with a torch for CUDA and a driver that is too old for it."""

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update it.")

    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(runtime_module, "DEVICE_FILES", tmp_path)
    monkeypatch.setattr(runtime_module.torch.version, "cuda", "13.0")
    monkeypatch.setattr(runtime_module.torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_gpu_that_torch_can_not_use_is_no_reason_to_train_on_the_cpu(a_gpu_that_torch_can_not_use):
    with pytest.raises(UserError, match=r"driver on your system is too old \(found version 12020\).*--device cpu"):
        runtime_module._select_device(0)


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_it_is_left_alone_where_it_is_hidden(hidden, a_gpu_that_torch_can_not_use, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert runtime_module._select_device(0).type == "cpu"


def test_a_torch_for_cpus_uses_cpus(a_gpu_that_torch_can_not_use, monkeypatch):
    monkeypatch.setattr(runtime_module.torch.version, "cuda", None)
    assert runtime_module._select_device(0).type == "cpu"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(runtime_module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runtime_module.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=r"no GPU of its own.*--device cpu"):
        runtime_module._select_device(1)


# in one write: two processes share the output
SAYS = "import os; os.write(1, (os.environ['OMP_NUM_THREADS'] + ' ').encode())"


@pytest.mark.parametrize(("cores", "processes", "threads"), [(8, 2, 4), (8, 3, 2), (2, 4, 1)])
def test_processes_share_the_cores_out(cores, processes, threads, tmp_path, monkeypatch, capfd):
    from coati import run

    (tmp_path / "says.py").write_text(SAYS)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(run.os, "sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)  # the tests' own stay
    assert run.run(processes, [str(tmp_path / "says.py")]) == 0
    assert capfd.readouterr().out.split() == [str(threads)] * processes


def test_threads_that_were_asked_for_stay(tmp_path, monkeypatch, capfd):
    from coati import run

    (tmp_path / "says.py").write_text(SAYS)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setattr(run.signal, "signal", lambda *_: None)
    assert run.run(2, [str(tmp_path / "says.py")]) == 0
    assert capfd.readouterr().out.split() == ["7", "7"]


TRAINS = """
import os
import sys
from coati.trainers.config import SFTConfig
from coati.trainers.main import main

def load_trainer():
    print("hidden:", repr(os.environ.get("CUDA_VISIBLE_DEVICES")), "torch:", "torch" in sys.modules, flush=True)
    os._exit(0)

main(SFTConfig, load_trainer, "sft", argv=sys.argv[1:])
"""


def test_device_cpu_hides_gpus_before_torch_looks_for_them(tiny_world, tmp_path):
    removed = ("CUDA_VISIBLE_DEVICES", *runtime_module.RANK_VARIABLES)
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    arguments = ["--model", tiny_world["policy"], "--train_data", tiny_world["sft"], "--output_dir", str(tmp_path)]
    for device, expected in (("cpu", "hidden: '' torch: False"), ("auto", "hidden: None torch: False")):
        command = [sys.executable, "-c", TRAINS, *arguments, "--device", device]
        found = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert expected in found.stdout, found.stderr[-2000:]


@pytest.mark.parametrize(
    ("set_by_user", "expected"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}),
    ],
)
def test_the_allocators_memory_grows_unless_the_user_says_otherwise(monkeypatch, set_by_user, expected):
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")  # so that monkeypatch takes back what is written below
        monkeypatch.delenv(name)
    os.environ.update(set_by_user)
    runtime_module._set_cuda_variables()
    assert {name: os.environ[name] for name in names if name in os.environ} == expected


def test_only_bitsandbytes_note_about_a_kernel_is_hidden(caplog):
    """It comes on CPUs with AVX-512, once per process, and asks for a package that coati does not use."""
    runtime_module.quiet_colossalai()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure ...", "no module")
    logger.warning("Something else failed: %s", 1)
    assert [record.getMessage() for record in caplog.records] == ["Something else failed: 1"]
