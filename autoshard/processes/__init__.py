"""Child processes under limits of time and memory: whatever compiles or runs a step runs in one."""
