"""Tests that take minutes: thousands of requests, hundreds of killed clients (`make soak`)."""
