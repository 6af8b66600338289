"""The UNet: its network, configuration and files, and its form for sampling."""
