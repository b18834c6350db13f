"""Training of routers, and of the demo model (torch)."""
