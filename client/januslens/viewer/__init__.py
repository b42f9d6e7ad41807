"""Results as self-contained HTML pages that need no network.

The program in `assets/` is built from `client/viewer/` and committed, so users need no Node.js.
"""
