"""Prepare a dataset into shards: `eat-dist data prepare`, with its options, as a script for a Ray job."""

from eat_dist.cli import main

if __name__ == "__main__":
    main("data", "prepare")
