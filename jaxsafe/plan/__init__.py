"""What a job takes of every device, worked out before it runs: from a configuration alone, without weights."""
