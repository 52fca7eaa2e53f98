"""What the README promises is what the checks run."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICKSTART = "pip install . && python run.py fit --config configs/quickstart.yaml"
TESTS = 'pip install -e ".[test]" && pytest'


def test_the_two_commands():
    assert QUICKSTART in README
    assert TESTS in README
    assert TESTS in (ROOT / ".ci" / "run").read_text().splitlines()


def test_links_and_pictures_exist():
    for document in [ROOT / "README.md", *(ROOT / "configs").rglob("README.md")]:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (document.parent / target).exists(), f"{document}: {target}"


def test_every_folder_of_the_package_is_in_the_tree():
    for path in (ROOT / "lit_align").iterdir():
        if path.name[0] not in "_." and path.name != "py.typed":
            assert path.name in README, path.name


def test_metric_names_of_the_code_are_explained():
    """Each metric that is logged stands in the README's table."""
    logged = set()
    for folder in ("algorithms", "callbacks"):
        for path in (ROOT / "lit_align" / folder).glob("*.py"):
            if path.stem != "pretraining":
                text = path.read_text(encoding="utf-8")
                logged |= set(re.findall(r'"((?:train|rollout|time|val)/[a-z_]+)', text))
    assert {"train/ratio", "rollout/invalid", "time/update", "val/kl"} <= logged
    for name in logged:
        assert f"`{name}" in README, name
