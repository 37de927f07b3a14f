"""Real hosts on one machine: each with a network, processes, a home and a /tmp of its own.

A host is what `unshare` makes: namespaces without names, with sshd as their first process. They
read this machine's files, and what they write is theirs alone. The kernel ends all of it together
with the process that is `Host.start`ed or with the one that runs the tests, however that ends; only
the bridge stays, and the next `Network` takes it over.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

from filelock import FileLock

BRIDGE = "biggan0"
GATEWAY = "10.200.0.1"
"""The address of this machine on the hosts' network."""

DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""Begins a command that the kernel ends with this process."""
ISOLATED = "unshare --net --uts --mount --mount-proc --pid --fork --kill-child"
BOOT = """
set -e
own() {
  mkdir -p "$2.own" "$2.work"
  mount -t overlay overlay "$1" -o "lowerdir=$1,upperdir=$2.own,workdir=$2.work"
}
mkdir -p "$1/lost"
own "$HOME" "$1/home"
mount -t tmpfs tmpfs "$1/lost"
own /run "$1/lost/run"
own /tmp "$1/lost/tmp"
mount -t tmpfs tmpfs /dev/shm
mkdir -p /run/sshd
hostname "$2"
ip link set lo up
exec /usr/sbin/sshd -D -e -f /dev/null -h "$3" -o AuthorizedKeysFile="$3.pub" -o StrictModes=no \
  -o PidFile=none -o MaxStartups=100
"""
"""Boots a host whose files lie in $1, named $2, with the key $3 as its own and its visitors'.

What it writes into its home outlives it, as on a disk.
"""


def missing() -> str:
    """Why there can be no hosts here; empty if there can."""
    if os.geteuid():
        return "hosts need root"
    for program in ("unshare", "setpriv", "ip", "ssh", "ssh-keygen", "/usr/sbin/sshd", "rsync"):
        if not shutil.which(program):
            return f"hosts need {program} (Debian: openssh-server rsync iproute2 util-linux)"
    trial = _sh(f"{ISOLATED} ip link add trial type bridge", check=False)
    return f"hosts need namespaces and bridges: {trial.stderr}" if trial.returncode else ""


def _sh(command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command.split(), capture_output=True, text=True)
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


class Network:
    """A bridge, and the hosts on it; one a machine at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key = folder / "key"
        self.hosts: list[Host] = []
        self._lock = FileLock("/run/biggan-hosts.lock")

    def __enter__(self) -> Network:
        self._lock.acquire()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True)
        _sh(f"ip link delete {BRIDGE}", check=False)  # A killed test's.
        _sh(f"ip link add {BRIDGE} type bridge")
        _sh(f"ip address add {GATEWAY}/24 dev {BRIDGE}")
        _sh(f"ip link set {BRIDGE} up")
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.kill()
        _sh(f"ip link delete {BRIDGE}")
        self._lock.release()

    def host(self, name: str) -> Host:
        """One more host, up."""
        host = Host(self, name, len(self.hosts) + 11)
        self.hosts.append(host)
        host.start()
        return host


class Host:
    """A machine that can be spoken to by SSH, unplugged, killed and booted again."""

    def __init__(self, network: Network, name: str, number: int) -> None:
        self.network, self.name = network, name
        self.address = f"10.200.0.{number}"
        self._port = f"{BRIDGE}-{number}"
        self._log = network.folder / f"{name}.log"

    def start(self) -> None:
        """Boot it."""
        files = self.network.folder / self.name
        files.mkdir(exist_ok=True)
        boot = [*ISOLATED.split(), "sh", "-c", BOOT, "boot", files, self.name, self.network.key]
        with self._log.open("a") as log:
            self._process = subprocess.Popen([*DIES_WITH_US, *boot], stdout=log, stderr=log)
        pid, own = self._process.pid, Path("/proc/self/ns/net").readlink()
        theirs = Path(f"/proc/{pid}/ns/net")
        self._wait(lambda: theirs.readlink() != own)
        _sh(f"ip link delete {self._port}", check=False)  # A killed test's.
        _sh(f"ip link add {self._port} type veth peer name eth0 netns {pid}")
        _sh(f"ip link set {self._port} master {BRIDGE} up")
        inside = f"nsenter --net=/proc/{pid}/ns/net ip"
        _sh(f"{inside} address add {self.address}/24 dev eth0")
        _sh(f"{inside} link set eth0 up")
        self._wait(lambda: self.run("true", check=False).returncode == 0)

    def _wait(self, ready) -> None:
        for _ in range(100):
            assert self._process.poll() is None, self._log.read_text()
            if ready():
                return
            time.sleep(0.1)
        raise TimeoutError(f"{self.name} does not start: {self._log.read_text()}")

    def ssh(self, *arguments: str) -> list[str]:
        """The command that opens a connection to it."""
        options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        ssh = f"ssh -i {self.network.key} {options} -o ConnectTimeout=5 root@{self.address}"
        return [*ssh.split(), *arguments]

    def run(
        self, command: str, check: bool = True, timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run a command there in a login shell."""
        done = subprocess.run(
            self.ssh(f"bash -lc {shlex.quote(command)}"),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done

    def kill(self) -> None:
        """The power fails: it falls silent, and what is left of it is its home."""
        _sh(f"ip link delete {self._port}", check=False)  # It may be dead already.
        if self._process.poll() is None:
            pid = self._process.pid
            [first] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            os.kill(int(first), signal.SIGKILL)  # All others end before it does.
            self._process.wait()

    def partition(self) -> None:
        """Unplug it from the network."""
        _sh(f"ip link set {self._port} down")

    def heal(self) -> None:
        """Plug it in again."""
        _sh(f"ip link set {self._port} up")
