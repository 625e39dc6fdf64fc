"""A SLURM cluster of two nodes on this machine's loopback interface, every file of it in one folder."""

import os
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

from examples.stages import free_port

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun")

CONFIG = """
ClusterName=loopback
SlurmctldHost=localhost(127.0.0.1)
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
KillWait=30
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why a cluster can't be started here, or None."""
    programs = [name for name in NEEDED if shutil.which(name) is None]
    if programs:
        return f"{', '.join(programs)} not installed: run `make test-slurm`"
    return None if os.geteuid() == 0 else "munged and slurmd need root"


@contextmanager
def cluster(folder: Path):
    """Starts munged, slurmctld and two slurmd; yields the environment that sbatch needs; stops them by their pids."""
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, ports=[free_port() for _ in range(3)]))
    environment = dict(os.environ, SLURM_CONF=str(config), GLOO_SOCKET_IFNAME="lo")
    files = {"socket": "munge.sock", "key-file": "munge.key", "seed-file": "munge.seed"}
    files |= {"pid-file": "munged.pid", "log-file": "munged.log"}
    try:
        _do(["munged", "--force", *(f"--{name}={folder / file}" for name, file in files.items())], environment)
        _do(["slurmctld", "-c"], environment)
        for node in ("n1", "n2"):
            _do(["slurmd", "-N", node], environment)
        _wait_until_idle(environment)
        yield environment
    finally:
        for file in ("slurmd.n1.pid", "slurmd.n2.pid", "slurmctld.pid", "munged.pid"):
            _stop(folder / file)


def _do(command: list[str], environment: dict[str, str]):
    subprocess.run(command, env=environment, check=True, timeout=60)


def _wait_until_idle(environment: dict[str, str]):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        nodes = subprocess.run(["sinfo", "-h", "-N", "-o", "%T"], env=environment, capture_output=True, text=True)
        if nodes.stdout.split() == ["idle", "idle"]:
            return
        time.sleep(0.5)
    raise RuntimeError(f"the nodes never became idle: {nodes.stdout} {nodes.stderr}")


def _stop(pid_file: Path):
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
