"""Rewards as the command line makes them: of plain values."""

from jsonargparse import ArgumentParser

from lit_align.rewards import RewardModule


def from_yaml(text):
    """Return the reward of a flow mapping, whose class paths start at `lit_align.rewards`."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(RewardModule, "reward")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # 4.48
    whole = text.replace("class_path: ", "class_path: lit_align.rewards.")
    return instantiate(parser.parse_string(f"reward: {whole}")).reward
