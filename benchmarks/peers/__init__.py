"""The networks that are measured, and the libraries that are measured beside this one."""
