"""Noise schedules, the timesteps to visit, and what a network was trained for."""
