"""Embed image files with a trained ensemble: `eat-dist embed`, with its options, as a script for a Ray job."""

from eat_dist.cli import main

if __name__ == "__main__":
    main("embed")
