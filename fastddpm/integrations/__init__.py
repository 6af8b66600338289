"""Drop-in replacements for other libraries. Each module is imported on its own and needs only what it replaces."""
