"""Run lists behind the tables of the READMEs, and measurements of speed and quality."""
