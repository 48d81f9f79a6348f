"""The ops on the CPU: PyTorch's own fast routines, with memory linear in the sequence length."""
