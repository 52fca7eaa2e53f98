import time

from lightning.pytorch import Callback

from tests.algorithms.harness import Recorder, fit, make_ddpo

LONG = 1000.0  # seconds


class LongValidation(Callback):
    """Lets the clock jump ahead in each validation."""

    def __init__(self, monkeypatch):
        self.ahead, clock = 0.0, time.perf_counter
        monkeypatch.setattr(time, "perf_counter", lambda: clock() + self.ahead)

    def on_validation_end(self, trainer, pl_module):
        self.ahead += LONG


def test_the_time_of_a_rounds_updates_is_without_its_validation(monkeypatch):
    recorder = Recorder()
    fit(make_ddpo(), val=True, max_epochs=2, callbacks=[recorder, LongValidation(monkeypatch)])
    assert 0 < recorder.metrics[-1]["time/update"] < LONG
