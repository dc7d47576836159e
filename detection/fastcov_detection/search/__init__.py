"""The width search: arms, runs, measuring passes and verdicts."""
