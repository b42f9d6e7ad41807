"""What clients in any language rely on, checked through raw stubs."""
