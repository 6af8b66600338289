"""Data sets: images and arrays in memory, and points in the plane."""

from fastddpm.data.datasets import Dataset, mnist
from fastddpm.data.load import load_data

__all__ = ["Dataset", "load_data", "mnist"]
