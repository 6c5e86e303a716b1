"""From a command line to running processes: the ranks of one run, the jobs of a sweep."""
