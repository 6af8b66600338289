"""What can be counted without a clock: operations of a step, launches and waits of a loop."""
