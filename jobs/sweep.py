"""Search a space of settings, a training each: `eat-dist sweep`, with its options, as a script for a Ray job."""

from eat_dist.cli import main

if __name__ == "__main__":
    main("sweep")
