"""Tests of the contract for clients in any language, through raw stubs."""
