"""A server of rewards in a process of its own, which may kill itself; see test_reward_server."""

import os
import signal
import socket
import sys
from pathlib import Path

import torch

from lit_align import cli
from lit_align.reward_server import create_app, run_app
from lit_align.rewards import Colorfulness


class Dying(Colorfulness):
    """Colorfulness until the process kills itself, in the middle of a request.

    Args:
        calls: Requests that are answered.
    """

    def __init__(self, calls):
        super().__init__()
        self.calls = calls

    @property
    def name(self):
        return "Colorfulness"

    def forward(self, images, prompts, metadata=None, group_ids=None):
        self.calls -= 1
        if self.calls < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(images, prompts, metadata, group_ids)


def serve(port, calls=10**9):
    """Serve Colorfulness on a port of this machine, and die at request `calls` + 1."""
    torch.set_num_threads(1)
    run_app(create_app(Dying(calls)), socket.create_server(("127.0.0.1", port)))


def command(output, token, words):
    """Run a command line; what it prints goes to a file."""
    os.environ["LIT_ALIGN_REWARD_TOKEN"] = token
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = Path(output).open("a")  # noqa: SIM115  (until it ends)
    cli.main(words)
    sys.stdout.flush()
