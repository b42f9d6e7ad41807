"""The rows of the table, one module each: `measure` takes a `Bench` and yields rows."""
