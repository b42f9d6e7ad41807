"""The goals in time and memory, measured against plain passes and products on this machine."""

from januslens_server.openmp import let_waiting_threads_sleep

# As the server does, before torch is imported: floors and ours wait alike.
let_waiting_threads_sleep()
