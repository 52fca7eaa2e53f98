"""`python -m lit_align` is the console script `lit-align`."""

from lit_align.cli import main

main()
