"""Run requests on one compute thread per device, and pass results to the event loop."""
