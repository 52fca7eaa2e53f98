"""Entry point: `python run.py fit --config configs/quickstart.yaml`; see README.md."""

from lit_align.cli import main

if __name__ == "__main__":
    main()
