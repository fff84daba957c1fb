"""Measure a model, clean and under attack: `eat-dist evaluate`, with its options, as a script for a Ray job."""

from eat_dist.cli import main

if __name__ == "__main__":
    main("evaluate")
