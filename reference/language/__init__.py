"""The language reference: SmolLM2-135M-Instruct, which pip installs and which runs offline, steered in several ways."""
