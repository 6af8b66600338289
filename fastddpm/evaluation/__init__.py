"""What `fastddpm eval` measures: samples beside real images, each number with the one that it is to be judged by."""
