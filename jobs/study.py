"""Compare rows of settings over seeds and datasets: `eat-dist study`, with its options, as a script for a Ray job."""

from eat_dist.cli import main

if __name__ == "__main__":
    main("study")
