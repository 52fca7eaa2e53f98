"""Acceptance of `run.py annotate` in a real browser: judge by keyboard, be killed, go on, train."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Trainer
from PIL import Image

from lit_align.algorithms import RewardModeling
from lit_align.data.preference_records import check_record
from lit_align.data.preferences import PreferenceDataModule
from lit_align.rewards import CLIPRewardTower, LearnedReward
from lit_align.rewards.shapes_clip import build_shapes_clip

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent
RECORDS = Path("out/preferences.jsonl")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--no-proxy-server", "--window-size=1280,860")  # fmt: skip
PATIENCE = 60  # seconds, for a busy machine
SHOWN = "return document.querySelector('[data-question]')?.dataset.question"


@pytest.fixture
def browser(tmp_path):
    pytest.importorskip("nicegui", reason="the extra `browser` is not installed")
    webdriver = pytest.importorskip("selenium.webdriver", reason="the extra `browser` is missing")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("chromium or chromedriver is not installed (Debian: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    service = webdriver.chrome.service.Service(programs[1])
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


@pytest.fixture
def served(browser):
    """Yield a function that starts the command, anew after a kill, and shows its page."""
    processes = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def serve(*words):
        command = [
            sys.executable, str(ROOT / "run.py"), "annotate", "--annotator", "ada", "--output",
            "out", "--pretrained", "shapes-sd", "--num_inference_steps", "3", "--prompts",
            "shapes-train", "--port", str(port), "--show", "false", *words,
        ]  # fmt: skip
        # The library behaves differently where it sees a test.
        environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST")}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        processes.append(process)
        told = ""
        while "Ctrl-C ends it." not in told:  # until the pipe's end, if it failed
            line = process.stdout.readline()
            assert line, f"the page did not start: {told}"
            told += line
        wait(browser, lambda: reachable(port) or process.poll() is not None)
        browser.get(f"http://127.0.0.1:{port}/")
        wait(browser, lambda: browser.execute_script(SHOWN))
        return process, told

    yield serve
    for process in processes:
        process.kill()
        process.wait()


def wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, PATIENCE, poll_frequency=0.02).until(lambda _: condition())


def reachable(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def press(browser, key):
    """Press a key and wait for what comes next."""
    before = browser.execute_script(SHOWN)
    browser.switch_to.active_element.send_keys(key)
    wait(browser, lambda: browser.execute_script(SHOWN) not in (None, before))


def brightness(source):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return np.asarray(Image.open(io.BytesIO(opener.open(source).read()))).mean()


def prefer_brighter(browser):
    """Press the key of the image that is brighter as the browser shows it."""
    script = "return [...document.querySelectorAll('figure img')].map(image => image.src)"
    left, right = (brightness(source) for source in browser.execute_script(script))
    press(browser, "1" if left > right else "2")


def records():
    return [json.loads(line) for line in RECORDS.read_bytes().splitlines()]


def test_a_person_judges_is_interrupted_and_the_file_trains_a_reward_model(browser, served):
    process, _ = served("--limit", "10")
    for _ in range(5):
        prefer_brighter(browser)
    press(browser, "s")
    press(browser, "u")
    assert len(records()) == 5
    process.kill()
    process.wait()
    with RECORDS.open("ab") as file:
        file.write(b'{"schema": "lit_align/pref/1", "id"')  # what a kill may leave
    _, told = served("--limit", "10")
    assert "the last line is cut and was removed" in told
    assert "Question 6 of 11" in browser.page_source
    for _ in range(6):
        prefer_brighter(browser)
    assert "All questions are answered." in browser.page_source

    for record in records():
        check_record(record)
        if record["kind"] == "pair":
            images = [np.asarray(Image.open(f"out/{item['path']}")) for item in record["items"]]
            assert record["label"] == [float(images[0].mean() > images[1].mean()),
                                       float(images[0].mean() <= images[1].mean())]  # fmt: skip
    assert [record["kind"] for record in records()].count("pair") == 10
    summary = json.loads(Path("out/summary.json").read_text())["ada"]
    assert (summary["judged"], summary["repeated"], summary["consistency"]) == (10, 1, 1.0)

    before, after = trained_on(RECORDS)
    assert after["val/loss"] < 0.5 * before["val/loss"]
    assert after["val/accuracy"] == 1.0


def test_the_best_and_the_worst_of_three_are_named_by_mouse(browser, served):
    served("--limit", "1", "--images_per_prompt", "3", "--repeat_fraction", "0")
    for text in ("Which is the best?", "And which is the worst?"):
        assert text in browser.find_element("class name", "asked").text
        before = browser.execute_script(SHOWN)
        buttons = browser.find_elements("css selector", "figure button")
        buttons[1 if "best" in text else 2].click()
        wait(browser, lambda old=before: browser.execute_script(SHOWN) not in (None, old))
    (record,) = records()
    check_record(record)
    shown = record["metadata"]["shown"]
    assert [record["rank"][number] for number in shown] == [2, 1, 3]


def trained_on(path):
    """Fit a small reward model; return its measures of the judgements before and after."""
    encoder = build_shapes_clip(width=16, layers=1)
    tower = CLIPRewardTower(model=encoder.model, tokenizer=encoder.tokenizer)
    data = PreferenceDataModule(str(path), val=str(path), batch_size=10)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False,
               "enable_progress_bar": False, "enable_model_summary": False}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a network as argument, which is meant
        module = RewardModeling(LearnedReward(tower, "linear"), loss_type="soft", lr=3e-3)
        trainer = Trainer(max_steps=40, num_sanity_val_steps=0, **options)
        (before,) = Trainer(**options).validate(module, data, verbose=False)
        trainer.fit(module, datamodule=data)
        (after,) = Trainer(**options).validate(module, data, verbose=False)
    return before, after
