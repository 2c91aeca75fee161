"""A script's process and what it leaves on disk: command line, signals, several processes, manifests, the run folder."""
