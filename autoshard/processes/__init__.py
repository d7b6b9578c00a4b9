"""Child processes under limits of time and memory: whatever starts XLA runs in one."""
