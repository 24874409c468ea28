"""A real Slurm on one machine: munged, slurmctld, and one slurmd per pretended node.

Everything lives in one folder and on ports of its own, so that it neither needs nor disturbs a
Slurm that is installed. A node is a process tree with its own host name; its GPUs are devices that
nothing can be computed on. Linux and root only.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")
CONFIGURATION = """\
ClusterName=pltmoe
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=120
KillWait=10
MinJobAge=900
SchedulerParameters=sched_interval=2,bf_interval=5
JobCompType=jobcomp/none
GresTypes=gpu
NodeName={nodes} NodeHostname={nodes} NodeAddr=127.0.0.1 Port={ports} CPUs=64 RealMemory=20000 \
Gres=gpu:8 State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """Say why a cluster cannot be started here; None when it can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "needs root: slurmd gives each node a host name of its own"
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge"
    return None


class Cluster:
    """Starts the daemons in ``folder`` (a short path: a socket's name has at most 107 letters)."""

    def __init__(self, folder: Path, nodes: int):
        self.folder, self.nodes = folder, nodes
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] = os.environ["PATH"] + ":/usr/sbin:/sbin"
        self._munged: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Write the configuration, start everything, wait until all nodes are idle."""
        for name in ("state", "devices"):
            (self.folder / name).mkdir()
        for number in range(8):
            os.mknod(self.folder / "devices" / f"gpu{number}", 0o020666, os.makedev(1, 3))
        first, *rest = (free_port() for _ in range(self.nodes + 1))
        names = ",".join(f"node{n + 1}" for n in range(self.nodes))
        (self.folder / "hosts").write_text(f"127.0.0.1 localhost {names.replace(',', ' ')}\n")
        (self.folder / "gres.conf").write_text(
            f"AutoDetect=off\nName=gpu File={self.folder}/devices/gpu[0-7]\n"
        )
        (self.folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=self.folder, port=first, ports=",".join(map(str, rest)), nodes=names
            )
        )
        self._start_munged()
        self.run("slurmctld")
        for number in range(1, self.nodes + 1):
            self.start_node(number)
        wait_until(lambda: self.idle() == self.nodes, 240, "all nodes idle", self.logs)

    def start_node(self, number: int) -> None:
        """Start the slurmd of a node, with its own host name and its own view of /etc/hosts."""
        (self.folder / f"spool_node{number}").mkdir(exist_ok=True)
        inside = (
            f"mount --bind {self.folder}/hosts /etc/hosts && hostname node{number} "
            f"&& exec slurmd -N node{number}"
        )
        self.run("unshare", "--mount", "--uts", "--propagation", "private", "bash", "-c", inside)

    def power_off(self, number: int) -> None:
        """Kill a node's slurmd and all tasks on it at once, as a power cut would."""
        pid = int((self.folder / f"slurmd_node{number}.pid").read_text())
        name = os.readlink(f"/proc/{pid}/ns/uts")
        assert name != os.readlink("/proc/self/ns/uts")
        for other in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.readlink(f"/proc/{other}/ns/uts") == name:
                    os.kill(int(other), signal.SIGKILL)
            except OSError:  # gone meanwhile, or not ours to look at
                continue

    @contextmanager
    def hidden(self, number: int, path: Path) -> Iterator[None]:
        """Let a node not see a folder, as if its file system were not mounted there."""
        pid = (self.folder / f"slurmd_node{number}.pid").read_text().strip()
        inside = ("nsenter", f"--target={pid}", "--mount")
        self.run(*inside, "mount", "-t", "tmpfs", "none", str(path))
        try:
            yield
        finally:
            self.run(*inside, "umount", "--lazy", str(path))

    def stop(self) -> None:
        """Cancel all jobs and end the daemons that were started here."""
        self.run("scancel", "--user=root", check=False)
        for number in range(1, self.nodes + 1):
            with suppress(OSError):  # it may be off already
                self.power_off(number)
        with suppress(OSError):
            os.kill(int((self.folder / "slurmctld.pid").read_text()), signal.SIGKILL)
        if self._munged:
            self._munged.kill()
            self._munged.wait()

    def run(self, *command: str, check: bool = True, **kwargs: Any) -> str:
        """Run a command that sees this cluster; return what it printed."""
        kwargs.setdefault("env", self.environment)
        done = subprocess.run(command, text=True, capture_output=True, **kwargs)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}\n{self.logs()}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says about a job: JobState, Restarts, ExitCode, ..."""
        for _ in range(5):  # on a busy core slurmctld may not answer in time
            text = self.run("scontrol", "show", "job", "--oneliner", job, check=False)
            if found := dict(item.split("=", 1) for item in text.split() if "=" in item):
                return found
            time.sleep(2)
        raise AssertionError(f"nothing is known of job {job}\n{self.logs()}")

    def wait_for(self, job: str, *states: str, timeout_s: float) -> dict[str, str]:
        """Wait until a job is in one of these states."""

        def there() -> bool:
            return self.job(job)["JobState"] in states

        wait_until(there, timeout_s, f"job {job} {states}", lambda: str(self.job(job)))
        return self.job(job)

    def logs(self) -> str:
        """The end of what the daemons wrote."""
        texts = (path.read_text(errors="replace") for path in self.folder.glob("*.log"))
        return "\n".join(text[-1500:] for text in texts)

    def _start_munged(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = [f"--{what}-file={self.folder}/munge.{what}" for what in ("pid", "log", "seed")]
        self._munged = subprocess.Popen(
            ["munged", "--foreground", "--force", f"--socket={self.folder}/munge.sock",
             f"--key-file={key}", "--num-threads=2", *files],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_until((self.folder / "munge.sock").exists, 60, "munged", self.logs)

    def idle(self) -> int:
        """How many nodes have nothing to do."""
        return len(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N", check=False).split())


def wait_until(
    condition: Callable[[], bool], timeout_s: float, what: str, describe: Callable[[], str]
) -> None:
    """Poll; on time-out fail with what ``describe`` says."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s:g} s: {what}\n{describe()}"
        time.sleep(0.5)
