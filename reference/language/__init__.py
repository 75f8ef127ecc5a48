"""A small language model that is installed with pip and runs offline: SmolLM2-135M-Instruct."""
