"""The floors of the house: who may import whom inside the package, read from the syntax trees."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lit_align"

FLOOR_0 = {"trajectory", "functional", "shapes", "hub"}
FLOOR_1 = {"schedulers", "rewards", "metrics", "data"}
ABOVE = {"cli", "comparison", "run_folder", "checkpoint_io", "run_groups", "verbs", "benchmarks",
         # Floor 5: everything.
         "candidates", "label", "annotation", "annotate_page", "reward_server", "__main__",
         "architectures", "costs", "dry_run", "small_rounds", "tracing"}  # fmt: skip
BASES = {"schedulers.base", "policies.base", "policies.sampling", "rewards.base",
         "rewards.scoring", "data.experience", "data.planner", "data.windows",
         "data.image_text", "policies.snapshots",
         # The head that methods train beside any policy, and its sampler, as `policies.sampling`.
         "policies.time_prediction", "policies.learned_schedule"}  # fmt: skip

# Inside the package: what each folder may import besides itself, by prefix.
INSIDE = {
    "trajectory": set(),
    "functional": {"trajectory"},
    "shapes": set(),
    "hub": set(),
    **{folder: FLOOR_0 for folder in FLOOR_1},
    "policies": FLOOR_0 | {"schedulers"},
    "algorithms": FLOOR_0 | BASES | {"metrics"},
    # Averaged weights serve callbacks and algorithms; the lower of the two floors holds them.
    "callbacks": FLOOR_0 | FLOOR_1 | {"algorithms.base", "policies.snapshots"},
}
# Outside it: the libraries that each folder may import besides the standard library.
OUTSIDE = {
    "trajectory": {"torch"},
    "functional": {"torch", "numpy"},
    "shapes": {"torch", "numpy", "PIL"},
    "hub": {"huggingface_hub"},
    "schedulers": {"torch", "diffusers"},
    "rewards": {
        "torch",
        "transformers",
        "open_clip",
        "PIL",
        "safetensors",
        "httpx",
        "rapidocr",
        "dreamsim",
    },
    "metrics": {"torch", "torchmetrics"},
    "data": {"torch", "numpy", "PIL", "lightning"},
    "policies": {"torch", "diffusers", "transformers", "peft", "open_clip", "safetensors"},
    "algorithms": {"torch", "lightning", "torchmetrics", "tqdm"},
    "callbacks": {"torch", "lightning", "matplotlib", "numpy"},
}


def violations(root):
    """Return one line per import that a floor forbids."""
    found = []
    for path in sorted(root.rglob("*.py")):
        own = path.relative_to(root).with_suffix("").as_posix().replace("/", ".")
        folder = own.split(".")[0]
        if folder in ABOVE or folder == "__init__":
            continue
        for name in imported(path):
            if name == "lit_align" or name.startswith("lit_align."):
                target = name.removeprefix("lit_align").removeprefix(".")
                allowed = INSIDE[folder] | {folder, ""}
                if not any(target == a or (a and target.startswith(f"{a}.")) for a in allowed):
                    found.append(f"{own} imports {name}")
            elif name.split(".")[0] in THIRD_PARTY - OUTSIDE[folder]:
                found.append(f"{own} imports {name}")
    return found


THIRD_PARTY = {"torch", "numpy", "PIL", "diffusers", "transformers", "open_clip", "torchmetrics",
               "lightning", "peft", "matplotlib", "tqdm", "torchvision", "jsonargparse",
               "omegaconf", "tensorboard", "tokenizers", "safetensors", "huggingface_hub",
               "httpx", "fastapi", "uvicorn", "rapidocr", "dreamsim"}  # fmt: skip


def imported(path):
    """Yield the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            folder = PACKAGE.parent / node.module.replace(".", "/")
            for alias in node.names:  # `from lit_align.policies import adapters`: a submodule
                submodule = folder / alias.name
                found = submodule.is_dir() or submodule.with_suffix(".py").exists()
                yield f"{node.module}.{alias.name}" if found else node.module


def test_no_floor_is_broken():
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("folder", "line"),
    [
        ("functional", "from lit_align.rewards.base import RewardModule"),
        ("functional", "import lightning"),
        ("rewards", "from lit_align.policies import DiffusionPolicy"),
        ("policies", "from lit_align.rewards import Colorfulness"),
        ("algorithms", "from lit_align.policies.sd3 import SD3Policy"),
        ("algorithms", "from diffusers import DDIMScheduler"),
        ("callbacks", "from lit_align.algorithms.ddpo import DDPO"),
    ],
)
def test_a_broken_floor_is_seen(tmp_path, folder, line):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "guilty.py").write_text(f"def late():\n    {line}\n")
    (told,) = violations(tmp_path)
    assert told.startswith(f"{folder}.guilty imports ")


# What algorithms share beside their bases.
PLUMBING = (
    "checkpoint",
    "choices",
    "denoising",
    "noising",
    "pairing",
    "pixels",
    "precision",
    "rollout",
    "sharding",
    "tasks",
)
ABSTRACT = (
    "base",
    "rounds",
    "online",
    "forward_process",
    "preference_learning",
    "reward_gradient",
    "schedule_learning",
)


def test_no_algorithm_imports_another():
    for path in (PACKAGE / "algorithms").glob("*.py"):
        if path.stem in ("__init__", *ABSTRACT, *PLUMBING):
            continue
        siblings = {
            n.split(".")[2] for n in imported(path) if n.startswith("lit_align.algorithms.")
        }
        assert siblings <= {*ABSTRACT, *PLUMBING}, path


def test_automatic_optimisation_only():
    """Nothing that trains steps an optimiser or calls backward itself."""
    for path in set(PACKAGE.rglob("*.py")) - {PACKAGE / "benchmarks" / "overhead.py"}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                call = ast.unparse(node.func)
                assert node.func.attr not in ("backward", "manual_backward"), f"{path}: {call}"
                assert not call.endswith("optimizer.step"), f"{path}: {call}"


BUDGETS = {"algorithms": 200, **{f"algorithms.{name}": 300 for name in ABSTRACT}}


def test_files_and_functions_keep_their_budgets():
    """Files have at most 400 lines (algorithms 200, their bases 300), functions at most 50."""
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        text = path.read_text(encoding="utf-8")
        budget = BUDGETS.get(name) or BUDGETS.get(name.split(".")[0], 400)
        assert text.count("\n") <= budget, f"{name} has more than {budget} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= 50, f"{name}.{node.name} has {lines} lines"
