"""The tables and the page of a study: what ``eat-dist study`` writes, and ``eat-dist report`` of its folder."""
