"""The machine: hardware, devices, torch.compile and the caches of compiled code."""
