"""The shapes world: a renderer, a caption grammar and a verifier that knows the truth."""
