"""The picture of data dissolving into a Gaussian and coming back."""
