"""Runs several processes of one program on this machine, and never leaves one behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests import quick

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ("SLURM", "OMPI", "TPU_", "JOB_COMPLETION_INDEX", "MEGASCALE")  # variables of launchers


def free_address() -> str:
    """A loopback address that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


class Processes:
    """Processes of one program: ``with Processes(commands, folder) as group``.

    What process i prints goes to ``folder/i.out``, stdout and stderr together. All are killed, with
    their children, on leaving.
    """

    def __init__(self, commands: Sequence[Sequence[str]], folder: Path, *, devices: int = 1, **env):
        """Starts nothing yet.

        Args:
          commands: of each process, without the interpreter.
          folder: for what they print.
          devices: virtual CPU devices of each.
          env: further environment variables.
        """
        self.commands, self.folder = commands, Path(folder)
        # Whatever cluster the tests run on, these processes are on their own.
        outside = {k: v for k, v in os.environ.items() if not k.startswith(CLUSTER)}
        self.environment = outside | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {quick.XLA_FLAGS}",
            **quick.ENVIRONMENT,
            "PYTHONPATH": str(ROOT),
            **env,
        }
        self.members: list[subprocess.Popen] = []

    def __enter__(self) -> Processes:
        self.folder.mkdir(parents=True, exist_ok=True)
        for number, command in enumerate(self.commands):
            with open(self.folder / f"{number}.out", "w", encoding="utf-8") as out:
                self.members.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        cwd=ROOT,
                        env=self.environment,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        start_new_session=True,
                    )
                )
        return self

    def __exit__(self, *unused: object) -> None:
        self.signal(signal.SIGKILL)
        for member in self.members:
            member.wait()

    def wait(self, seconds: float) -> list[int]:
        """Exit codes of all; one deadline for all of them.

        Raises:
          TimeoutError: with what they printed.
        """
        deadline = time.monotonic() + seconds
        try:
            return [member.wait(max(deadline - time.monotonic(), 0.01)) for member in self.members]
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {seconds} s:\n{self.printed()}") from None

    def signal(self, number: int, member: int | None = None) -> None:
        """Sends a signal to one process with its children, or to all that still run."""
        chosen = self.members if member is None else [self.members[member]]
        for process in chosen:
            if process.poll() is None:
                os.killpg(process.pid, number)

    def output(self, member: int) -> str:
        """What one process has printed so far."""
        return (self.folder / f"{member}.out").read_text(encoding="utf-8", errors="replace")

    def printed(self) -> str:
        """What all have printed so far, for messages."""
        return "\n".join(
            f"--- process {number} ---\n{self.output(number)[-6000:]}"
            for number in range(len(self.members))
        )


def train_commands(count: int, *flags: str) -> list[list[str]]:
    """``train.py`` as ``count`` processes that meet at a free address."""
    address = free_address()
    meet = [f"--config.mesh.coordinator={address}", f"--config.mesh.num_processes={count}"]
    return [["train.py", *flags, *meet, f"--config.mesh.process_id={i}"] for i in range(count)]
