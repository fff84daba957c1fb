"""The heart: what a member measures, what the ensemble makes of it, and what keeps members different."""
