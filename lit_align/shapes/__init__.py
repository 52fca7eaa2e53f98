"""The shapes world: a renderer, a caption grammar and a verifier that knows the truth."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"  # the models that ship with the package
