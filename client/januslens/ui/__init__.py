"""The local page against a live server: a small web server between a browser and gRPC."""
