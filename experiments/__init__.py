"""The paper's experiments and its open checks, each one command."""
