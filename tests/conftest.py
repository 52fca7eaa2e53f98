import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
# Also in the processes that tests start: two of them with two threads each wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"

import socket
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_align.policies import (
    FluxPolicy,
    SD3Policy,
    SDXLPolicy,
    StableDiffusionPolicy,
    WanPolicy,
)
from lit_align.policies.blueprints import (
    build_shapes_flux,
    build_shapes_sd,
    build_shapes_sd3,
    build_shapes_sdxl,
    build_shapes_wan,
)

# Results must not depend on how many cores there are, and the networks are too small to share.
torch.set_num_threads(1)

# Files that take half a minute or more, the longest first, so that both workers end together.
LONG = (
    "test_distributed", "test_matrix", "test_notebooks", "test_configs", "test_resume", "test_cli",
    "test_invariants", "test_memory", "test_generate_schedule", "test_reward_server",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    places = {stem: place for place, stem in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


# What the server of started processes imports once for all of them. Of the installed package only:
# in a test's folder it does not find the tests.
PRELOADED = ["lit_align.cli", "lit_align.policies.blueprints"]


LOOPBACK = {"127.0.0.1", "::1", "localhost"}
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Refuse every connection that leaves this machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOOPBACK:
            raise AssertionError(f"A test tried to reach {address}.")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Run every test in a folder of its own, so that none leaves anything behind."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def golden():
    return np.load(GOLDEN / "step_log_prob.npz")


def tiny_pipeline(family, prediction_type="epsilon"):
    """Return a pipeline of the real classes with few channels and random weights."""
    torch.manual_seed(0)
    if family == "sd3":
        return build_shapes_sd3(layers=2, heads=2, head_width=8, text_width=16)
    if family == "wan":
        return build_shapes_wan(layers=2, heads=2, head_width=12, text_width=16, vae_width=4)
    if family.startswith("sdxl"):
        spacing = "trailing" if family == "sdxl-turbo" else "leading"
        return build_shapes_sdxl(None, (8, 16), 16, prediction_type, spacing)
    if family in ("flux", "schnell"):
        pipeline = build_shapes_flux(
            layers=1, single_layers=1, heads=2, head_width=8, text_width=16,
            guidance_embeds=family == "flux",
        )  # fmt: skip
        pipeline.vae.register_to_config(shift_factor=0.1)  # as the real one's is not zero
        return pipeline
    prediction_type = "v_prediction" if family == "sd-v" else prediction_type
    return build_shapes_sd(widths=(8, 16), text_width=16, prediction_type=prediction_type)


POLICIES = {
    "sd": StableDiffusionPolicy,
    "sd-v": StableDiffusionPolicy,
    "sdxl": SDXLPolicy,
    "sdxl-turbo": SDXLPolicy,
    "sd3": SD3Policy,
    "flux": FluxPolicy,
    "schnell": FluxPolicy,
    "wan": WanPolicy,
}


def tiny_policy(family, prediction_type="epsilon", **options):
    """Return a policy over `tiny_pipeline`; `family` is one of `POLICIES`."""
    policy_class = POLICIES[family]
    # Some networks have no size of their own.
    sizes = {name: {"image_size": 32} for name in ("flux", "schnell")}
    sizes |= {"wan": {"image_size": 32, "num_frames": 5}}
    options = {**sizes.get(family, {}), **options}
    return policy_class(tiny_pipeline(family, prediction_type), **options)
