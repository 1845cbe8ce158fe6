"""What a user runs to measure their own machine: `lowbit bench ...`, `lowbit tune`."""
