"""Who may ask for what: callers, their tokens, scopes and quotas."""
