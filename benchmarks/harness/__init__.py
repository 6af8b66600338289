"""Cases, providers and gates; interleaved rounds and their statistics."""
