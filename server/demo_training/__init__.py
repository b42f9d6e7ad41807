"""Train and measure the embedded model `demo`; not part of the installed package.

`make rebuild-demo` runs `train` and `evaluate`; `januslens_server.demo` holds the trained model.
"""
