"""Reading a decoder that no adapter was written for, by what one forward pass shows of it."""

from januslens_server.models.automatic.view import view

__all__ = ["view"]
