"""Sampling: the front door, the loop, what a call asks for, and what runs each step."""
