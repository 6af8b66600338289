"""Data sets: images and arrays in memory, and points in the plane."""

from fastddpm.data.datasets import Dataset, load_data, mnist

__all__ = ["Dataset", "load_data", "mnist"]
