"""A PTX interpreter in NumPy: runs the compiled form of a Triton kernel on a machine without a GPU.

``parser`` reads the text, ``machine`` runs all threads of many blocks at once as NumPy vectors, ``memory`` checks
every access, ``device`` is a Triton driver whose launches end here.
"""
