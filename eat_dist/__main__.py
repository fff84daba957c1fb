"""``python -m eat_dist`` is ``eat-dist``."""

from eat_dist.cli import main

main()
