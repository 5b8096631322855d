"""Launch scripts, one a task: `python -m launch.NAME --help`."""
