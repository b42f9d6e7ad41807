"""Published checkpoints: what a random or embedded model cannot show. Run by `make real`."""
