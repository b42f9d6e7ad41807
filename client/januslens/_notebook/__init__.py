"""Results as notebooks show them: compact HTML that needs no script and no network."""
