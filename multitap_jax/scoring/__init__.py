"""One saved thing, a scorer that loads it, jobs that score files of any length, and exports."""
