"""The report of a sweep: what its trials reached, and which settings mattered."""
