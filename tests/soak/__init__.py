"""What takes minutes: thousands of requests, hundreds of dying clients. `make soak` runs it."""
