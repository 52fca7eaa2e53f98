"""A run in a process of its own, which may kill itself; imported by the children of test_resume."""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import torch

from lit_align import cli


def run(folder, words, moment=None, number=None):
    """Run the command line in `folder`; count its moments, and die at the `number`-th `moment`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.chdir(folder)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    name = words[words.index("--name") + 1]
    sys.stdout = sys.stderr = Path(f"{name}.txt").open("a")  # noqa: SIM115  (until it dies)
    counts = {"rollout": 0, "update": 0, "save": 0}

    def happens(what):
        counts[what] += 1
        if (what, counts[what]) == (moment, number):
            os.kill(os.getpid(), signal.SIGKILL)

    from lit_align.policies.base import DiffusionPolicy

    predict, save = DiffusionPolicy.predict, torch.save

    def counted_predict(self, *args, **kwargs):
        happens("update" if torch.is_grad_enabled() else "rollout")
        return predict(self, *args, **kwargs)

    def counted_save(checkpoint, file, *args, **kwargs):
        if "state_dict" in checkpoint:
            file.write(b"half a checkpoint")
            file.flush()
            happens("save")
            file.seek(0)
            file.truncate()
        save(checkpoint, file, *args, **kwargs)
        with Path(f"{name}.jsonl").open("a") as listed:
            listed.write(json.dumps(counts) + "\n")

    DiffusionPolicy.predict, torch.save = counted_predict, counted_save
    cli.main(words)
