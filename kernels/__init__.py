"""Triton kernels of fastddpm: tensors and ints in, tensors out.

Installed and imported as ``fastddpm.kernels``. A top-level package called ``kernels`` belongs to another project.
"""

if __name__ != "fastddpm.kernels":
    raise ImportError(
        f"this package was imported as {__name__!r}; import it as 'fastddpm.kernels' (run 'pip install -e .' first, "
        "and start Python or pytest so that the checkout's root is not the first entry of sys.path)"
    )
