"""What can be counted without a clock: operations of a step, instructions and bytes of a kernel."""
