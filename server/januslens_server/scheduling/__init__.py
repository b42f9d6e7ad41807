"""One compute thread per device, and what stands between it and the event loop."""
