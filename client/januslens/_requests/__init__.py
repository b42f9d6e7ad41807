"""From Python arguments to request messages: pure functions, nothing is sent here.

An argument that no server could accept raises ValueError or TypeError, saying what was expected;
what depends on the model (a layer too high, a token unknown) is left to the server.
"""
