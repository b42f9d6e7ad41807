"""Results as pages: one self-contained file each, that asks no network for anything.

The program in `assets/` is built from `client/viewer/` and committed; users need no Node.
"""
