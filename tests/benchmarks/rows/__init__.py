"""The rows of the table, a module each: `measure` takes a `Bench` and yields rows."""
