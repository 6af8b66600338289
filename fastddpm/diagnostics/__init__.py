"""What a machine is and does: verify, inspect and profile, the environment, and the compiler's output."""
