"""What a run will take: memory, passes that fit the device, the dry run."""
